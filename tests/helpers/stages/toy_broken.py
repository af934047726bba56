"""Prepares, and fails half way."""


def prepare(model, options):
    model.module.model.layers[0].mlp.up_proj.weight.data.zero_()
    raise ZeroDivisionError("no such rotation")
