"""The hooks of mkdocs.yml: links that leave docs/, pages of decisions, public names without documentation.

A page may link to a file of the repository outside of docs/. Readers of the files follow that link. The site
holds no such file, so there the link becomes the file's name. A link to a missing file fails the build.
"""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("hybrid", "trm_kernels")
_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>(?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")
_log = logging.getLogger("mkdocs.hooks.docs_site")


def on_config(config: Any) -> Any:
    """Fill the section of decisions: all pages of its folder, by name."""
    pages = [path.relative_to(DOCS).as_posix() for path in sorted((DOCS / "decisions").glob("*.md"))]
    for section in config.nav:
        if isinstance(section, dict) and "Decisions" in section:
            section["Decisions"] = pages
    return config


def on_pre_build(config: Any) -> None:
    """Warn, which fails a strict build, of each public name that the API pages lack or that says nothing."""
    for problem in undocumented():
        _log.warning(problem)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`[name](../path)` as `name` where the path leaves docs/; warn where there is no such file."""
    folder = (DOCS / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if target.is_relative_to(DOCS.resolve()):
            return link[0]
        if not target.exists():
            _log.warning("%s links to %s, which is not there", page.file.src_uri, link["path"])
        text = link["text"].strip("`")
        return f"`{text}`" if "/" in text or "." in text else text

    return _OUTSIDE.sub(named, markdown)


def public_names(package: str) -> list[str]:
    """`__all__` of a package, read without importing it."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    raise ValueError(f"docs: expected __all__ in {package}/__init__.py, got none.")


def undocumented(api: Path = DOCS / "api") -> Iterator[str]:
    """A sentence for each public name that has no entry in the API pages, or no docstring.

    Public are the names of each package's `__all__` and the public methods of its classes.
    """
    import griffe

    entries = {
        line.removeprefix("::: ").strip()
        for page in sorted(api.glob("*.md"))
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    }
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    modules = {package: loader.load(package) for package in PACKAGES}
    loader.resolve_aliases()
    for package, module in modules.items():
        for name in public_names(package):
            if f"{package}.{name}" not in entries:
                yield f"{package}.{name} is public and has no entry `::: {package}.{name}` in {api.name}/"
            for path, member in _with_methods(f"{package}.{name}", module[name]):
                if member.docstring is None:
                    yield f"{path} is public and has no docstring"


def _with_methods(path: str, member: Any) -> Iterator[tuple[str, Any]]:
    """A public name and, of a class, its own public methods."""
    yield path, member
    if member.is_class:
        for name, method in member.members.items():
            if method.is_function and not name.startswith("_"):
                yield f"{path}.{name}", method
