"""Calibration: the data, what blocks are called with, the pass over a model, and resuming it."""
