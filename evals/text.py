"""English text that every Python installation has, for measurements without any download.

The prose comes from the language reference inside the standard library (``pydoc_data.topics``, what
``help("objects")`` prints). It differs a little between Python versions: compare figures within one version.
"""

from __future__ import annotations

import re
import unicodedata

from torch_int4.errors import Int4Error

# Long topics of running prose that do not repeat each other; the rest follows in alphabetical order.
_FIRST = ("objects", "execmodel", "import", "types", "compound", "specialnames")
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "..."})


def builtin_text(characters: int = 16_000) -> str:
    """Exactly the first `characters` characters of the built-in prose: ASCII, one paragraph a line.

    Raises:
        Int4Error: if this Python was installed without ``pydoc_data``, or has less prose than asked for.
    """
    text = "\n".join(_paragraphs())
    if not 0 < characters <= len(text):
        raise Int4Error(f"built-in text: {characters} characters wanted, there are {len(text)}; use a text file")
    return text[:characters]


def _paragraphs() -> list[str]:
    """Paragraphs of running prose, each once, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Int4Error("built-in text: this Python has no pydoc_data; use a text file") from error
    names = [name for name in _FIRST if name in topics]
    names += sorted(set(topics) - set(names))
    found = (_clean(block) for name in names for block in topics[name].split("\n\n"))
    return list(dict.fromkeys(paragraph for paragraph in found if paragraph))


def _clean(block: str) -> str | None:
    """The block as one line, or None if it is a heading, code, a list item, grammar or a table."""
    block = block.strip("\n")
    if block.startswith((" ", "*", "+", "|", "[")) or "::=" in block or not block.endswith("."):
        return None
    line = re.sub(r"\s+", " ", block.translate(_ASCII)).replace("**", "")
    line = line.replace("'\"", '"').replace("\"'", '"')  # code is quoted twice in some Python versions
    line = unicodedata.normalize("NFKD", line).encode("ascii", "ignore").decode()
    return line if len(line) >= 160 else None
