"""Linears as HQQ keeps them, built value by value."""

import torch


def hqq(rows, inputs, size=64, bits=4, axis=1, seed=0):
    """The tensors of a linear, and its float weight in fp64."""
    g = torch.Generator().manual_seed(seed)
    groups = rows * inputs // size
    shape = (groups, size) if axis == 1 else (size, groups)
    codes = torch.randint(0, 1 << bits, shape, generator=g, dtype=torch.uint8)
    per_group = (groups, 1) if axis == 1 else (1, groups)
    scale, zero = torch.rand(per_group, generator=g) + 0.1, torch.rand(per_group, generator=g) * 15
    half = shape[0] // 2
    packed = codes if bits == 8 else codes[:half] * 16 + codes[half:]
    dense = (codes.double() - zero.double()) * scale.double()
    return {"W_q": packed, "scale": scale, "zero": zero}, dense.view(rows, inputs)


def hqq_config(bits=4, size=64, axis=1, **fields):
    weights = {"nbits": bits, "group_size": size, "axis": axis, "channel_wise": True} | fields
    return {"quant_method": "hqq", "quant_config": {"weight_quant_params": weights}, "skip_modules": ["lm_head"]}
