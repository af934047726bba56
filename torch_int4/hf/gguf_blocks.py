"""The direct way of a GGUF file into a model: blocks stay blocks, and no weight is ever expanded as a whole.

transformers' own loader expands every tensor to float32 before it builds the model, which takes several times the
memory of the file. Its names for the tensors, and what it does to their values, are used here one tensor at a time.
What it does to the rows of a matrix is found by giving it numbers of rows in their place: blocks are then put in that
order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_int4.formats.gguf import BLOCKS, GgufBlocks, dense
from torch_int4.formats.parts.gguf_file import GgufFile, GgufTensor

ROWS = 4096  # of a matrix, expanded at once


class Direct:
    """A model on the way from a file.

    Args:
        path: the file, as transformers reads its metadata.
        file: the same, as its tensors are read here.
        dtype: of the parameters.
    """

    def __init__(self, path: Path, file: GgufFile, dtype: torch.dtype) -> None:
        from transformers import modeling_gguf_pytorch_utils as gguf_loader

        self.file, self.dtype = file, dtype
        self._names: Callable[..., dict[str, str]] = gguf_loader.get_gguf_hf_weights_map
        self.settings = gguf_loader.load_gguf_checkpoint(str(path))["config"]
        kind = gguf_loader.TENSOR_PROCESSORS.get(file.metadata["general.architecture"], gguf_loader.TensorProcessor)
        self.processor = kind(config=self.settings)

    def build(self, model_class: Any) -> nn.Module:
        """The model without values; buffers have theirs."""
        import transformers
        from accelerate import init_empty_weights

        config = transformers.CONFIG_MAPPING[self.settings["model_type"]].from_dict(self.settings)
        config.name_or_path = str(self.file.path.parent)
        kind = model_class or transformers.AutoModelForCausalLM
        make = getattr(kind, "from_config", None) or kind._from_config  # of Auto classes, and of others
        with init_empty_weights(include_buffers=False):
            model: nn.Module = make(config, dtype=self.dtype)
        return model.eval()

    def fill(self, model: Any, *, head: bool) -> list[str] | None:
        """Give a model its values, and blocks to the linears whose types kernels have.

        Args:
            model: as `build` made it.
            head: whether the projection onto the vocabulary takes blocks, too.

        Returns:
            The names of the linears that hold blocks. None where the file or transformers has tensors of another kind
            than one matrix or vector for each parameter; the model is then of no use.
        """
        if any(len(entry.shape) > 2 for entry in self.file.tensors.values()):
            return None  # experts, convolutions
        names, taken = self._names_in(model), []
        output = model.get_output_embeddings()
        for name, entry in self.file.tensors.items():
            target = names.get(name)
            if target is None:
                continue
            place, _, attribute = target.rpartition(".")
            module = model.get_submodule(place)
            made = self._blocks(name, entry, module) if module is not output or head else None
            if made is not None:
                _replace(model, place, made)
                taken.append(place)
            elif not self._set(model, module, target, attribute, name, entry):
                return None
        taken += self._tie(model, output, head=head)
        if any(p.is_meta for p in model.parameters()):
            return None
        return taken

    def _names_in(self, model: Any) -> dict[str, str]:
        """The parameters of a model by the names of the file's tensors.

        transformers looks a model's names up again for each of its modules, as names in some files begin inside of it,
        and makes its table each time: seconds, where the names of the whole are enough.
        """
        whole = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
        names = self._names(whole, self.processor)
        unknown = [name for name in self.file.tensors if name not in names and not name.startswith("rope_freqs")]
        return self._names(model, self.processor) if unknown else names

    def _blocks(self, name: str, entry: GgufTensor, module: nn.Module) -> GgufBlocks | None:
        if type(module) is not nn.Linear or entry.kind not in BLOCKS or entry.shape != tuple(module.weight.shape):
            return None
        order = self._order(name, entry.shape[0])
        if order is None:
            return None
        raw = self.file.read(name)
        if not torch.equal(order, torch.arange(len(order))):
            raw = raw[order]
        return GgufBlocks(raw, entry.kind, entry.shape, module.bias).train(module.training)

    def _order(self, name: str, rows: int) -> Tensor | None:
        """int64 `[rows]`: row i of the model's matrix is row order[i] of the file's; None where it is none of them."""
        numbers = np.arange(rows, dtype=np.float32)[:, None]  # exact below 2^24
        result = self.processor.process(numbers, name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
        if result.name != name or result.weights.shape != (rows, 1) or rows >= 1 << 24:
            return None
        order = torch.from_numpy(np.ascontiguousarray(result.weights[:, 0])).long()
        return order if torch.equal(order.sort().values, torch.arange(rows)) else None

    def _set(self, model: Any, module: nn.Module, target: str, attribute: str, name: str, entry: GgufTensor) -> bool:
        old = getattr(module, attribute, None)
        if not isinstance(old, Tensor):
            return False
        values = self._values(name, entry, _dtype_of(model, target, self.dtype))
        if values is None or values.shape != old.shape:
            return False
        if isinstance(old, nn.Parameter):
            setattr(module, attribute, nn.Parameter(values, requires_grad=True))
        else:
            module._buffers[attribute] = values
        return True

    def _values(self, name: str, entry: GgufTensor, dtype: torch.dtype) -> Tensor | None:
        """The values of a tensor as the model has them, made of a few rows at a time where it is a matrix."""
        order = self._order(name, entry.shape[0]) if len(entry.shape) == 2 else None
        if order is None:
            values = dense(self.file.read(name), entry.kind, entry.shape, name)
            result = self.processor.process(
                values.numpy(), name, tensor_key_mapping={}, parsed_parameters={"tensors": {}}
            )
            return None if result.name != name else torch.from_numpy(np.ascontiguousarray(result.weights)).to(dtype)
        raw = self.file.read(name)
        made = torch.empty(entry.shape, dtype=dtype)
        for begin in range(0, entry.shape[0], ROWS):
            rows = order[begin : begin + ROWS]
            made[begin : begin + ROWS] = dense(raw[rows], entry.kind, (len(rows), entry.shape[1]), name)
        return made

    def _tie(self, model: Any, output: Any, *, head: bool) -> list[str]:
        """Ties what the config says is tied; a head without a tensor of its own takes the blocks of the embedding's."""
        model.tie_weights()
        embedding = self.file.tensors.get("token_embd.weight")
        places = [name for name, module in model.named_modules() if module is output]
        if "output.weight" in self.file.tensors or embedding is None or not head or not places:
            return []
        made = self._blocks("token_embd.weight", embedding, output)
        if made is None:
            return []
        _replace(model, places[0], made)
        return places[:1]


def load_direct(
    path: Path, file: GgufFile, dtype: torch.dtype, model_class: Any, *, head: bool
) -> tuple[nn.Module, list[str]] | None:
    """A model with blocks in its linears, and their names; None where the direct way does not serve the file.

    Args:
        path: the file, as transformers reads its metadata.
        file: the same, opened.
        dtype: of everything but blocks.
        model_class: class of the model; transformers' `AutoModelForCausalLM` where None.
        head: whether the projection onto the vocabulary takes blocks, too.
    """
    try:
        way = Direct(path, file, dtype)
        model = way.build(model_class)
        taken = way.fill(model, head=head)
    except (AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError):
        return None  # another version of transformers, or what it does not know: its own loader says what is wrong
    return None if taken is None else (model, taken)


def _replace(model: nn.Module, place: str, made: nn.Module) -> None:
    parent, _, attribute = place.rpartition(".")
    setattr(model.get_submodule(parent), attribute, made)


def _dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """What the class of the model keeps in float32 stays so."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    return dtype if kept.isdisjoint(name.split(".")) else torch.float32
