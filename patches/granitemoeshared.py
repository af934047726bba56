"""Granite 3 with experts and one that all tokens share: attention as in Granite. The layers stay stock."""

import dataclasses

from torch_int4.patches import granite

FAMILY = dataclasses.replace(granite.FAMILY, blocks=())
