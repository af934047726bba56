"""Rounds a block: the columns of its linears with the largest inputs stay in float, in a strip beside the weight.

In half of the linears a permutation of the inputs comes before both.
"""

import torch

from torch_int4 import Int4Error
from torch_int4.recipes import rtn
from torch_int4.weights.result import Extra, Result

NEEDS_INPUTS = True
COLUMNS = 4


class Strip(Extra):
    TENSORS = ("columns", "weight")

    def check(self, rows, inputs, name):
        if self.weight.shape != (rows, COLUMNS) or self.columns.max() >= inputs:
            raise Int4Error(f"{name}: no strip of {COLUMNS} columns")

    def leave(self, x, y):
        return y + (x[..., self.columns].float() @ self.weight.t()).to(y.dtype)


class Order(Extra):
    TENSORS = ("order",)

    def check(self, rows, inputs, name):
        if self.order.shape != (inputs,):
            raise Int4Error(f"{name}: no order of {inputs} inputs")

    def enter(self, x):
        return x[..., self.order]


EXTRAS = {"a_order": Order, "strip": Strip}  # in the alphabet's order, so that the strip reads ordered inputs


def round(block, options):
    return {linear.name: _round(linear, number, options) for number, linear in enumerate(block.linears)}


def _round(linear, number, options):
    weight, largest, extras = linear.weight.clone(), linear.inputs.abs_max, {}
    if number % 2:
        order = torch.arange(weight.shape[1]).flip(0)
        weight, largest, extras["a_order"] = weight[:, order], largest[order], Order(order=order)
    columns = largest.topk(COLUMNS).indices
    extras["strip"] = Strip(columns=columns, weight=weight[:, columns].contiguous())
    weight[:, columns] = 0
    return Result(rtn.quantize(weight, options, name=linear.name), extras)
