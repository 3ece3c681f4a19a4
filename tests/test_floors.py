"""Floors: a package imports only from the floors below it, nothing imports tests, functions stay small."""

import ast
from collections.abc import Iterator
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


MOST_PARAMETERS, MOST_LINES = 8, 60
KEYWORDS = "the settings of a public call are keywords: from the first line on they are one RecursionSpec"
EXCEPTIONS = {  # functions with more parameters, and why
    "trm_recursion": KEYWORDS,
    "trm_injection": KEYWORDS,
    "adaptive_recursion": KEYWORDS,
    "rope_attention": "a public op that can be called by itself: its settings are keywords",
    "TRM.__init__": "the hyperparameters of a public module are keywords",
    "TRM.forward": "the inputs of a public module are keywords",
    "HybridConfig.__init__": "transformers makes a config from keywords, one a field",
    "HybridModel.forward": "the signature of transformers' causal language models, and two of ours",
    "HybridModel.run_decoder": "Backbone.forward's arguments, handed on",
    "Injection.forward": "gradient checkpointing replays a call from its arguments",
    "TokenStream.__init__": "the settings of a public class are keywords",
    "recursion": "as people write it: what the kernels are compared with",
    "UntiedStack.forward": "stands where a TRM's forward stood",
}
LONG = {  # functions with more lines, and why
    "HybridConfig.__init__": EXCEPTIONS["HybridConfig.__init__"],
    "_report": "a page of text",
}
FLOORS = ("trm_kernels", "hybrid", "bench", "examples", "tools")


def functions(tree: ast.AST, of: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name, function) of a file, those of classes and those within functions included; kernels left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, f"{node.name}.")
            continue
        if isinstance(node, ast.FunctionDef):
            if any("triton.jit" in ast.unparse(mark) for mark in node.decorator_list):
                continue
            yield f"{of}{node.name}", node
        yield from functions(node, of)


def count_parameters(function: ast.FunctionDef) -> int:
    """Without self and what stands for it, and without *args and **kwargs."""
    named = function.args
    all_of_them = [*named.posonlyargs, *named.args, *named.kwonlyargs]
    return len(all_of_them) - (bool(all_of_them) and all_of_them[0].arg in ("self", "cls", "ctx"))


def count_lines(function: ast.FunctionDef) -> int:
    """Without the docstring: to say more of a function does not make it longer."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def files_of(floor: str) -> list[tuple[str, ast.Module]]:
    paths = sorted((ROOT / floor).rglob("*.py"))
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_functions_stay_small():
    wide, long = set(), set()
    for path, tree in (file for floor in FLOORS for file in files_of(floor)):
        for name, function in functions(tree):
            if (count := count_lines(function)) > MOST_LINES:
                assert name in LONG, f"{path}: {name} has {count} lines, and no reason is given"
                long.add(name)
            if (count := count_parameters(function)) > MOST_PARAMETERS:
                assert name in EXCEPTIONS, f"{path}: {name} has {count} parameters, and no reason is given"
                wide.add(name)
    assert (wide, long) == (set(EXCEPTIONS), set(LONG)), "a reason that nothing needs any more"


def test_underscore_names_stay_in_their_file():
    for path, tree in (file for floor in FLOORS for file in files_of(floor)):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FLOORS:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path} imports {', '.join(private)} from {node.module}"


def test_no_two_classes_share_a_name():
    found: dict[str, str] = {}
    for path, tree in (
        file for floor in ("trm_kernels", "hybrid", "bench", "tools") for file in files_of(floor)
    ):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                name = node.name.strip("_")
                assert name not in found, f"{name} is a class in {found[name]} and in {path}"
                found[name] = path


def test_modules_say_what_they_are():
    for path, tree in (file for floor in FLOORS for file in files_of(floor)):
        first = (ast.get_docstring(tree) or "").split("\n")[0]
        assert len(first) > 10, f"{path} has no first line from which CONTRIBUTING's map could be made"
