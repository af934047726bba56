import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_int4.support.weight_reads import weights_read


class Base(nn.Module):
    slices = 1

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.part = nn.ModuleDict({"inner": nn.Linear(4, 4)})
        self.layers = nn.ModuleList(nn.ModuleDict({"c": nn.Linear(4, 4)}) for _ in range(2))

    def helper(self, x):
        return F.linear(x, self.b.weight)

    def never(self, x):
        return self.b.weight


class Direct(Base):
    def forward(self, x):
        return self.b(x) @ self.a.weight


class InAMethod(Base):
    def forward(self, x):
        return self.helper(self.a(x))


class OfTheParent(InAMethod):
    def forward(self, x):
        return super().forward(x)


class Deep(Base):
    def forward(self, x):
        return self.a(x).to(self.part.inner.weight.dtype)


class ByVariable(Base):
    def forward(self, x):
        linear = self.a
        return F.linear(x, linear.weight)


class InALoop(Base):
    def forward(self, x):
        for _, layer in enumerate(self.layers):
            x = F.linear(x, layer.c.weight)
        return x


class Sliced(Base):
    def forward(self, x):
        if self.slices > 1 and self.a.weight.shape[0]:
            return F.linear(x, self.b.weight)
        return self.a(x) if not self.slices > 1 else F.linear(x, self.a.weight)


class Guarded(Base):
    def forward(self, x):
        if isinstance(self.a.weight, torch.Tensor) and x.dtype != self.a.weight.dtype:
            x = x.to(self.a.weight.dtype)
        if self.training:
            return F.linear(x, self.b.weight)
        if self.a.weight is not None and self.a.weight.numel():
            x = x + 1
        return self.a(x)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Direct, {"a"}),
        (InAMethod, {"b"}),
        (OfTheParent, {"b"}),
        (Deep, {"part.inner"}),
        (ByVariable, {"a"}),
        (InALoop, {"layers.0.c", "layers.1.c"}),
        (Base, set()),
    ],
)
def test_reads_are_found(kind, names):
    module = kind()
    assert {id(each) for each in weights_read(module)} == {id(module.get_submodule(name)) for name in names}


def test_branches_that_are_never_taken_do_not_count():
    module = Sliced()
    assert not weights_read(module)
    module.slices = 2
    assert {id(each) for each in weights_read(module)} == {id(module.a), id(module.b)}


def test_a_weight_that_is_only_read_where_it_is_a_tensor_does_not_count():
    assert not weights_read(Guarded())
