"""Decoder layers that run fused give what stock layers with the same weights give, and step back where they must."""

import copy
import dataclasses
import itertools
import pickle
from collections import Counter

import pytest
import torch
from decoders import FUSED, Calls, assert_near, decoder, family_of, pair, prompt
from fused_layers import CLOSE, OPERATORS, STEPS, calls_of, fused_layers, is_whole, unfused
from torch import nn
from transformers import DynamicCache

from torch_int4 import Int4Cache, Int4Linear, patch
from torch_int4.nn import stack
from torch_int4.nn.layer import FusedBlock
from torch_int4.nn.norm import FusedNorm
from torch_int4.nn.prepared import PreparedLayer
from torch_int4.patching import families
from torch_int4.support.forwards import fingerprint

pytestmark = pytest.mark.oldest

BLOCKS = [name for name in FUSED if families.resolve(family_of(name)).blocks]
WHOLE = [name for name in BLOCKS if is_whole(name)]
NOT_IN_TURN = ("bamba", "exaone4", "granitemoehybrid", "qwen3_vl_moe_text", "qwen3_vl_text")  # whose loops do more


def test_families_that_are_fused():
    assert {"llama", "mistral", "qwen2", "qwen3", "ministral", "gemma", "gptj", "gpt_neox", "falcon"} <= set(WHOLE)
    assert {"starcoder2", "cohere", "cohere2", "ernie4_5", "phi", "smollm3", "stablelm"} <= set(WHOLE)
    assert {"bloom", "gpt_bigcode-mha", "biogpt", "xglm", "opt-gelu", "helium"} <= set(WHOLE)
    assert {"jamba", "bamba", "qwen3_vl_text"} <= set(WHOLE)
    steps = {
        "cohere-norms",
        "exaone4",
        "gpt2",
        "gpt_bigcode",
        "granitemoehybrid-dense",
        "lfm2",
        "mpt",
        "opt",
        "persimmon",
        "persimmon-norms",
        "phi-norms",
        "qwen3_5_text",
        "stablelm-norms",
        "phi3",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "olmo3",
        "glm",
        "glm4",
        "granite",
    }
    experts = {
        "gpt_oss",
        "gpt_oss-limits",
        "mixtral",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        "granitemoe",
        "glm4_moe",
        "ernie4_5_moe",
    }
    experts |= {"granitemoehybrid", "granitemoeshared", "lfm2_moe", "qwen3_5_moe_text", "qwen3_next"}
    experts |= {"qwen3_vl_moe_text"}
    assert set(BLOCKS) - set(WHOLE) == steps | experts | {"dots1", "flex_olmo", "glm4_moe-plain", "solar_open"}


@pytest.mark.parametrize("name", FUSED)
def test_layers_that_are_fused(name):
    patched, reference = pair(name)
    expected = 2 if name in BLOCKS else 0
    assert patched.torch_int4_report.blocks == expected
    assert sum(isinstance(m, FusedBlock) for m in patched.modules()) == expected
    assert ("decoder layers: 2 fused" in str(patched.torch_int4_report)) == (name in BLOCKS)
    logits, layers = fused_layers(lambda: patched(prompt()).logits)
    assert layers == expected
    with torch.no_grad():
        assert_near(logits, reference(prompt()).logits, CLOSE)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_layer_is_one_operator_call_and_five_with_other_caches(name):
    patched, _ = pair(name, head="float")
    # After the layers comes a norm, of one operator too where the layers have the same.
    last = Counter(normalize=sum(isinstance(m, FusedNorm) for m in patched.modules()))
    stock = families.resolve(family_of(name)).blocks[0].forwards[2] is None or family_of(name) in NOT_IN_TURN
    assert bool(last.total()) == (not stock)
    steps, whole = calls_of(patched) + last, calls_of(patched, whole=True) + last
    assert name not in WHOLE or whole == {"prepared_decoder_layers": 2} | +last
    for cache, wanted in ((Int4Cache(), whole), (DynamicCache(), steps)):
        with torch.no_grad(), Calls() as calls:
            patched(prompt(), past_key_values=cache)
            assert calls.counts == wanted
            patched(prompt(tokens=40), past_key_values=cache)
        assert calls.counts == {name: 2 * count for name, count in wanted.items()}


def assert_same_in_steps(monkeypatch, model, *inputs):
    """Whole layers and their steps give the same bits, with a cache that they fill."""
    results = []
    for stepwise in (False, True):
        with torch.no_grad(), monkeypatch.context() as patching:
            if stepwise:
                patching.setattr(stack, "MOST_TOKENS", 0)
                patching.setattr(PreparedLayer, "run", lambda layer, *args: layer._steps.run(*args))
            cache = Int4Cache(model.config, dtype=model.torch_int4_report.config.kv_cache)
            results.append([model(**each, past_key_values=cache).logits for each in inputs])
            layer = cache.layers[1]
            results[-1] += [states[:, :, : layer.get_seq_length()] for states in (layer.keys, layer.values)]
    for got, want in zip(*results, strict=True):
        if model.config.model_type in ("qwen3", "qwen3_vl"):  # whose norms of heads are torch's in the steps
            assert_near(got.float(), want.float(), 5e-2)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_layers_give_the_bits_of_their_steps(name, monkeypatch):
    variants = itertools.product((torch.float32, torch.bfloat16, torch.float16), ("int8", "fp32"))
    for index, (dtype, compute) in enumerate(variants):
        model = patch(decoder(name, dtype), compute=compute, kv_cache=("fp32", "bf16", "int8")[index % 3])
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, :5] = 0
        longer = torch.nn.functional.pad(mask, (0, 1), value=1)
        inputs = [
            {"input_ids": prompt(), "attention_mask": mask},
            {"input_ids": prompt(tokens=1), "attention_mask": longer},
        ]
        assert_same_in_steps(monkeypatch, model, *inputs)
        assert_same_in_steps(monkeypatch, model, {"input_ids": prompt(tokens=3)}, {"input_ids": prompt(tokens=1)})


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types_and_arithmetic(name, dtype):
    """Fused layers against the same operators around stock modules."""
    sparse = any(layout.calls_mlp for layout in families.resolve(family_of(name)).blocks)
    for compute in ("int8",) if sparse else ("int8", "int8x2", "bf16", "fp32"):  # experts take long to patch
        models = []
        for blocks in (families.resolve(family_of(name)).blocks, ()):
            family = dataclasses.replace(families.resolve(family_of(name)), blocks=blocks)
            models.append(patch(decoder(name, dtype), compute=compute, head="float", family=family))
        with torch.no_grad():
            got, want = (model(prompt()).logits.float() for model in models)
        assert models[0].torch_int4_report.blocks == 2
        assert_near(got, want, {torch.float32: 2e-2, torch.bfloat16: 6e-2, torch.float16: 2e-2}[dtype])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(name, options):
    patched, reference = pair(name)
    arguments = {"max_new_tokens": 16, "do_sample": False, **options}
    got, layers = fused_layers(lambda: patched.generate(prompt(), **arguments))
    assert layers > 0
    assert torch.equal(got, reference.generate(prompt(), **arguments))
    assert torch.equal(got, unfused(name).generate(prompt(), **arguments))


# What the operators do not serve


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_and_training_are_those_of_the_stock_layer(name):
    patched, plain = pair(name)[0], unfused(name)
    ids, losses = prompt(), []
    for model in (patched, plain):
        model.train()
        with Calls() as calls:
            losses.append(model(ids, labels=ids).loss)
            losses[-1].backward()
        assert not set(OPERATORS) & calls.counts.keys()
    assert torch.equal(*losses)
    others = dict(plain.named_parameters())
    for key, parameter in patched.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, others[key].grad), key
    _, layers = fused_layers(lambda: patched(ids))
    assert layers == 0  # still in training mode
    patched.eval()
    _, layers = fused_layers(lambda: patched(ids))
    assert layers == 2
    if name == "llama":
        hidden = torch.randn(1, 3, 64).requires_grad_()
        tables = patched.model.rotary_emb(hidden, torch.arange(3)[None])
        for parameter in patched.parameters():
            parameter.requires_grad_(False)
        patched.model.layers[0](hidden, position_embeddings=tables, attention_mask=None).sum().backward()
        assert hidden.grad is not None


def test_recorded_states_and_attentions():
    patched, reference = pair("llama")
    with torch.no_grad():
        got = patched(prompt(), output_hidden_states=True).hidden_states
        want = reference(prompt(), output_hidden_states=True).hidden_states
        assert len(got) == len(want) == 3
        for a, b in zip(got, want, strict=True):
            assert_near(a, b, CLOSE)
        for model in (patched, reference):
            model.set_attn_implementation("eager")
        got, want = (m(prompt(), output_attentions=True).attentions for m in (patched, reference))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# What is fused and what is not


def test_layers_that_compute_something_else_are_left_alone():
    llama = families.resolve("llama")
    granite = patch(decoder("granite"), family=llama)  # has all the modules, and factors besides
    assert granite.torch_int4_report.blocks == 0
    assert granite.torch_int4_report.fused == 2
    model = decoder("llama")
    layer = model.model.layers[0]

    class Custom(type(layer.mlp)):
        def forward(self, x):
            return super().forward(x) + 1

    layer.mlp.__class__ = Custom
    assert patch(model).torch_int4_report.blocks == 1
    model = decoder("llama")
    model.model.layers[1].post_attention_layernorm = nn.RMSNorm(64)
    assert patch(model).torch_int4_report.blocks == 1


def test_fingerprints_tell_computations_apart():
    class A(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Says something."""
            return x + 1  # comments do not count

    class B(nn.Module):
        @torch.no_grad()
        def forward(self, x):
            return x + 1

    class C(nn.Module):
        def forward(self, x):
            return x + 2

    a, b, c = map(fingerprint, (A, B, C))
    assert a == b != c
    assert fingerprint(type("Made", (nn.Module,), {"forward": eval("lambda self, x: x")})) == ""


def test_copies_pickles_and_state_dicts(tmp_path):
    patched, _ = pair("llama")
    want, _ = fused_layers(lambda: patched(prompt()).logits)
    torch.save(patched, tmp_path / "model.pt")
    others = [copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))]
    others.append(torch.load(tmp_path / "model.pt", weights_only=False))
    fresh = pair("llama")[0]
    for module in fresh.modules():
        if isinstance(module, Int4Linear):
            module.packed.zero_()
    fresh.load_state_dict(patched.state_dict())
    for other in (*others, fresh):
        got, layers = fused_layers(lambda other=other: other(prompt()).logits)
        assert layers == 2
        assert torch.equal(got, want)
        assert type(other.model.layers[0]) is type(patched.model.layers[0])
    stock = type(decoder("llama").model.layers[0])
    assert isinstance(patched.model.layers[0], stock)
    assert type(patched.model.layers[0]).__name__ == stock.__name__


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gptj", "gpt_neox", "cohere"])
def test_a_compiled_decode_step(name):
    torch._dynamo.reset()
    patched, _ = pair(name)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    step, sequences = torch.compile(patched, fullgraph=True, backend=backend), []
    for run, length in ((patched, None), (step, 40)):
        cache = Int4Cache(patched.config, dtype="fp32", max_length=length)
        with torch.no_grad():
            logits, found = patched(prompt(), past_key_values=cache).logits, []
            for _ in range(10):
                found.append(logits[:, -1:].argmax(-1))
                logits = run(input_ids=found[-1], past_key_values=cache).logits
        sequences.append(torch.cat(found, dim=1))
    assert torch.equal(*sequences)
    assert len(graphs) == 1
    for operator in STEPS:
        assert sum(target.startswith(f"torch_int4.{operator}.") for target in graphs[0]) == 2
