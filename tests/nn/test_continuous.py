"""Continuous batching on patched models: the tokens of `generate`, or a refusal; and attention put back afterwards."""

from __future__ import annotations

import pytest
import torch
import transformers
from decoders import FAMILIES, GENERIC, decoder, prompt
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig

from torch_int4 import Int4Error, patch
from torch_int4.nn.continuous import require_paged
from torch_int4.patching import families

GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
CACHE = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64)
LENGTHS = (1, 12, 5)
# One family of each way to lay attention out, a model with windows, and models without a family.
LAYOUTS = list({families.resolve(name).attention: name for name in reversed(FAMILIES)}.values())
MODELS = [*LAYOUTS, "qwen2-window", *GENERIC]


def batched(model):
    prompts = [prompt(1, n, seed=n)[0].tolist() for n in LENGTHS]
    results = model.generate_batch(prompts, generation_config=GREEDY, continuous_batching_config=CACHE, warmup=False)
    return [result.generated_tokens for result in results.values()]


def is_refused(model):
    try:
        require_paged(model)
    except Int4Error:
        return True
    return False


def one_by_one(model):
    outputs = []
    for n in LENGTHS:
        ids = prompt(1, n, seed=n)
        new = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY)
        outputs.append(new[0, n:].tolist())
    return outputs


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_as_generate_or_refused(name: str) -> None:
    model = patch(decoder(name), kv_cache="fp32")
    before = model.config._attn_implementation
    want = one_by_one(model)
    if is_refused(model):
        with pytest.raises(Int4Error, match=f"{type(model).__name__}.*wrong tokens"):
            batched(model)
    else:
        got = batched(model)
        # Where transformers' own loop fails on its own model, as 5.24 does on GPT-NeoX and OPT, requests end in errors.
        assert got == want or got == batched(decoder(name)) == [[]] * len(LENGTHS)
    assert model.config._attn_implementation == before
    assert one_by_one(model) == want  # nothing of the paged cache stays behind


def test_known_models_are_served_and_known_traps_refused() -> None:
    for name in ("llama", "gpt_neox", "mistral", "qwen2", "jais2", "opt"):
        require_paged(decoder(name))
    old = Version(transformers.__version__) < Version("5.24")
    for name in ("falcon", "falcon-rw", "gemma2", *(["gptj"] if old else [])):
        with pytest.raises(Int4Error, match="generate"):
            require_paged(decoder(name))


def test_failed_start_leaves_the_attention_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch(decoder("jais2"))
    before = model.config._attn_implementation
    assert before == "torch_int4"
    with pytest.raises(TypeError):
        model.init_continuous_batching(no_such_argument=1)
    assert model.config._attn_implementation == before
