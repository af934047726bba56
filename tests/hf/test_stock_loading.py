"""Files of `save_pretrained` of a patched model, loaded by transformers and compressed-tensors without us."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from tiny_models import IDS, int4s, llama, logits

from torch_int4 import patch

# symmetric, head, whether theirs expands while loading
CASES = {
    "symmetric with an int8 head": (True, "int8", False),
    "symmetric, expanded": (True, "float", True),
    "asymmetric, expanded": (False, "float", True),
}
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
ids = torch.load(sys.argv[1] + "/ids.pt")
for folder, dense in zip(sys.argv[2::2], sys.argv[3::2]):
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dense == "True" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    weights = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    torch.save({"logits": logits, "weights": weights}, folder + "/theirs.pt")
assert "torch_int4" not in sys.modules
"""


@pytest.mark.skipif(not importlib.util.find_spec("compressed_tensors"), reason="compressed-tensors is not installed")
def test_stock_transformers_loads_the_same_weights(tmp_path):
    """Asymmetric files need dequantize=True there: transformers 5.23 makes no room for packed zero points."""
    torch.save(IDS, tmp_path / "ids.pt")
    saved, arguments = {}, [str(tmp_path)]
    for name, (symmetric, head, dense) in CASES.items():
        model = llama(hidden_size=64, intermediate_size=128, head_dim=16, tied=False)
        saved[name] = patch(model, symmetric=symmetric, head=head, compute="fp32", kv_cache="fp32")
        saved[name].save_pretrained(tmp_path / name)
        arguments += [str(tmp_path / name), str(dense)]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (_, head, dense) in CASES.items():
        theirs, linears = torch.load(tmp_path / name / "theirs.pt"), int4s(saved[name])
        assert len(linears) == 14 + (head == "int8")
        # expanded while loading, weights are products in the scales' fp16; packed ones become fp32 later
        tolerance = {"rtol": 1e-3, "atol": 1e-4} if dense else {"rtol": 0, "atol": 0}
        for module, linear in linears.items():
            torch.testing.assert_close(theirs["weights"][module], linear.dequantize(), **tolerance)
        want = logits(saved[name])
        assert (theirs["logits"] - want).norm() < 1e-3 * want.norm()
