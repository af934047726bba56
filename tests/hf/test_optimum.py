"""`optimum-cli torch-int4 quantize`, through optimum's own discovery of commands."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import llama, logits

import torch_int4

PLUGIN = Path(__file__).parents[2] / "plugins" / "optimum"
FULL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def test_the_package_itself_brings_no_folder_named_optimum():
    """Or transformers would take optimum for installed."""
    root = Path(torch_int4.__file__).parents[1]
    owned = root / "optimum" / "commands" / "register" / "register_torch_int4.py"
    assert not owned.exists()
    files = [path.relative_to(PLUGIN).as_posix() for path in PLUGIN.rglob("*.py")]
    assert files == ["optimum/commands/register/register_torch_int4.py"]  # no __init__.py: it is a namespace


@pytest.fixture
def cli(monkeypatch):
    pytest.importorskip("optimum.commands", reason="needs optimum: pip install optimum")
    monkeypatch.syspath_prepend(str(PLUGIN))
    importlib.invalidate_caches()
    from optimum.commands import optimum_cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, args)])
        optimum_cli.main()

    return run


def test_quantize(cli, tmp_path, capsys):
    llama(tied=False, **FULL).save_pretrained(tmp_path / "m")
    folders = ("-m", tmp_path / "m", "-o", tmp_path / "out")
    with pytest.warns(UserWarning, match="no tokenizer"):
        cli("torch-int4", "quantize", *folders, "--head", "int4", "--asymmetric")
    assert "int4: 15 linears" in capsys.readouterr().out
    want = torch_int4.from_pretrained(tmp_path / "m", head="int4", symmetric=False)
    assert torch.equal(logits(torch_int4.from_pretrained(tmp_path / "out")), logits(want))


def test_errors_are_one_line(cli, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        cli("torch-int4", "quantize", "-m", tmp_path / "nowhere", "-o", tmp_path / "out")
    with pytest.raises(SystemExit):
        cli("torch-int4", "quantize", "--help")


def test_the_module_of_commands_is_not_imported_by_the_package():
    code = "import sys, torch_int4; sys.exit('torch_int4.hf.optimum_cli' in sys.modules or 'optimum' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=300).returncode == 0
