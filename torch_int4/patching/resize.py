"""`resize_token_embeddings` of patched models: the head grows or shrinks with the table, in its own type."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from torch_int4.config import WeightOptions
from torch_int4.errors import Int4Error
from torch_int4.nn.extended import extras_of
from torch_int4.nn.linear import Int4Linear
from torch_int4.patching import hooks as _hooks
from torch_int4.recipes import rtn
from torch_int4.support.mixins import Mixin, mix_in
from torch_int4.weights.canonical import Int4Weight
from torch_int4.weights.packed import records_of

PER_ROW = ("codes", "scales", "zeros", "offsets")


class ResizesInt4(Mixin):
    """Mixed into models of transformers whose head is int4."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.resize_token_embeddings`; old rows of the head keep their codes, new ones are rounded.

        Raises:
            Int4Error: the head is of a kind that new rows cannot be rounded to. The model stays what it was, as it does
                after any other error.
        """
        model: Any = self
        resize: Any = super().resize_token_embeddings  # type: ignore[misc]
        head = model.get_output_embeddings()
        if not isinstance(head, Int4Linear) or (new_num_tokens is None and not args and not kwargs):
            return resize(new_num_tokens, *args, **kwargs)
        check_resizable(head)
        undo = _Before(model)
        try:
            model.set_output_embeddings(_dense(head))
            table = resize(new_num_tokens, *args, **kwargs)
            dense = model.get_output_embeddings()
            new = head if dense.out_features == head.out_features else resized(head, dense)
            model.set_output_embeddings(new)
        except BaseException:
            undo.restore()
            raise
        _write_report(model, head, new)
        return table


def make_resizable(model: nn.Module) -> None:
    """Let every model of transformers in `model` that has an int4 head be resized."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and isinstance(_head(module), Int4Linear):
            mix_in(ResizesInt4, module)


def check_resizable(head: Int4Linear) -> None:
    """Refuse a head that cannot get new rows.

    Raises:
        Int4Error: it has extras, a code book, or scales of two levels.
    """
    what = None
    if extras_of(head):
        what = f"extras ({', '.join(extras_of(head))})"
    elif head.packed_weight.type.book is not None:
        what = f"the code book {head.weight_type!r}"
    elif records_of(head.packed_scales) is not None:
        what = "scales of two levels"
    if what is not None:
        raise Int4Error(
            f"resize_token_embeddings: the head has {what}, for which new rows cannot be rounded; resize the float "
            "model before patch(), or patch it with head='float'"
        )


def resized(head: Int4Linear, dense: nn.Linear) -> Int4Linear:
    """A head with as many rows as a float one `[rows, in_features]`: its own, then the others rounded."""
    old, rows = head.to_weight(), dense.out_features
    if rows <= head.out_features:
        made = {name: _first(getattr(old, name), rows) for name in PER_ROW}
    else:
        added = requantize(dense.weight.detach()[head.out_features :].float(), head, name="new rows of the head")
        made = {name: _joined(getattr(old, name), getattr(added, name)) for name in PER_ROW}
    bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone(), dense.bias.requires_grad)
    weight = dataclasses.replace(old, **made)
    new = Int4Linear(weight, bias, compute=head.compute, dtype=head.compute_dtype)
    _hooks.replace(head, new, ())
    return new


def requantize(dense: torch.Tensor, like: Int4Linear, *, name: str = "weight") -> Int4Weight:
    """`[rows, in_features]` floats to the nearest points of grids like those that a linear has.

    Raises:
        Int4Error: naming `name`: the linear has a code book or scales of two levels without offsets, or values are not
            finite.
    """
    kind = like.packed_weight.type
    if kind.book is not None:
        raise Int4Error(f"{name}: there is no rounding to the code book {like.weight_type!r}; leave it unmerged")
    records = records_of(like.packed_scales)
    if records is not None and not records.has_offsets:
        raise Int4Error(f"{name}: there is no rounding to scales of two levels without offsets; leave it unmerged")
    offsets = like.packed_weight.offset_kind
    options = WeightOptions(group_size=like.group_size, symmetric=offsets is None, zeros=offsets or "integer")
    ordered = dense if like.perm is None else dense[:, like.perm]
    result = rtn.quantize(ordered, options, bits=kind.bits, name=name)
    result.perm = like.perm
    return result


class _Before:
    """A model as it was: its table, its head and the size of its vocabulary."""

    def __init__(self, model: Any) -> None:
        self.model, self.head, self.table = model, model.get_output_embeddings(), model.get_input_embeddings()
        self.state = dict(vars(self.table))
        self.tensors = {**self.table._parameters}, {**self.table._buffers}
        self.values = {
            name: tensor.data for group in self.tensors for name, tensor in group.items() if tensor is not None
        }
        self.config = model.config.get_text_config()
        self.sizes = self.config.vocab_size, getattr(model, "vocab_size", None)

    def restore(self) -> None:
        vars(self.table).update(self.state)
        for held, before in zip((self.table._parameters, self.table._buffers), self.tensors, strict=True):
            held.update(before)
            for name, tensor in before.items():
                if tensor is not None:
                    tensor.data = self.values[name]
        self.model.set_input_embeddings(self.table)
        self.model.set_output_embeddings(self.head)
        self.config.vocab_size = self.sizes[0]
        if self.sizes[1] is not None:
            self.model.vocab_size = self.sizes[1]


def _head(model: Any) -> nn.Module | None:
    try:
        found: nn.Module | None = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _dense(head: Int4Linear) -> nn.Linear:
    """A float linear of the same values."""
    made = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    made.weight = nn.Parameter(head.dequantize(head.compute_dtype), requires_grad=False)
    made.bias = None if head.bias is None else nn.Parameter(head.bias.detach().clone(), head.bias.requires_grad)
    return made.train(head.training)


def _first(tensor: Any, rows: int) -> Any:
    return None if tensor is None else tensor[:rows]


def _joined(old: Any, new: Any) -> Any:
    return None if old is None else torch.cat((old, new))


def _write_report(model: nn.Module, old: Int4Linear, new: Int4Linear) -> None:
    report: Any = getattr(model, "torch_int4_report", None)
    names = [name for name, module in model.named_modules() if module is new]
    for place, entry in enumerate(report.linears if report is not None else ()):
        if entry.name in names and new is not old:
            rows, each = new.out_features, entry.bytes_before // entry.out_features
            report.linears[place] = dataclasses.replace(
                entry, out_features=rows, bytes_before=rows * each, bytes_after=new.nbytes
            )
