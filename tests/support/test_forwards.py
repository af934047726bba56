"""Facts read from the source of a `forward`: fingerprints, the cache argument, arguments that somebody reads."""

import functools

import pytest
import torch
from torch import nn

from torch_int4.support.forwards import arguments_read, cache_argument, fingerprint, forward_arguments, tells_apart


def helper(x):
    return x + 1


def other_helper(x):
    return x + 2


class Plain(nn.Module):
    def forward(self, x: torch.Tensor, past_key_values=None, **kwargs) -> torch.Tensor:
        """Says something."""
        if past_key_values is not None:
            x = past_key_values.update(x, 3)  # comments do not count
        return self.inner(helper(x), past_key_values=past_key_values, **kwargs)


class Renamed(nn.Module):
    @torch.no_grad()
    def forward(self, x, cache=None, **kwargs):
        if cache is not None:
            x = cache.update(x, 3)
        return self.inner(helper(x), cache=cache, **kwargs)


class Differs(nn.Module):
    def forward(self, x, cache=None, **kwargs):
        if cache is not None:
            x = cache.update(x, 4)
        return self.inner(helper(x), cache=cache, **kwargs)


class HandsOnByAnotherName(nn.Module):
    def forward(self, x, cache=None, **kwargs):
        if cache is not None:
            x = cache.update(x, 3)
        return self.inner(helper(x), past_key_values=cache, **kwargs)


class CallsAnother(nn.Module):
    def forward(self, x, cache=None, **kwargs):
        if cache is not None:
            x = cache.update(x, 3)
        return self.inner(other_helper(x), cache=cache, **kwargs)


class HasTwo(nn.Module):
    def forward(self, x, cache=None, past_key_values=None):
        return past_key_values.update(x, cache)


def with_method(plus):
    if plus:

        class Module(nn.Module):
            def step(self, x):
                return x + 1

            def forward(self, x):
                return self.step(x)
    else:

        class Module(nn.Module):
            def step(self, x):
                return x - 1

            def forward(self, x):
                return self.step(x)

    return Module


def test_a_fingerprint_is_that_of_a_computation():
    assert fingerprint(Plain) == fingerprint(Renamed)  # annotations, comments, decorators, the name of the cache
    others = [fingerprint(kind) for kind in (Differs, HandsOnByAnotherName, CallsAnother, HasTwo)]
    assert len({fingerprint(Plain), *others}) == 5
    assert fingerprint(with_method(plus=True)) != fingerprint(with_method(plus=False))
    assert fingerprint(type("Made", (nn.Module,), {"forward": eval("lambda self, x: x")})) == ""


def test_a_function_of_the_file_counts_as_its_caller_does(monkeypatch):
    before = fingerprint(Renamed)
    fingerprint.cache_clear()
    monkeypatch.setitem(globals(), "helper", other_helper)
    assert fingerprint(Renamed) != before
    fingerprint.cache_clear()


def test_fingerprints_do_not_depend_on_the_version_of_python():
    class Module(nn.Module):
        def forward(self, x, y):
            (a, b), c = y  # `ast.unparse` of Python 3.10 writes more parentheses here
            for i, j in c:
                x = x[..., i:, None] + f"{j!r}"
            return (*a, b)

    assert fingerprint(Module) == "a8a45176a78272db"


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Plain, "past_key_values"), (Renamed, "cache"), (HasTwo, None), (nn.Linear, None)],
)
def test_the_argument_that_takes_the_cache(kind, name):
    assert cache_argument(kind) == name


def asks(x, scaling=None, **kwargs):
    if kwargs.get("softcap") is not None or kwargs["sinks"]:
        return x
    return None


def hands_to_a_cache(x, cache=None, **kwargs):
    return cache.update(x, kwargs=kwargs)


def hands_on(x, **kwargs):
    return asks(x, **kwargs)


def looks_at_all(x, **kwargs):
    return sum(kwargs.values())


def renames(old, new):
    def decorate(function):
        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def test_arguments_that_a_function_reads():
    assert {"x", "scaling", "softcap", "sinks"} <= arguments_read(asks)
    assert "tokenizer" not in arguments_read(asks)
    assert "cache" in arguments_read(hands_to_a_cache)
    assert arguments_read(hands_on) is None  # who knows
    assert arguments_read(looks_at_all) is None
    assert arguments_read(len) is None
    assert {"before", "scaling"} <= arguments_read(renames("before", "scaling")(asks))


def test_arguments_that_a_forward_reads_or_names():
    assert {"x", "past_key_values"} <= forward_arguments(Plain)
    assert "cache" not in forward_arguments(Plain)
    assert {"cache", "past_key_values"} <= forward_arguments(HandsOnByAnotherName)


class Config:
    _attn_implementation = "sdpa"


class AsksForBoth(nn.Module):
    config = Config()

    def forward(self, x):
        return x.sum() if self.config._attn_implementation in ("eager", "sdpa") else x


class AsksForEager(nn.Module):
    config = Config()

    def forward(self, x):
        return self.helped(x)

    def helped(self, x):
        plain = self.config._attn_implementation == "eager"
        return x if plain else x.sum()


class Inherits(AsksForBoth):
    def forward(self, x):
        return super().forward(x)


class Looks(nn.Module):
    config = Config()

    def forward(self, x, functions):
        return functions.get(self.config._attn_implementation)(x)


@pytest.mark.parametrize(
    ("kind", "from_sdpa", "from_eager"),
    [
        (AsksForBoth, True, True),
        (Inherits, True, True),
        (AsksForEager, False, True),
        (Looks, False, False),
        (Plain, False, False),
    ],
)
def test_classes_that_ask_for_the_name_of_their_attention(kind, from_sdpa, from_eager):
    assert tells_apart(kind, "sdpa", "another") is from_sdpa
    assert tells_apart(kind, "eager", "another") is from_eager
    assert not tells_apart(kind, "another", "another")
