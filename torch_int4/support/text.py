"""English text that every Python installation has, for measurements and calibration without any download.

The prose comes from the language reference inside the standard library (``pydoc_data.topics``, what
``help("objects")`` prints). It differs a little between Python versions: compare figures within one version.
"""

from __future__ import annotations

import re
import unicodedata

from torch_int4.errors import Int4Error

# Long topics of running prose that do not repeat each other; the rest follows in alphabetical order.
_FIRST = ("objects", "execmodel", "import", "types", "compound", "specialnames")
_ASIDE = (" ", "*", "+", "|", "[")  # how code, lists and tables begin
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "..."})


def builtin_text(characters: int | None = 16_000) -> str:
    """Exactly the first `characters` characters of the built-in prose, or all of it: ASCII, one paragraph a line.

    Raises:
        Int4Error: if this Python was installed without ``pydoc_data``, or has less prose than asked for.
    """
    text = "\n".join(_paragraphs())
    if characters is None:
        return text
    if not 0 < characters <= len(text):
        raise Int4Error(f"built-in text: {characters} characters wanted, there are {len(text)}; use a text file")
    return text[:characters]


def _paragraphs() -> list[str]:
    """Paragraphs, each once, in a fixed order: running prose, then what also is sentences, as items of lists are."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Int4Error("built-in text: this Python has no pydoc_data; use a text file") from error
    names = [name for name in _FIRST if name in topics]
    names += sorted(set(topics) - set(names))
    blocks = [block.strip("\n") for name in names for block in topics[name].split("\n\n")]
    sentences = [block for block in blocks if block.endswith(".") and "::=" not in block]
    running = (line for block in sentences if not block.startswith(_ASIDE) and len(line := _line(block)) >= 160)
    others = (line for block in sentences if len(line := _line(block)) >= 120)
    return list(dict.fromkeys([*running, *others]))


def _line(block: str) -> str:
    """The block as one line of ASCII."""
    line = re.sub(r"\s+", " ", block.translate(_ASCII)).strip().replace("**", "")
    line = line.replace("'\"", '"').replace("\"'", '"')  # code is quoted twice in some Python versions
    return unicodedata.normalize("NFKD", line).encode("ascii", "ignore").decode()
