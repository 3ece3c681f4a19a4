"""Floors: a package imports only from the floors below it, and nothing imports the tests."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "trm_kernels": set(),
    "hybrid": {"trm_kernels"},
    "bench": {"trm_kernels", "hybrid"},
    "examples": {"trm_kernels", "hybrid"},
    "tools": set(),
}
EXAMPLES = {  # run with examples/ on the path: no package before the name
    path.stem
    for path in (ROOT / "examples").iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
}


def imported_packages(source: str) -> set[str]:
    """The top-level names a file imports, at its top or inside a function."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("floor", MAY_IMPORT)
def test_imports_point_down(floor):
    forbidden = {"tests", *MAY_IMPORT, *EXAMPLES} - {floor} - MAY_IMPORT[floor]
    if floor == "examples":
        forbidden -= EXAMPLES
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files, f"no Python file found in {floor}/"
    for path in files:
        wrong = imported_packages(path.read_text(encoding="utf-8")) & forbidden
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_every_way_to_import_is_seen():
    source = "import a.b as c\nfrom d.e import f\nfrom . import g\ndef h():\n    import i, j\n"
    assert imported_packages(source) == {"a", "d", "i", "j"}
