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


def source(project: str, release: str) -> Path:
    """The folder of that source distribution; the module that asks is skipped without it."""
    folder = FOLDER / f"{project}-{release}"
    if not folder.is_dir():
        reason = f"no source of {project} {release} in {FOLDER}: `make peers` fetches it"
        pytest.skip(reason, allow_module_level=True)
    return folder


def package(name: str, folder: Path) -> ModuleType:
    """`folder`, from which modules can from now on be imported as those of a package `name`."""
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = importlib.util.module_from_spec(spec)
    return sys.modules[name]


def import_tests(project: str, stand_ins: dict[str, dict[str, object]]) -> ModuleType:
    """The package of `project`'s tests, as `{project}_tests`; the module that asks is skipped without it.

    stand_ins   modules that the tests import and their source distribution lacks, with what is in them
    """
    folder = source(project, version(project)) / "tests"
    pytest.importorskip(
        "parameterized", reason="no parameterized, which the tests use: `make peers` fetches it"
    )
    name = f"{project}_tests"
    tests = package(name, folder)
    for path, contents in stand_ins.items():
        if (folder / path.replace(".", "/")).with_suffix(".py").exists():
            continue
        parent = name
        for part in path.split("."):
            parent += f".{part}"
            module = sys.modules.setdefault(parent, ModuleType(parent))
            module.__path__ = []
        vars(module).update(contents)
    return tests
