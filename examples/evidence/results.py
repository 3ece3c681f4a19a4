"""results.json: every run that was made, with its settings; and what is told of several seeds."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from hybrid.saving.files import replace_file


class Run(NamedTuple):
    """Which run: of which task, which arm, which seed."""

    task: str
    arm: str
    seed: int


class Results:
    """The runs in one file; each that is added is written at once, beside the file, which is then renamed.

    Errors: ValueError for a file that is no such JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.versions: dict[str, str] = {}
        self.runs: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.versions, self.runs = found["versions"], found["runs"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: expected the results of this command, got {error!r}.") from error

    def find(self, run: Run, settings: dict[str, Any]) -> dict[str, Any] | None:
        """What came of a run with these very settings, or None."""
        found = self.runs.get(run.task, {}).get(run.arm, {}).get(str(run.seed))
        if found is None or found["settings"] != json.loads(json.dumps(settings)):
            return None
        result: dict[str, Any] = found["result"]
        return result

    def add(self, run: Run, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a run, in place of one with other settings."""
        seeds = self.runs.setdefault(run.task, {}).setdefault(run.arm, {})
        seeds[str(run.seed)] = {"settings": settings, "result": result}
        self.write()

    def write(self) -> None:
        text = json.dumps({"versions": self.versions, "runs": self.runs}, indent=1)
        replace_file(self.path, f"{text}\n".encode())

    def of(self, task: str, arm: str) -> list[dict[str, Any]]:
        """What came of every seed of an arm, in the order of the seeds."""
        seeds = self.runs.get(task, {}).get(arm, {})
        return [seeds[seed]["result"] for seed in sorted(seeds, key=int)]

    def settings_of(self, task: str, arm: str) -> dict[str, Any]:
        """Those of the arm's first seed."""
        found: dict[str, Any] = next(iter(self.runs[task][arm].values()))["settings"]
        return found


def mean_and_deviation(values: Iterable[float], digits: int = 3) -> str:
    """`mean +- standard deviation` (that of a sample, n - 1), or the one value there is."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"
