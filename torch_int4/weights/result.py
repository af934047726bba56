"""The result of rounding a linear: an int4 weight, and whatever the linear computes besides its product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from torch_int4.errors import Int4Error
from torch_int4.weights.canonical import Int4Weight


class Extra(nn.Module):
    """Something that a linear computes besides the product with its int4 weight W: y = leave(x, W·enter(x) + bias).

    A low-rank branch or a strip of float columns adds to y in `leave`; a rotation of the inputs is `enter`. Both have
    to be linear in x and y, because the linear stands for one dense matrix (`Int4Linear.dequantize`).

    A subclass names its tensors in `TENSORS`, and is made of them: `LowRank(a=a, b=b)`. They are all that an extra has:
    it is saved as those buffers, and made of them again when a model is loaded. It holds no modules.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        if set(tensors) != set(self.TENSORS):
            kind = type(self).__name__
            raise Int4Error(f"{kind} is made of {', '.join(self.TENSORS)}, not of {', '.join(tensors) or 'nothing'}")
        for name in self.TENSORS:
            self.register_buffer(name, tensors[name])

    def check(self, rows: int, inputs: int, name: str) -> None:
        """Raise Int4Error, naming `name`, unless the tensors are those of a linear with `rows` outputs."""
        raise NotImplementedError(f"{type(self).__name__}.check")

    def enter(self, x: Tensor) -> Tensor:
        """The int4 weight's input `[..., inputs]`, of the linear's input x, of the same shape and dtype."""
        return x

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """The linear's output `[..., rows]`, of x as `enter` got it and the product y, in the dtype of y."""
        return y

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: self.get_buffer(name) for name in self.TENSORS}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass
class Result:
    """The rounding of one linear.

    Attributes:
        weight: codes, scales and offsets.
        extras: what the linear computes besides, by the names under which stages declare it. Where there are several,
            they enter in alphabetical order, and leave in the opposite one.
    """

    weight: Int4Weight
    extras: dict[str, Extra] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Int4Weight | Result) -> Result:
        """A result as it is, a weight as a result without extras."""
        return found if isinstance(found, Result) else cls(found)

    def check(self, shape: Sequence[int], name: str) -> Result:
        """This result, if it is one of a linear of that shape, `(rows, inputs)`.

        Raises:
            Int4Error: naming `name`: the weight or an extra belongs to a linear of another size.
        """
        rows, inputs = shape
        if tuple(self.weight.codes.shape) != (rows, inputs):
            raise Int4Error(f"{name}: is [{rows}, {inputs}], but was rounded to {list(self.weight.codes.shape)}")
        for extra, part in self.extras.items():
            part.check(rows, inputs, f"{name}.extras.{extra}")
        return self
