"""Mutants, small slips in the code: does a test notice each? `python -m tools.mutants` plants a sample

The slips are cosmic-ray's: another comparison or operator, a number more or less, a loop of no rounds, a lost
`not`. A measurement, made once a test file, says which of its tests run a line. A mutant is met by these, the
quickest first, in a process that has imported torch already. All happens in build/mutants, in a copy of the
tracked files. What came of it: docs/decisions/mutation-tests.md

A run that is begun again with the same sample goes on where it was stopped.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from difflib import unified_diff
from itertools import accumulate, takewhile
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
MEASURED = BUILD / "measured"
RESULTS = BUILD / "results.jsonl"
LOG = BUILD / "last.log"
# package -> the ways in which its tests are run; they stand below tests/ in a folder of the same name
PACKAGES = {
    "hybrid/training": ("plain",),
    "hybrid/data": ("plain",),
    "hybrid/model": ("plain",),
    "trm_kernels/recursion": ("plain", "interpreted"),
}
# the environment of a way, and pytest's options
WAYS: dict[str, tuple[dict[str, str], list[str]]] = {
    "plain": ({}, []),
    "interpreted": ({"TRITON_INTERPRET": "1"}, ["-m", "kernels and not slow"]),
}
PYTEST = ["-q", "-p", "no:cacheprovider", "--timeout=0"]
ALWAYS = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
PRELOADED = [
    "torch",
    "transformers.modeling_utils",
    "transformers.generation",
    "accelerate",
    "matplotlib",
    "pytest",
]
# an operator for one of another kind is a TypeError on the spot, which proves nothing of the tests
_DIES_AT_ONCE = re.compile(
    "BinaryOperator_(?!Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|BitAnd_BitOr|BitOr_BitAnd)"
)
# a mutant that computes for so many seconds, and ten times as long as its tests took, never ends; one that
# waits for so long is an error: whether it ends cannot be told on a machine that is busy
COMPUTES, WAITS = 60, 3600


@dataclass(frozen=True)
class Mutant:
    """A slip: the `occurrence`th place in `module` where `operator` changes something, which is in `line`."""

    module: str
    line: int
    operator: str
    occurrence: int


@dataclass(frozen=True)
class Fate:
    """What came of a mutant.

    outcome   killed, survived, not run (no test runs its line), or error (the tests could not be run)
    tests     how many tests met it
    left_out  how many more run its line, and were left out since they take too long
    diff      what was changed
    """

    mutant: Mutant
    outcome: str
    tests: int
    left_out: int
    diff: str


# The sample


def mutants_in(module: str) -> dict[tuple[int, int], list[Mutant]]:
    """(line, column) -> the slips that are possible there; none in annotations, which nothing reads."""
    source = (ROOT / module).read_text(encoding="utf-8")
    tree, unread = get_ast(source), list(_annotations(source))
    places: dict[tuple[int, int], list[Mutant]] = defaultdict(list)
    for name in operator_names():
        operator = get_operator(name)
        if operator.arguments() or _DIES_AT_ONCE.search(name):
            continue
        found = (place for node in ast_nodes(tree) for place in operator().mutation_positions(node))
        for occurrence, (start, _) in enumerate(found):
            if not any(first <= start < last for first, last in unread):
                places[start].append(Mutant(module, start[0], name, occurrence))
    return places


def _annotations(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for node in ast.walk(ast.parse(source)):
        for one in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if one is not None:
                yield (one.lineno, one.col_offset), (one.end_lineno, one.end_col_offset)


def sample(package: str, count: int | None, seed: int) -> list[Mutant]:
    """One slip at each of `count` places of the package, or at all places."""
    chosen = random.Random(f"{seed} {package}")
    modules = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py"))
    places = [mutants for module in modules for _, mutants in sorted(mutants_in(module).items())]
    if count is not None:
        places = chosen.sample(places, min(count, len(places)))
    return [chosen.choice(mutants) for mutants in places]


# The tests that run a line


def measure(package: str, way: str, test_file: str, seconds: float | None) -> Path:
    """Run a test file once, and keep which lines of the package each test runs and how long it computes.

    seconds   so many are computed, with tests drawn by chance; None: with all

    What was kept holds as long as neither the test file nor the package has changed.
    """
    sources = [ROOT / test_file, *sorted((ROOT / package).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    kept = MEASURED / f"{Path(package).name}-{way}-{Path(test_file).stem}-{digest}.json"
    if seconds is not None and not kept.exists():
        kept = kept.with_stem(f"{kept.stem}-{seconds:g}s")
    if not kept.exists():
        print(f"measuring which lines of {package} are run by {test_file}, {way}", flush=True)
        process = _start(_measure, WAYS[way][0], WAYS[way][1], package, test_file, kept, seconds)
        process.join()
        if not kept.exists():
            raise SystemExit(f"tools.mutants: {test_file} fails as it is ({way}): {LOG}")
    return kept


def _measure(
    environment: dict[str, str],
    options: list[str],
    package: str,
    test_file: str,
    kept: Path,
    seconds: float | None,
) -> None:
    _stand_in_the_copy(environment | {"COVERAGE_FILE": str(kept.with_suffix(".coverage"))})
    clock = _TestClock(seconds)
    options = [*PYTEST, *options, f"--cov={package}", "--cov-context=test", "--cov-report="]
    exit_code = pytest.main([*options, test_file], plugins=[clock])
    half = kept.with_suffix(".part")
    half.write_text(json.dumps(clock.seconds), encoding="utf-8")
    if exit_code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        half.rename(kept)  # last: what is there is whole


class _TestClock:
    """How many seconds each test computes, the processes that it starts included: not how long it waits."""

    def __init__(self, most: float | None) -> None:
        self.seconds: dict[str, float] = {}
        self.most = most

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.most is not None:
            random.Random(0).shuffle(items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self.most is not None and sum(self.seconds.values()) >= self.most:
            pytest.skip(f"{self.most:g} s were measured")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        before = sum(os.times()[:4])
        result = yield
        self.seconds[item.nodeid] = round(sum(os.times()[:4]) - before, 3)
        return result


class TestsOfLines:
    """Which tests of a package run a line of it, the quickest first; in one way of running them."""

    def __init__(self, package: str, way: str, seconds: float | None = None) -> None:
        self.environment = WAYS[way][0]
        self._data = CoverageData(no_disk=True)
        self._seconds: dict[str, float] = {}
        for path in sorted((ROOT / "tests" / package).rglob("test_*.py")):
            kept = measure(package, way, path.relative_to(ROOT).as_posix(), seconds)
            self._seconds |= json.loads(kept.read_text(encoding="utf-8"))
            lines = CoverageData(str(kept.with_suffix(".coverage")))
            lines.read()
            self._data.update(lines)

    def of(self, mutant: Mutant) -> list[str]:
        """All tests that run the mutant's statement; of what is run on import, all that run its module."""
        measured = [file for file in self._data.measured_files() if file.endswith(f"/{mutant.module}")]
        by_line = self._data.contexts_by_lineno(measured[0]) if measured else {}
        source = (ROOT / mutant.module).read_text(encoding="utf-8")
        lines = _lines_of_statement(source, mutant.line) or by_line.keys()
        contexts = {context for line in lines for context in by_line.get(line, ()) if context}
        return sorted({context.partition("|")[0] for context in contexts}, key=self.seconds)

    def seconds(self, *tests: str) -> float:
        """How long these took together."""
        return sum(self._seconds.get(test, 0.0) for test in tests)

    def within(self, tests: list[str], budget: float) -> list[str]:
        """The first, as many as took `budget` seconds together, and one at least."""
        sums = accumulate(self.seconds(test) for test in tests)
        return tests[: max(1, len(list(takewhile(lambda s: s <= budget, sums))))]


def _lines_of_statement(source: str, line: int) -> Iterable[int]:
    """The lines of the innermost statement around `line` in a function; none where it is in no function."""
    around, in_function = None, False
    for node in ast.walk(ast.parse(source)):  # outer nodes first
        if not isinstance(node, ast.stmt) or not _first_line(node) <= line <= (node.end_lineno or 0):
            continue
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        in_function = in_function or (is_function and line >= node.body[0].lineno)  # type: ignore[attr-defined]
        around = node
    if around is None or not in_function:
        return ()
    body = getattr(around, "body", None)
    last = body[0].lineno - 1 if body else around.end_lineno or around.lineno
    return range(_first_line(around), max(around.lineno, last) + 1)


def _first_line(statement: ast.stmt) -> int:
    """Its decorators' too."""
    return min(node.lineno for node in (statement, *getattr(statement, "decorator_list", ())))


# One mutant


def meet(mutant: Mutant, tests_of_lines: list[TestsOfLines], budget: float) -> Fate:
    """Plant a mutant in the copy, run its tests, and take it out again."""
    path, source = TREE / mutant.module, (ROOT / mutant.module).read_text(encoding="utf-8")
    changed = mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence)
    differing = unified_diff(source.split("\n"), changed.split("\n"), n=0, lineterm="")
    diff = "\n".join(line for line in differing if not line.startswith(("---", "+++", "@@")))
    outcome, run, left_out = "not run", 0, 0
    path.write_text(changed, encoding="utf-8")
    try:
        for way in tests_of_lines:
            tests = way.of(mutant)
            if tests and outcome != "killed":
                few = way.within(tests, budget)
                run, left_out = run + len(few), left_out + len(tests) - len(few)
                outcome = _outcome(few, way.environment, COMPUTES + round(10 * way.seconds(*few)))
    finally:
        path.write_text(source, encoding="utf-8")
    return Fate(mutant, outcome, run, left_out, diff)


def _outcome(tests: list[str], environment: dict[str, str], seconds: int) -> str:
    process = _start(_run_tests, environment, tests, seconds)
    process.join(WAITS)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return "error"
    signals = {-signal.SIGXCPU, -signal.SIGSEGV, -signal.SIGABRT}  # the last two: it wrote where nothing is
    killed = {pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED, *signals}
    return "survived" if process.exitcode == 0 else "killed" if process.exitcode in killed else "error"


def _start(what: Callable[..., None], environment: dict[str, str], *arguments: object) -> BaseProcess:
    """In a process of its own. It has imported torch already, unless it has an environment of its own:

    Triton reads TRITON_INTERPRET when it is imported, which importing torch may do.
    """
    spawn, fork = multiprocessing.get_context("spawn"), multiprocessing.get_context("forkserver")
    process = (spawn if environment else fork).Process(target=what, args=(environment, *arguments))
    process.start()
    return process


def _stand_in_the_copy(environment: dict[str, str]) -> None:
    """Make this process one whose tests are those of the copy, and whose words go to a log."""
    os.setsid()  # what the tests start goes with it
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(ALWAYS | environment)
    sys.dont_write_bytecode = True
    os.chdir(TREE)
    sys.path.insert(0, str(TREE))


def _run_tests(environment: dict[str, str], tests: list[str], seconds: int) -> None:
    """In a process of its own, which may compute for `seconds`: the tests, until one fails."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 60))  # SIGXCPU, then SIGKILL
    _stand_in_the_copy(environment)
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    sys.exit(int(pytest.main([*PYTEST, "-x", "-m", "", *files], plugins=[_Chosen(tests)])))


class _Chosen:
    """Of what pytest collects, these tests in this order: on a command line it misreads some names."""

    def __init__(self, tests: list[str]) -> None:
        self.places = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.places]
        items[:] = sorted(chosen, key=lambda item: self.places[item.nodeid])


# The run


def copy_tracked_files() -> None:
    """The tracked files as they are now, in TREE."""
    shutil.rmtree(TREE, ignore_errors=True)
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, names.split("\0")):
        (TREE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, TREE / name)


def before() -> dict[Mutant, Fate]:
    """What was found already."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    found = (json.loads(line) for line in lines)
    return {(m := Mutant(**one["mutant"])): Fate(**one | {"mutant": m}) for one in found}


def report(found: list[Fate]) -> str:
    """A table of the outcomes by package, and every mutant that lived."""
    lines = ["| package | mutants | killed | survived | not run | error |", "|---|---|---|---|---|---|"]
    for package in PACKAGES:
        of = Counter(one.outcome for one in found if one.mutant.module.startswith(package))
        counts = [sum(of.values()), *(of[outcome] for outcome in ("killed", "survived", "not run", "error"))]
        lines.append(f"| `{package}` | " + " | ".join(map(str, counts)) + " |")
    for one in found:
        if one.outcome != "killed":
            mutant = one.mutant
            where = f"{mutant.module}:{mutant.line} {mutant.operator.rpartition('/')[2]}"
            lines += ["", f"{where}: {one.outcome}, {one.tests} tests, {one.left_out} left out", one.diff]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """The command at the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--each", type=int, default=25, metavar="N", help="mutants of a package (25)")
    parser.add_argument("--all", action="store_true", help="all places instead: days")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    parser.add_argument(
        "--packages", nargs="+", choices=list(PACKAGES), default=list(PACKAGES), metavar="PACKAGE"
    )
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds of tests for a mutant and mode (60)"
    )
    parser.add_argument(
        "--measure", type=float, metavar="S", help="seconds of tests to measure of a test file (all)"
    )
    arguments = parser.parse_args(words)
    MEASURED.mkdir(parents=True, exist_ok=True)
    copy_tracked_files()
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    known, found = before(), []
    for package in arguments.packages:
        tests_of_lines = [TestsOfLines(package, way, arguments.measure) for way in PACKAGES[package]]
        for mutant in sample(package, None if arguments.all else arguments.each, arguments.seed):
            if mutant not in known:
                known[mutant] = meet(mutant, tests_of_lines, arguments.budget)
                with open(RESULTS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(known[mutant])) + "\n")
                print(
                    f"{known[mutant].outcome:8} {mutant.module}:{mutant.line} {mutant.operator}", flush=True
                )
            found.append(known[mutant])
    print(report(found))


if __name__ == "__main__":
    main()
