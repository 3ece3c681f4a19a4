"""Tests of what is on record, which counts what the pinned version of a package does."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

_PINS = (Path(__file__).parents[2] / "constraints.txt").read_text()


def on_record_with(package: str) -> pytest.MarkDecorator:
    """Skip where another version is installed than constraints.txt has."""
    pinned = re.findall(rf"^{package}==(\S+)$", _PINS, re.M)
    installed = version(package)
    return pytest.mark.skipif(
        [installed] != pinned,
        reason=f"on record is what {package} {' '.join(pinned)} keeps in memory, this is {installed}",
    )
