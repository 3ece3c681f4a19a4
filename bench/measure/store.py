"""Results on disk: one JSON file per run, rewritten after every record, so that a time limit loses nothing.

The file has a section for each stage. Stages run one after the other, so one process writes at a time. A
record is first written as "running". A later run that finds it so knows that it did not finish. It tries the
record again, TRIES times in all, and then leaves it.
"""

import json
from pathlib import Path
from typing import Any

from hybrid.saving.files import replace_file

Record = dict[str, Any]

TRIES = 3


class Store:
    """One stage's section of a file: facts, and records by name."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self._content = read(path)
        section = self._content.setdefault(stage, {"facts": {}, "records": {}})
        self.facts: Record = section["facts"]
        self.records: dict[str, Record] = section["records"]

    def set_facts(self, **facts: Any) -> None:
        self.facts.update(facts)
        self._write()

    def is_done(self, name: str) -> bool:
        record = self.records.get(name)
        if record is None:
            return False
        return record["state"] != "running" or record.get("tries", 1) >= TRIES

    def start(self, name: str) -> None:
        tries = self.records.get(name, {}).get("tries", 0) + 1
        self.records[name] = {"state": "running", "tries": tries}
        self._write()

    def finish(self, name: str, **record: Any) -> None:
        self.records[name] = record
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, (json.dumps({"stages": self._content}, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """The sections of a file, each {"facts", "records"}; empty when there is no file."""
    stages: dict[str, Any] = json.loads(path.read_text())["stages"] if path.exists() else {}
    return stages
