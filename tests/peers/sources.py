"""Tests of other projects, out of the source distributions of the versions that are installed.

`make peers` fetches them into build/peers. Nothing of them is part of this project.
"""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "build" / "peers"


def import_tests(package: str, stand_ins: dict[str, dict[str, object]]) -> ModuleType:
    """The package of `package`'s tests, as `{package}_tests`; the module that asks is skipped without it.

    stand_ins   modules that the tests import and their source distribution lacks, with what is in them
    """
    found = version(package)
    folder = FOLDER / f"{package}-{found}" / "tests"
    if not folder.is_dir():
        pytest.skip(
            f"no source of {package} {found} in {FOLDER}: `make peers` fetches it", allow_module_level=True
        )
    pytest.importorskip(
        "parameterized", reason="no parameterized, which the tests use: `make peers` fetches it"
    )
    name = f"{package}_tests"
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    for path, contents in stand_ins.items():
        if (folder / path.replace(".", "/")).with_suffix(".py").exists():
            continue
        parent = name
        for part in path.split("."):
            parent += f".{part}"
            module = sys.modules.setdefault(parent, ModuleType(parent))
            module.__path__ = []
        vars(module).update(contents)
    return sys.modules[name]


def state_versions(*packages: str) -> str:
    """One line for a test report's head."""
    return "peers: " + ", ".join(f"{package} {version(package)}" for package in packages)
