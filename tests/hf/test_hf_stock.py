"""Files of `save_pretrained`, read by transformers and compressed-tensors alone, in a process without torch_int4."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import int4s, llama

import torch_int4
from torch_int4 import patch

pytest.importorskip("compressed_tensors", reason="needs compressed-tensors: pip install compressed-tensors")

STOCK = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=torch.tensor([[5, 17, 3, 42]])).logits  # decompresses the weights
assert "torch_int4" not in sys.modules
state = {f"{name}.weight": m.weight.detach().clone() for name, m in model.named_modules() if hasattr(m, "weight")}
save_file({**state, "logits": logits}, sys.argv[2])
"""


@pytest.mark.parametrize("fields", [{"head": "int8"}, {"head": "float", "group_size": -1}])
def test_stock_transformers_has_the_same_weights(fields, tmp_path):
    model = patch(llama(tied=False, hidden_size=64, intermediate_size=96, head_dim=16), **fields)
    model.save_pretrained(tmp_path / "m")
    run = [sys.executable, "-P", "-c", STOCK, str(tmp_path / "m"), str(tmp_path / "dense.safetensors")]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    dense = load_file(tmp_path / "dense.safetensors")
    for name, module in int4s(model).items():
        torch.testing.assert_close(dense[f"{name}.weight"].float(), module.dequantize(), rtol=1e-3, atol=1e-5)
    assert torch.equal(dense["model.norm.weight"], model.model.norm.weight)
    assert len(int4s(torch_int4.from_pretrained(tmp_path / "m"))) == len(int4s(model))
