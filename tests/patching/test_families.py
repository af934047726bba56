"""The statements of family files about their models, checked on tiny ones."""

import copy
import dataclasses

import pytest
import torch
from decoders import COMMON, FAMILIES, FUSED, GENERIC, Calls, assert_near, decoder, family_of, pair, prompt
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from torch_int4 import patch
from torch_int4.layouts.attention import AttentionLayout
from torch_int4.nn.attention import FusedAttention
from torch_int4.patching import families

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_data_about_modules_that_exist(name):
    family, model = families.resolve(name), decoder(name)
    assert model.config.get_text_config().model_type == name  # the file has the name of its models
    assert all(isinstance(layout, AttentionLayout) for layout in family.attentions)
    found = [
        [m for m in model.modules() if all(hasattr(m, n) for n in (*layout.children, *layout.attributes))]
        for layout in family.attentions
    ]
    assert not found or sorted(map(len, found))[-1] == 2
    for group in family.shared_inputs if not found else ():
        holders = [m for m in model.modules() if all(linear in m._modules for linear in group)]
        assert holders or group == ("q_proj", "kv_a_proj_with_mqa")  # of models that compress no queries


@pytest.mark.parametrize(
    ("name", "linears", "others"),  # where no layer is fused as a whole
    [
        ("llama", [3, 2], 2),  # q k v, gate up; o, down
        ("qwen3", [3, 2], 2),
        ("gptj", [4], 2),  # q k v fc_in; out_proj, fc_out
        ("falcon", [2], 2),  # query_key_value dense_h_to_4h; dense, dense_4h_to_h
        ("falcon-40b", [], 4),  # two norms
        ("falcon-rw", [], 4),  # the MLP comes after attention
        ("gpt_neox", [], 4),
        ("gpt2", [], 4),
        ("lfm2", [3, 2], 2),  # q k v, w1 w3; out_proj, w2
        ("opt", [3], 3),
    ],
)
def test_linears_with_one_input_are_one_call(name, linears, others):
    family = dataclasses.replace(families.resolve(family_of(name)), blocks=())
    patched, _ = pair(name, head="float", family=family)
    assert patched.torch_int4_report.merged == 2 * len(linears)
    with torch.no_grad(), Calls() as calls:
        patched(prompt())
    assert calls.counts["int4_linears"] == 2 * len(linears)
    assert calls.counts["int4_linear"] == 2 * others


@pytest.mark.parametrize("name", GENERIC)
def test_decoders_without_a_file_use_the_interface(name):
    patched, _ = pair(name)
    report = patched.torch_int4_report
    assert (report.fused, report.interfaces) == (0, 1)
    assert "by transformers' attention interface" in str(report)
    assert not any(isinstance(module, FusedAttention) for module in patched.modules())


@pytest.mark.parametrize("name", ["llama", "falcon", "gptj"])
def test_any_family_can_be_treated_as_generic(name):
    patched, reference = pair(name, family="generic")
    assert patched.torch_int4_report.fused == 0
    with torch.no_grad():
        assert_near(patched(prompt()).logits, reference(prompt()).logits, 2e-3)
        assert_near(
            patched.generate(prompt(), max_new_tokens=4, do_sample=False).float(),
            reference.generate(prompt(), max_new_tokens=4, do_sample=False).float(),
            0,
        )


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "jais2"])
def test_plain_attention_that_was_chosen_before_stays_until_another_is(name):
    model = decoder(name)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="attn_implementation='eager' was chosen before patch"):
        patched = patch(copy.deepcopy(model), compute="fp32", kv_cache="fp32")
    reference = patch(model, compute="fp32", attention="stock")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad(), Calls() as calls:
        got = patched(prompt(), attention_mask=mask, output_attentions=True)
        want = reference(prompt(), attention_mask=mask, output_attentions=True)
    assert calls.attended == 0
    assert len(got.attentions) == 2
    for a, b in zip(got.attentions, want.attentions, strict=True):
        torch.testing.assert_close(a, b)
    patched.set_attn_implementation("torch_int4" if name == "jais2" else "sdpa")
    with torch.no_grad(), Calls() as calls:
        assert_near(patched(prompt(), attention_mask=mask).logits[mask.bool()], want.logits[mask.bool()], 2e-3)
    assert calls.attended == 2


@pytest.mark.parametrize("name", FUSED)
def test_patching_twice_changes_nothing(name):
    patched, _ = pair(name)
    kinds = [type(module) for module in patched.modules()]
    patch(patched, compute="fp32", kv_cache="fp32")
    assert [type(module) for module in patched.modules()] == kinds
    assert patched.torch_int4_report.fused == 2


def test_a_module_with_another_shape_is_left_alone():
    layout = dataclasses.replace(families.resolve("llama").attention, head_dim="no_such_attribute")
    family = dataclasses.replace(families.resolve("llama"), attention=layout)
    patched = patch(decoder("llama"), family=family)
    assert patched.torch_int4_report.fused == 0


@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({"is_causal": False}, False),
        ({"position_bias": torch.randn(1, 4, 4, 4)}, False),
        ({"attention_mask": torch.ones(1, 4)[:, None, None] > 0}, True),
        ({"something": 3, "more": torch.ones(2), "tokenizer": object()}, True),
    ],
    ids=["is_causal", "position_bias", "attention_mask", "not read"],
)
def test_arguments_that_the_stock_module_reads_are_left_to_it(options, served):
    patched, reference = pair("llama")
    hidden = torch.randn(1, 4, 64)
    attention, stock = patched.model.layers[0].self_attn, reference.model.layers[0].self_attn
    tables = patched.model.rotary_emb(hidden, torch.arange(4)[None])
    arguments = {"position_embeddings": tables, "attention_mask": None, **options}
    with torch.no_grad(), Calls() as calls:
        got = attention(hidden, **arguments)[0]
        assert calls.attended == served
        want = stock(hidden, **arguments)[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*FUSED, *GENERIC])
def test_arguments_that_nobody_reads_change_nothing(name):
    """`generate` hands the tokenizer of stop strings down to the layers, and so do others with what they are given."""
    patched, _ = pair(name)
    options = {"max_new_tokens": 5, "do_sample": False}
    patched.generate(prompt(), **options)  # what is prepared once
    sequences, counts = [], []
    for more in ({}, {"tokenizer": object()}):
        with Calls() as calls:
            sequences.append(patched.generate(prompt(), **options, **more))
        counts.append((calls.counts, calls.attended))
    assert torch.equal(*sequences)
    assert counts[0] == counts[1]
    assert calls.attended == 2 * 5


@pytest.mark.parametrize("name", ["llama", "jais2"])
def test_what_somebody_elses_attention_reads_reaches_it(name):
    seen = []

    def attention(module, query, key, value, mask, *, strength=None, **kwargs):
        seen.append(strength)
        return sdpa_attention_forward(module, query, key, strength * value, mask, **kwargs)

    AttentionInterface.register("of_somebody_else", attention)
    AttentionMaskInterface.register("of_somebody_else", sdpa_mask)
    patched, reference = pair(name)
    for model in (patched, reference):
        model.set_attn_implementation("of_somebody_else")
    with torch.no_grad(), Calls() as calls:
        got = patched(prompt(), strength=torch.tensor(2.0)).logits
        assert_near(got, reference(prompt(), strength=torch.tensor(2.0)).logits, 2e-3)
    assert calls.attended == 0
    assert seen == [torch.tensor(2.0)] * 4


def test_what_an_attention_module_passes_itself_is_left_to_it():
    """GPT-OSS tells transformers of its sinks, which the attention function in its file takes from the module."""
    shape = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model("gpt_oss", **{**COMMON, **shape, "intermediate_size": 32})
    patched = patch(AutoModelForCausalLM.from_config(config).eval(), compute="fp32", kv_cache="fp32")
    want = None
    for sinks in (0.0, 5.0):
        for layer in patched.model.layers:
            layer.self_attn.sinks.data.fill_(sinks)
        for implementation in ("torch_int4", "eager"):
            patched.set_attn_implementation(implementation)
            with torch.no_grad():
                got = patched(prompt(), use_cache=False).logits
            if implementation == "torch_int4":
                assert want is None or (got - want).norm() > 1e-2 * want.norm()
                want = got
            else:
                assert_near(got, want, 2e-3)
