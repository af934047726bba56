"""Decoders with stock layers to compare with, and counts of layers that ran fused."""

import dataclasses
from collections import Counter
from unittest import mock

import torch
from decoders import Calls, family_of, pair

from torch_int4.nn.layer import FusedBlock
from torch_int4.nn.layer_steps import LayerSteps
from torch_int4.patching import families

CLOSE = 2e-3


# Operators of a layer in steps, each called once where norms are before attention and the MLP alone.
STEPS = ("norm_linears", "linear_add", "mlp")


OPERATORS = (*STEPS, "decoder_layer", "prepared_decoder_layers")


# Models that are whole, while others of their families are not.
WHOLE = ("biogpt", "gpt_bigcode-mha", "jamba", "opt-gelu", "stablelm", "stablelm-parallel", "xglm")


def blocks_of(model):
    """The fused layers of a model."""
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def calls_of(model, whole=False):
    """How often the layers of a model call each operator, all in steps, or those as a whole that can."""
    counts = Counter()
    for block in blocks_of(model):
        one = whole and _is_whole(block.torch_int4_data.layout, block)
        counts += Counter(prepared_decoder_layers=1) if one else _in_steps(block)
    return counts


def _is_whole(layout, block):
    attention = getattr(block, layout.attention).torch_int4_data.layout
    norms = [getattr(getattr(block, layout.attention), name) for name in attention.norms or ()]
    each = not attention.norms_all_heads and all(norm._parameters.keys() == {"weight"} for norm in norms)
    each = each and all(norm.weight.dim() == 1 for norm in norms)
    return layout.is_plain and attention.is_plain and each


def _in_steps(block):
    layout = block.torch_int4_data.layout
    apart = layout.attention_norm is not None or layout.residual_scale is not None  # what is added is changed before
    counts = Counter(rotary_append=1, attention=1)
    counts["norm_linears" if layout.input_norm else "int4_linears"] += 1
    counts["int4_linear" if apart else "linear_add"] += 1
    counts["normalize"] += 2 * (layout.attention_norm is not None)
    if layout.calls_mlp:
        counts["normalize"] += layout.post_norm is not None or layout.input_norm is not None
        with torch.no_grad(), Calls() as inside:
            for name in filter(None, (layout.mlp, layout.beside_mlp)):
                getattr(block, name)(torch.randn(2, 12, 64))
        counts += inside.counts
    elif layout.up is None or layout.calls_activation:
        counts["norm_linears"] += 1
        counts["int4_linear" if apart else "linear_add"] += 1
    else:
        counts["mlp"] += 1
    return +counts


def is_whole(name):
    """Whether one operator runs such layers, with our cache."""
    if name in ("cohere-norms", "phi-norms", "stablelm-norms"):  # whose norms have weights for every head, or biases
        return False
    if name in WHOLE:
        return True
    family = families.resolve(family_of(name))
    plain = all(layout.is_plain for layout in family.blocks)
    return plain and all(layout.is_plain and not layout.norms_all_heads for layout in family.attentions)


def unfused(name, **options):
    """A patched decoder whose layers are stock, with fused attention inside."""
    return pair(name, family=dataclasses.replace(families.resolve(family_of(name)), blocks=()), **options)[0]


def fused_layers(action):
    """What an action returns, and how many layers ran fused, as a whole or in steps."""
    ran = []

    def run(steps, x, kwargs):
        with Calls() as inside:
            output = stock(steps, x, kwargs)
        assert {"rotary_append", "attention"} <= inside.counts.keys()
        ran.append(inside.counts)
        return output

    stock = LayerSteps.run
    with torch.no_grad(), Calls() as calls, mock.patch.object(LayerSteps, "run", run):
        result = action()
    assert all(calls.counts[name] == sum(counts[name] for counts in ran) for name in STEPS)  # nothing else calls them
    return result, len(ran) + calls.counts["decoder_layer"] + calls.prepared
