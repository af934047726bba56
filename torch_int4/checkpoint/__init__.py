"""Saving patched models, and what a saved model says of itself."""
