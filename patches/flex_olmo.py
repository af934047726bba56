"""FlexOLMo: as OLMo 2, with experts."""

import dataclasses

from torch_int4.patches import olmo2

LAYER = dataclasses.replace(olmo2.FAMILY.blocks[0], forwards=("9a00eb7104e99ad4", None, "9311026d404757ef"))

FAMILY = dataclasses.replace(olmo2.FAMILY, blocks=(LAYER,))
