"""Modules: int4 linears, fused attention, fused decoder layers, and the stack of them."""
