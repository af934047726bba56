"""Mixtral: attention as in Llama."""

import dataclasses

from . import llama

FAMILY = dataclasses.replace(llama.FAMILY, blocks=())
