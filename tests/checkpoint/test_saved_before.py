"""Files that version 0.1.0 saved, before its modules moved into rooms, still load and hold the same bits."""

import json
from pathlib import Path

import pytest
import torch
from decoders import assert_near
from safetensors.torch import load_file
from saved_before import INPUTS, LINEARS, MODELS, ROWS, fingerprint, fingerprints, float_model, outputs
from transformers import AutoModelForCausalLM

import torch_int4
from torch_int4 import Int4Config, Int4Linear, Int4Weight, patch

FOLDER = Path(__file__).parents[1] / "data" / "saved_before"
FACTS = json.loads((FOLDER / "expected.json").read_text())
LOADERS = {"transformers": AutoModelForCausalLM.from_pretrained, "torch_int4": torch_int4.from_pretrained}
FORMS = {"llama": "compressed-tensors", "llama_own_form": "torch_int4", "gpt_neox": "compressed-tensors"}
# Norm of the difference over the norm. Kernel sets add in another order, so that now and then an activation is
# rounded to the neighbouring int8; the kernel sets that were compared are at most 2e-3 apart.
CLOSE = 1e-2


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def logits(model, expected):
    return outputs(model, expected["prompt"], expected["fed"])


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_bit_by_bit_and_answers_as_it_did(name, loader, isa, expected):
    described = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == FORMS[name]
    model = LOADERS[loader](FOLDER / name)
    assert fingerprints(model) == FACTS["weights"][name]
    assert model.torch_int4_report.config == Int4Config(**MODELS[name][-1])
    assert_near(logits(model, expected), expected[name], CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_saved_again_as_it_was(name, tmp_path):
    model = torch_int4.from_pretrained(FOLDER / name)
    if FORMS[name] == "torch_int4":
        with pytest.warns(UserWarning, match="own form"):
            model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    old, new = (load_file(folder / "model.safetensors") for folder in (FOLDER / name, tmp_path))
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert tensor.dtype == new[key].dtype, key
        assert torch.equal(tensor, new[key]), key
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER / name, tmp_path))
    assert old["quantization_config"] == new["quantization_config"]


def test_the_state_dict_of_a_patched_model_loads_into_another(expected):
    model = float_model("llama")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    patch(model)
    assert fingerprints(model) != FACTS["weights"]["llama"]
    model.load_state_dict(load_file(FOLDER / "llama_state_dict.safetensors"))
    assert fingerprints(model) == FACTS["weights"]["llama"]
    assert_near(logits(model, expected), expected["llama"], CLOSE)


def empty(held):
    """An `Int4Linear` of the same form, whose every value is another one."""
    sizes = {"bits": held["bits"], "group_size": held["group_size"], "codebook": held["codebook"]}
    tensors = {}
    for name in ("scales", "zeros", "offsets"):
        if name in held:
            dtype, shape, _ = held[name]
            tensors[name] = torch.ones(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
    codes = torch.zeros(ROWS, INPUTS, dtype=torch.uint8)
    return Int4Linear.from_weight(Int4Weight(codes, **tensors, **sizes), torch.zeros(ROWS))


@pytest.mark.parametrize("name", LINEARS)
def test_the_state_dict_of_a_linear_loads_bit_by_bit(name, isa, expected):
    held = FACTS["weights"][f"linear.{name}"]
    linear = empty(held)
    state = load_file(FOLDER / "linears.safetensors")
    state = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
    linear.load_state_dict(state)
    assert fingerprint(linear.to_weight()) == held
    again = linear.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    with torch.no_grad():
        got = linear(expected["x"])
    torch.testing.assert_close(got, expected[f"linear.{name}"], rtol=1e-5, atol=1e-4)
