"""Decoders with stock layers to compare with, and counts of layers that ran fused."""

import dataclasses

import torch
from decoders import Calls, family_of, pair

from torch_int4.patching import families

CLOSE = 2e-3


STEPS = ("norm_linears", "linear_add", "mlp")


OPERATORS = (*STEPS, "decoder_layer", "prepared_decoder_layers")


def unfused(name, **options):
    """A patched decoder whose layers are stock, with fused attention inside."""
    return pair(name, family=dataclasses.replace(families.resolve(family_of(name)), blocks=()), **options)[0]


def fused_layers(action):
    """What an action returns, and how many layers ran fused, as a whole or in steps."""
    with torch.no_grad(), Calls() as calls:
        result = action()
    counts = {calls.counts[name] for name in STEPS}
    assert len(counts) == 1
    return result, counts.pop() + calls.counts["decoder_layer"] + calls.prepared
