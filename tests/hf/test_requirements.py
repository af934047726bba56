"""The versions of transformers that are tested are the ends of the range that is required."""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def of_transformers(lines):
    """The requirement that holds for this Python."""
    requirements = [Requirement(line.partition(" #")[0]) for line in lines if line.startswith("transformers")]
    (found,) = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    return found.specifier


def pinned(lines):
    (specifier,) = of_transformers(lines)
    assert specifier.operator == "=="
    return specifier.version


def test_the_oldest_and_the_newest_transformers_are_pinned():
    required = of_transformers(PROJECT["project"]["dependencies"])
    (floor,) = [each.version for each in required if each.operator == ">="]
    oldest = pinned(PROJECT["dependency-groups"]["oldest"])
    newest = pinned((ROOT / "constraints.txt").read_text().splitlines())
    assert oldest in (floor, f"{floor}.0")
    assert newest in required
    assert oldest != newest
