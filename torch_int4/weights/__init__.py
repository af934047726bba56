"""Quantized weights: the canonical form, the packed form, and files of packed weights."""
