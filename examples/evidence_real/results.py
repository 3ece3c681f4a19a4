"""results.jsonl: a line a run, written when it is made."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.demo.marked_tables import with_tables
from hybrid.saving.files import replace_file


class Run(NamedTuple):
    """Which run: of which task, which arm, which seed."""

    task: str
    arm: str
    seed: int


class Lines:
    """The runs in one file.

    begin_with   a file whose runs are there as well, where this one has none yet

    Errors: ValueError for a file that has other lines.
    """

    def __init__(self, path: Path, begin_with: Path | None = None) -> None:
        self.path = path
        self.runs: dict[Run, dict[str, Any]] = {}
        if not path.exists() and begin_with is not None and begin_with.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(begin_with.read_bytes())
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                found = json.loads(line)
                self.runs[Run(found["task"], found["arm"], found["seed"])] = found
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: expected a run in line {number}, got {error!r}.") from error

    def find(self, run: Run, settings: dict[str, Any]) -> dict[str, Any] | None:
        """What came of a run with these very settings, or None."""
        found = self.runs.get(run)
        if found is None or found["settings"] != json.loads(json.dumps(settings)):
            return None
        result: dict[str, Any] = found["result"]
        return result

    def add(self, run: Run, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """A later line of the same run counts."""
        line = {**run._asdict(), "settings": settings, "result": result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        self.runs[run] = json.loads(json.dumps(line))

    def of(self, task: str, arm: str) -> dict[int, dict[str, Any]]:
        """What came of each seed of an arm."""
        return {run.seed: line["result"] for run, line in sorted(self.runs.items()) if run[:2] == (task, arm)}

    def publish(self, document: Path, made: Mapping[str, Callable[["Lines"], str]]) -> Path:
        """Make these runs those of a page: its tables, and the file of this name in the folder beside it.

        Returns: that file.
        Errors: ValueError as with_tables.
        """
        published = document.with_suffix("") / self.path.name
        replace_file(document, rewritten(document, self, made).encode())
        published.parent.mkdir(exist_ok=True)
        if self.path != published:
            replace_file(published, self.path.read_bytes())
        return published


def rewritten(document: Path, lines: Lines, made: Mapping[str, Callable[[Lines], str]]) -> str:
    """The page with every table in it made anew of these runs."""
    tables = {name: partial(make, lines) for name, make in made.items()}
    return with_tables(document.read_text(encoding="utf-8"), tables, document.name)
