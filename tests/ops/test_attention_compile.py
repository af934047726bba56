"""torch.compile of a decode step: one graph, no recompilation, the tokens of the eager model."""

import pytest
import torch
from alone import survives
from decoders import MAIN, pair, prompt
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from torch_int4 import Int4Cache

NAMES = [name for name in MAIN if name != "falcon-rw"]  # its masks have no columns for empty places, in transformers


@torch.no_grad()
def decode(model, step, cache, tokens):
    """Greedy tokens after a prompt, one call of `step` for each."""
    logits = model(prompt(), past_key_values=cache).logits
    found = []
    for index in range(tokens):
        found.append(logits[:, -1:].argmax(-1))
        with torch.compiler.set_stance("fail_on_recompile" if index > 2 else "default"):
            logits = step(input_ids=found[-1], past_key_values=cache).logits
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("name", "kv_cache", "backend"),
    [*((name, "fp32", "aot_eager") for name in NAMES), ("llama", "int8", "inductor"), ("falcon", "int8", "aot_eager")],
)
def test_a_decode_step(name, kv_cache, backend):
    torch._dynamo.reset()
    patched, _ = pair(name, kv_cache=kv_cache)
    want = decode(patched, patched, Int4Cache(patched.config, dtype=kv_cache), 20)
    compiled = CompileCounterWithBackend(backend)
    step = torch.compile(patched, fullgraph=True, backend=compiled)
    got = decode(patched, step, Int4Cache(patched.config, dtype=kv_cache, max_length=48), 20)
    assert torch.equal(got, want)
    assert compiled.frame_count == 1
    operators = [str(node.target) for node in compiled.graphs[0].graph.nodes]
    for name in ("attention", "rotary_append"):
        assert sum(operator.startswith(f"torch_int4.{name}") for operator in operators) == 2


def test_generate_compiles_by_itself():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    patched, reference = pair("llama")
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True
    options = {"max_new_tokens": 12, "do_sample": False}
    cache = Int4Cache(patched.config, dtype="fp32", max_length=32)
    got = patched.generate(prompt(), past_key_values=cache, compile_config=compile_config, **options)
    assert torch.equal(got, reference.generate(prompt(), **options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("fixed", [True, False])
def test_a_prompt_that_is_compiled_before_anything_has_run(name, fixed):
    torch._dynamo.reset()
    patched, _ = pair(name)
    run = torch.compile(patched, fullgraph=True, backend="aot_eager" if fixed else "eager")
    cache = Int4Cache(patched.config, dtype="fp32", max_length=48 if fixed else None)
    with torch.no_grad():
        got = run(prompt(), past_key_values=cache).logits
        assert int(cache.get_seq_length()) == 12
        want = patched(prompt(), past_key_values=Int4Cache(patched.config, dtype="fp32")).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layouts_imply_nothing_later():
    """What is first computed inside of compiled code breaks its graph."""
    code = """
from functools import cached_property
from torch_int4.patching import families
for name in families.available():
    family = families.resolve(name)
    for layout in (*family.attentions, *family.blocks):
        names = {n for n, entry in vars(type(layout)).items() if isinstance(entry, cached_property)}
        assert names and names <= vars(layout).keys(), (name, names)
"""
    survives(code)
