"""The script that runs transformers' tests on patched models, on a repository made for the purpose."""

from transformers_tests import Outcome, run, table

MIXIN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class GenerationTesterMixin:
    def model(self):
        sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()

    def test_generates(self):
        assert self.model().generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)

    def test_is_stock(self):
        assert not hasattr(self.model(), "torch_int4_report")

    def test_fails_always(self):
        raise ValueError("of its own")
"""
MODEL = """
from ...generation.test_utils import GenerationTesterMixin

class TestToy(GenerationTesterMixin):
    def test_of_modeling(self):
        raise ValueError("no test of generation")
"""


def repository(folder):
    for name, text in (("generation/test_utils.py", MIXIN), ("models/toy/test_modeling_toy.py", MODEL)):
        file = folder / "tests" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    for place in ("", "generation", "models", "models/toy"):
        (folder / "tests" / place / "__init__.py").touch()
    return folder


def test_stock_and_patched_are_compared(tmp_path):
    folder = repository(tmp_path)
    stock = run(folder, "toy", patched=False, select=None, seconds=200)
    patched = run(folder, "toy", patched=True, select=None, seconds=200)
    assert (stock.trouble, patched.trouble) == ("", "")
    assert stock.counts == {"passed": 2, "failed": 1}
    assert patched.counts == {"passed": 1, "failed": 2}
    assert (stock.patched, patched.patched) == (0, 2)
    text = table({"toy": (stock, patched)})
    assert "| toy | 3 | 0 | 2 | 1 | 2 | 1 |" in text
    assert "- toy: `test_is_stock`: " in text
    assert "test_fails_always" not in text


def test_what_does_not_run_is_said(tmp_path):
    folder = repository(tmp_path)
    assert "test_modeling_other.py is missing" in run(folder, "other", patched=False, select=None, seconds=9).trouble
    nothing = run(folder, "toy", patched=True, select="fails_always", seconds=200)
    assert nothing.trouble == "no model was patched"
    assert "| toy | no model was patched |" in table({"toy": (Outcome(), nothing)})
