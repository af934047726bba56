"""What int4 brings: tokens per second of `generate`, bytes of weights, and the time and memory of loading."""
