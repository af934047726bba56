"""Measurements of int4 models: perplexity against float, tokens per second, weight bytes, and the demo.

Nothing in the library itself imports this package; its modules are imported one by one, when they are needed.
"""
