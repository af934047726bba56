"""Fake kernels of operators from rules: what comes out of an operator, by the arguments that decide it.

A rule names only those arguments. Their places and defaults are the schema's, which csrc/ alone spells.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from torch_int4 import _C  # noqa: F401  (registers the operators)

Rule = TypeVar("Rule", bound=Callable[..., Any])


def fake(operator: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of `torch.ops.torch_int4.<operator>`.

    Its parameters are called as arguments of the operator are, and it returns empty tensors of the shapes and types
    that the operator returns. A parameter with a default takes that in place of the schema's.

    Raises:
        ValueError: the operator has no argument of that name.
    """
    schema = getattr(torch.ops.torch_int4, operator).default._schema
    given = {argument.name: (place, argument) for place, argument in enumerate(schema.arguments)}

    def register(rule: Rule) -> Rule:
        wanted = []
        for name, parameter in inspect.signature(rule).parameters.items():
            if name not in given:
                raise ValueError(f"torch_int4::{operator} has no argument {name}")
            place, argument = given[name]
            own = parameter.default
            wanted.append((name, place, argument.default_value if own is inspect.Parameter.empty else own))

        def kernel(*args: Any, **kwargs: Any) -> Any:
            values = [args[at] if at < len(args) else kwargs.get(name, default) for name, at, default in wanted]
            return rule(*values)

        torch.library.register_fake(f"torch_int4::{operator}", kernel)
        return rule

    return register
