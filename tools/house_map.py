"""The map of CONTRIBUTING.md, made from the first line of each module: `python -m tools.house_map` writes it.

A package's line is the first line of its `__init__.py`. The map stands between `<!-- map -->` and
`<!-- end of map -->`; a test fails when it differs from the tree.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
# top-level folders in reading order; a folder with a text is one line and is not listed
FOLDERS = {
    "trm_kernels": None,
    "hybrid": None,
    "bench": None,
    "examples": "scripts to read and to change; nothing imports them",
    "tools": None,
    "native": "the recursion for C, which CMakeLists.txt builds; its README.md lists the files",
    "docs": "the pages of `make docs`; mkdocs.yml has their order",
    "tests": "see every floor; nothing imports them",
}
LISTED = ("examples",)  # listed below their text all the same
INDENT = 2
_MAP = re.compile(r"(<!-- map -->\n```text\n)(.*?)(```\n<!-- end of map -->)", re.S)


def first_line(path: Path) -> str:
    """The first line of the module's docstring without a closing full stop; "" where there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def house_map(root: Path = ROOT) -> str:
    """The map: one line per module and package, indented by its depth.

    Args:
        root: the folder that holds the top-level folders.

    Returns:
        Lines that end with a newline; names are padded to one column within a folder.
    """
    lines: list[str] = []
    for name, text in FOLDERS.items():
        folder = root / name
        lines.append(_line(0, f"{name}/", text if text is not None else _of_package(folder), len(name) + 1))
        if text is None or name in LISTED:
            lines += _listed(folder, depth=1)
    return "".join(f"{line}\n" for line in lines)


def rewritten(text: str, root: Path = ROOT) -> str:
    """`text` with its map made anew. Errors: ValueError unless it holds one map between its markers."""
    if len(_MAP.findall(text)) != 1:
        raise ValueError("house_map: expected one map between `<!-- map -->` and `<!-- end of map -->`.")
    return _MAP.sub(lambda found: f"{found[1]}{house_map(root)}{found[3]}", text)


def main() -> None:
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE.name} has the map of today")


def _listed(folder: Path, depth: int) -> Iterator[str]:
    """Modules first, then packages, each by name."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    packages = [path for path in sorted(folder.iterdir()) if path.is_dir() and any(path.glob("*.py"))]
    width = max((len(path.name) for path in modules), default=0)
    for path in modules:
        yield _line(depth, path.name, first_line(path), width)
    for path in packages:
        yield _line(depth, f"{path.name}/", _of_package(path), len(path.name) + 1)
        yield from _listed(path, depth + 1)


def _of_package(folder: Path) -> str:
    path = folder / "__init__.py"
    return first_line(path) if path.exists() else ""


def _line(depth: int, name: str, text: str, width: int) -> str:
    return f"{' ' * INDENT * depth}{name:<{width}}  {text}".rstrip()


if __name__ == "__main__":
    main()
