"""Any model without a file of its own: every linear is swapped by itself."""

from .families import Family

FAMILY = Family()
