"""Any model without a file of its own: every linear is swapped by itself."""

from torch_int4.layouts.family import Family

FAMILY = Family()
