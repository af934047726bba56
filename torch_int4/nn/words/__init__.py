"""Warnings to those whose use of a patched model is slower, or does less, than they may think."""
