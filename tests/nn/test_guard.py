"""Guards of fused modules, and the comparisons of Python objects in the extension."""

import pytest
import torch
from torch import nn

from torch_int4 import _C
from torch_int4.nn.guard import Guard


def test_guards_see_hooks_that_come_and_go():
    modules, model, x = [nn.Identity(), nn.Identity()], nn.Linear(1, 1), torch.ones(2)
    guard = Guard(torch.float32, modules)
    with torch.no_grad():
        for _ in range(2):
            assert guard.holds(x)
            handle = modules[1].register_forward_pre_hook(lambda module, args: None)
            assert not guard.holds(x)
            model.register_forward_hook(lambda module, args, output: None)  # another one, of no concern
            assert not guard.holds(x)
            handle.remove()
            assert guard.holds(x)
        other = Guard(torch.float32, [model])
        guard.include(other)
        assert not guard.holds(x)


class Equal:
    """Equal to everything, and the same as nothing."""

    __hash__ = None

    def __eq__(self, other):
        return True


def test_entries_are_compared_by_identity():
    value, other = Equal(), Equal()
    dicts, keys = [{"a": value}, {}, {"a": None}], ["a", "a", "a"]
    assert _C.entries_are(dicts, keys, [value, None, None])  # what is missing is None
    assert not _C.entries_are(dicts, keys, [other, None, None])
    assert not _C.entries_are(dicts, keys, [value, value, None])
    assert not _C.entries_are(dicts, ["b", "a", "a"], [value, None, None])
    assert _C.entries_are([], [], [])
    assert _C.contents_are([])
    assert _C.contents_are([dicts[0], "a", value, {}, dicts[2], "a", None])
    assert not _C.contents_are([dicts[0], "a", other])
    assert not _C.contents_are([dicts[0], "b", value])
    assert not _C.contents_are([dicts[0]])
    assert not _C.contents_are([{}, "a", value])
    assert not _C.contents_are([{"a": value, "b": other}, "b", other, "a", value])
    assert not _C.contents_are([dicts[0], "a"])
    assert not _C.contents_are([{"a": value, "b": other}, "a", value, {}])  # more, and the next one begins
    assert not _C.contents_are([{}, "a", value, {"a": value}])  # less: all of it has moved on
    assert _C.types_are([1, value], [int, Equal])
    assert not _C.types_are([True, value], [int, Equal])  # a subclass is another type
    float_, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert _C.attributes_are([float_, float_], "dtype", torch.float32)
    assert not _C.attributes_are([float_, double], "dtype", torch.float32)


@pytest.mark.parametrize(
    ("function", "arguments", "error"),
    [
        (_C.entries_are, ([{}], ["a"], []), TypeError),
        (_C.entries_are, ({}, [], []), TypeError),
        (_C.entries_are, ([1], ["a"], [None]), TypeError),
        (_C.entries_are, ([{}], [[]], [None]), TypeError),  # a key that cannot be one
        (_C.entries_are, ([], []), TypeError),
        (_C.contents_are, ({},), TypeError),
        (_C.types_are, ([1], [int, int]), TypeError),
        (_C.types_are, ((), []), TypeError),
        (_C.attributes_are, ((), "dtype", None), TypeError),
        (_C.attributes_are, ([1], "dtype", None), AttributeError),
    ],
)
def test_bad_arguments_of_the_extension(function, arguments, error):
    with pytest.raises(error):
        function(*arguments)
