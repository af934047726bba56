"""Measurements of int4 models: `accuracy`, `speed`, the `bench` against peers, the `report`, and the demo.

Nothing in the library itself imports this package; its modules are imported one by one, when they are needed. The
folder `tables` of the repository, which only documentation needs, is not installed.
"""
