"""The direct way of a GGUF file into a model: blocks stay blocks, and no weight is ever expanded as a whole.

transformers' own loader expands every tensor to float32 before it builds the model, which takes several times the
memory of the file. Here linears, those of experts too, read their blocks when `patch` packs them, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_int4.config import Int4Config
from torch_int4.errors import Int4Error
from torch_int4.formats.gguf import BLOCKS, GgufBlocks, dense
from torch_int4.formats.parts.gguf_file import GgufFile, GgufTensor
from torch_int4.hf.gguf_facts import Facts, facts_of
from torch_int4.nn.experts import LinearExperts
from torch_int4.patching import experts as _experts

ROWS = 4096  # of a matrix, expanded at once
FLOATS = ("F16", "BF16", "F32")
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")


class NotServedError(Exception):
    """The direct way does not serve a file; the message says why."""


class Direct:
    """A model on the way from a file.

    Args:
        file: opened.
        facts: about it.
        dtype: of the parameters.
    """

    def __init__(self, file: GgufFile, facts: Facts, dtype: torch.dtype) -> None:
        self.file, self.facts, self.dtype = file, facts, dtype

    def build(self, model_class: Any) -> nn.Module:
        """The model without values; buffers have theirs."""
        import transformers
        from accelerate import init_empty_weights

        config = self.facts.config
        config.name_or_path = str(self.file.path.parent)
        kind = model_class or transformers.AutoModelForCausalLM
        make = getattr(kind, "from_config", None) or kind._from_config  # of Auto classes, and of others
        with init_empty_weights(include_buffers=False):
            model: nn.Module = make(config, dtype=self.dtype)
        return model.eval()

    def fill(self, model: Any, *, head: bool) -> tuple[list[str], list[str]]:
        """Give a model its values, and blocks to the linears whose types kernels have.

        Args:
            model: as `build` made it.
            head: whether the projection onto the vocabulary takes blocks, too.

        Returns:
            The names of the linears that hold blocks, and of those whose tensors are floats.

        Raises:
            NotServedError: a tensor of the file has no place, or a parameter of the model no tensor.
        """
        names, taken, floats = self.facts.names(model), [], []
        _experts.split(model, Int4Config())
        experts = {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}
        output = model.get_output_embeddings()
        for name, entry in self.file.tensors.items():
            if self.facts.unused(name):
                continue
            if (match := EXPERTS.fullmatch(name)) is not None and len(entry.shape) == 3:
                taken += self._give_experts(model, experts, match, name, entry)
                continue
            target = names.get(name)
            if target is None:
                raise NotServedError(f"{name} has no place in {type(model).__name__}")
            place = target.rpartition(".")[0]
            module = model.get_submodule(place)
            made = self._blocks(name, entry, module) if module is not output or head else None
            if made is not None:
                _replace(model, place, made)
                taken.append(place)
            else:
                self._set(model, module, target, name, entry)
                if isinstance(module, nn.Linear) and module is not output and entry.kind in FLOATS:
                    floats.append(place)
        taken += self._tie(model, output, head=head)
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if empty:
            raise NotServedError(f"no tensor of the file holds {empty[0]}")
        return taken, floats

    def _give_experts(
        self, model: Any, experts: dict[str, Any], match: re.Match[str], name: str, entry: GgufTensor
    ) -> list[str]:
        """One tensor of all experts of a layer, given to their linears."""
        layer, linear = f".{match[1]}.", f"{match[2]}_proj"
        places = [place for place in experts if layer in f".{place}."]
        if len(places) != 1 or experts[places[0]].torch_int4_data.count != entry.shape[0]:
            raise NotServedError(f"{name} holds experts that {type(model).__name__} has not, or keeps in another form")
        taken = []
        for number in range(entry.shape[0]):
            place = f"{places[0]}.{number}.{linear}"
            module = model.get_submodule(place)
            part = GgufTensor(entry.kind, entry.shape[1:], entry.begin, entry.end)
            if part.shape != tuple(module.weight.shape):
                raise NotServedError(
                    f"{name} has experts of {list(part.shape)}, and {place} is {list(module.weight.shape)}"
                )
            read = partial(self.file.read, name, number)
            if part.kind in BLOCKS:
                _replace(model, place, GgufBlocks(read, part.kind, part.shape, module.bias).train(module.training))
                taken.append(place)
            else:
                values = dense(read(), part.kind, part.shape, name).to(self.dtype)
                module.weight = nn.Parameter(values, requires_grad=False)
        return taken

    def _blocks(self, name: str, entry: GgufTensor, module: nn.Module) -> GgufBlocks | None:
        if type(module) is not nn.Linear or entry.kind not in BLOCKS or entry.shape != tuple(module.weight.shape):
            return None
        order = self.facts.order(name, entry.shape[0])
        if order is None:
            return None
        read = _reader(self.file, name, order)
        return GgufBlocks(read, entry.kind, entry.shape, module.bias).train(module.training)

    def _set(self, model: Any, module: nn.Module, target: str, name: str, entry: GgufTensor) -> None:
        attribute = target.rpartition(".")[2]
        old = getattr(module, attribute, None)
        values = self._values(name, entry, _dtype_of(model, target, self.dtype))
        if values is not None and isinstance(old, Tensor) and values.squeeze().shape == old.squeeze().shape:
            values = values.view(old.shape)  # a row of a gate may be a vector there
        if not isinstance(old, Tensor) or values is None or values.shape != old.shape:
            raise NotServedError(f"{name} of {list(entry.shape)} does not fit {target}")
        if isinstance(old, nn.Parameter):
            setattr(module, attribute, nn.Parameter(values, requires_grad=True))
        else:
            module._buffers[attribute] = values

    def _values(self, name: str, entry: GgufTensor, dtype: torch.dtype) -> Tensor | None:
        """The values of a tensor as the model has them, made of a few rows at a time where it is a matrix."""
        order = self.facts.order(name, entry.shape[0]) if len(entry.shape) == 2 else None
        if order is None:
            values = self.facts.values(name, dense(self.file.read(name), entry.kind, entry.shape, name))
            return None if values is None else values.to(dtype)
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
) -> tuple[nn.Module, list[str], list[str]]:
    """A model with blocks in its linears; their names, and those of linears whose tensors are floats.

    Args:
        path: the file, as transformers reads its metadata.
        file: the same, opened.
        dtype: of everything but blocks.
        model_class: class of the model; transformers' `AutoModelForCausalLM` where None.
        head: whether the projection onto the vocabulary takes blocks, too.

    Raises:
        NotServedError: saying why.
        Int4Error: the file is damaged, or says of its model what nothing here computes.
    """
    try:
        way = Direct(file, facts_of(path, file), dtype)
        model = way.build(model_class)
        return model, *way.fill(model, head=head)
    except Int4Error:
        raise
    except (AttributeError, ImportError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        # another version of transformers, or what it does not know: its own loader says what is wrong
        raise NotServedError(str(error)) from error


def _reader(file: GgufFile, name: str, order: Tensor) -> Callable[[], Tensor]:
    """Reads the rows of a matrix in the model's order."""
    plain = torch.equal(order, torch.arange(len(order)))

    def read() -> Tensor:
        raw = file.read(name)
        return raw if plain else raw[order]

    return read


def _replace(model: nn.Module, place: str, made: nn.Module) -> None:
    parent, _, attribute = place.rpartition(".")
    setattr(model.get_submodule(parent), attribute, made)


def _dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """What the class of the model keeps in float32 stays so."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    return dtype if kept.isdisjoint(name.split(".")) else torch.float32
