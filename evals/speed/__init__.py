"""The gains of int4: tokens per second of `generate`, bytes of weights, and the time and memory of loading."""
