"""A training run's folder: one process's at a time, and nothing in it is removed that the run did not write.

    run.json              what makes the run this run, and its id
    metrics.jsonl         one JSON object a line
    curve.png             its losses as a picture
    checkpoint-000123/    after step 123, see run_state.py
    .lock, .holder.json   held by the process that trains now; which it is
    .saving-*             being written; what a killed run leaves of it, the next run of this folder removes

The lock is the operating system's, so it ends with its process, however that ends. One process of a run holds
it, the main one.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout

from hybrid.config import HybridConfig, trm_fields
from hybrid.saving.files import SAVING, replace_file
from hybrid.saving.json_files import read_object
from hybrid.training.fingerprints import first_difference
from hybrid.training.processes import on_main

RUN = "run.json"
METRICS = "metrics.jsonl"
CURVE = "curve.png"
LOCK, HOLDER = ".lock", ".holder.json"
_CANNOT = (
    "What a run computes cannot change; another run can begin from its weights (--base with one of its "
    "checkpoints)."
)
_FORMAT = "trm-hybrid 2"  # of run.json and of the checkpoints beside it


def make_folder(folder: Path, who: str = "train") -> list[Path]:
    """Make `folder` and see that files can be written there; the folders that were made, innermost first.

    who   asks for it, for the error

    Errors: ValueError when they cannot, with the system's reason.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{who}: expected an output folder that can be written to, got {folder} ({error.strerror})."
        ) from error
    return made


@contextmanager
def held(folder: Path, processes: PartialState) -> Iterator[None]:
    """Make `folder` and keep other runs out of it; every process of this one calls it, also once more inside.

    A folder that was made for it and is still empty at the end, after an error, is removed again.

    Errors: ValueError on every process when the folder cannot be written to, its file system has no locks, or
    another run has it, and which.
    """
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    made = on_main(processes, lambda: _hold(folder, lock))
    try:
        yield
    finally:
        if processes.is_main_process:
            _let_go(folder, lock, made)


def _hold(folder: Path, lock: FileLock) -> list[Path]:
    made = make_folder(folder)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"train: expected an output folder for this run alone, got {folder}, in use by another run: "
            f"{_holder(folder)}."
        ) from None
    except OSError as error:
        raise ValueError(
            f"train: expected an output folder on a file system with locks (flock), got {folder} "
            f"({error.strerror}): two runs could mix there."
        ) from error
    if lock.lock_counter == 1:
        replace_file(folder / HOLDER, json.dumps(_this_process(), indent=1).encode())
    return made


def _let_go(folder: Path, lock: FileLock, made: list[Path]) -> None:
    if lock.lock_counter == 1:
        (folder / HOLDER).unlink(missing_ok=True)
        if folder in made and [path.name for path in folder.iterdir()] == [LOCK]:
            _remove_empty(folder, made)
    lock.release()


def _remove_empty(folder: Path, made: list[Path]) -> None:
    """What make_folder made; while the lock is held, so that nobody else can hold a file that is gone."""
    (folder / LOCK).unlink()
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return  # somebody has begun to use it


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def _holder(folder: Path) -> str:
    try:
        who = read_object(folder / HOLDER, "train")
        return f"process {who['pid']} on {who['host']}, since {who['since']} ({who['command']:.200})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its process has not yet written who it is into {HOLDER}"


def read_run(folder: Path) -> dict[str, Any]:
    """What the run in `folder` is, its "id" included.

    Errors: ValueError when there is none, when run.json is another's or an older version's, or damaged.
    """
    path = folder / RUN
    try:
        run = read_object(path, "train")
    except OSError:
        raise ValueError(f"train: expected a run to resume in {folder}, got no {RUN} there.") from None
    if run.get("format") == _FORMAT and isinstance(run.get("id"), str):
        return run
    if "format" not in run and {"items_per_step", "trained"} <= run.keys():
        raise ValueError(
            f"train: expected a run that says what base, tokenizer and text it began with, got {path} of an "
            "earlier version, which does not: resume it with that version, or begin a run from its weights "
            "(--base with one of its checkpoints)."
        )
    raise ValueError(f"train: expected a {RUN} that a run wrote, got {path} with something else in it.")


def refuse_others_files(folder: Path) -> None:
    """ValueError for what a new run would write over: a run's checkpoints, or somebody's files of its names.

    A run without any checkpoint has nothing to lose: a new one may take its place.
    """
    taken = sorted(folder.glob("checkpoint-*"), reverse=True)
    if (folder / RUN).exists():
        read_run(folder)
        read_metrics(folder)
        if taken:
            raise ValueError(
                f"train: expected an output folder without a run, got {folder}, where an earlier run has "
                f"saved {taken[0].name}. To go on with that run, give the command that began it with "
                "--resume behind it (in Python train(..., resume=True)); for a new one, choose another "
                "folder."
            )
        return
    taken += [path for name in (METRICS, CURVE) if (path := folder / name).exists()]
    if taken:
        raise ValueError(
            f"train: expected an output folder without a run, got {folder}, where {taken[0].name} is that no "
            "run wrote. Choose another folder."
        )


def new_run(what: dict[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "id": uuid.uuid4().hex} | what


def check_same_run(folder: Path, before: dict[str, Any], what: dict[str, Any]) -> None:
    """Refuse to resume a run as another one: ValueError with the first thing that differs.

    Of a base's config only what both have is compared, so that a newer transformers may know more of it. A
    field of HybridConfig that there was not yet counts as what a saved config without it means.
    """
    then, now = (
        {name: value for name, value in run.items() if name not in ("format", "id", "extended", "steps")}
        for run in (before, what)
    )
    then = _with_newer_fields(then)
    then, now = _as_far_as_both_know(then, now), _as_far_as_both_know(now, then)
    if difference := first_difference(then, now):
        name, was, now_is = difference
        option = f" (--{name.replace('_', '-')} {was})" if now_is is None and name in before else ""
        raise ValueError(
            f"train: to resume the run in {folder}, expected {name} {was} as it began{option}, got {now_is}. "
            f"{_CANNOT}"
        )


def _with_newer_fields(run: dict[str, Any]) -> dict[str, Any]:
    try:
        known = HybridConfig.from_dict(run["config"])
    except (KeyError, TypeError, ValueError):  # of a run.json that somebody has edited
        return run
    if not run["config"]:  # a plain language model's
        return run
    return run | {"config": {name: getattr(known, name) for name in trm_fields()} | run["config"]}


def _as_far_as_both_know(run: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    try:
        config = {n: v for n, v in run["base"]["config"].items() if n in other["base"]["config"]}
        return run | {"base": run["base"] | {"config": config}}
    except (KeyError, TypeError, AttributeError):  # of a run.json that somebody has edited
        return run


def extended(
    folder: Path, run: dict[str, Any], steps: int, done: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the run with so many steps, a line on it where they are more than before).

    done   steps, by the checkpoint that it goes on from

    Errors: ValueError for fewer steps, and for more where those it has are not done yet.
    """
    before = run["steps"]
    if steps == before:
        return run, ()
    where = f"train: to resume the run in {folder}, expected steps"
    if steps < before:
        raise ValueError(f"{where} {before} as it began, or more, got {steps}. {_CANNOT}")
    if done < before:
        raise ValueError(
            f"{where} {before} as it began, got {steps}: {done} are done. Resume it with {before}; when it "
            "has ended, it can be resumed with more."
        )
    note = (
        f"extended from {before} to {steps} steps: from step {before + 1} on the learning rate is that of a "
        f"run of {steps} steps"
    )
    return run | {"steps": steps, "extended": [*run.get("extended", []), before]}, (note,)


def begin(folder: Path, run: dict[str, Any], step: int | None) -> None:
    """Clear away what this run left behind, and say what it is.

    step   of the checkpoint that was loaded: metrics after it will be written again; None: a new run

    Errors: ValueError for metrics that a run did not write.
    """
    lines = [] if step is None else [line for line in read_metrics(folder) if line["step"] <= step]
    runs = [run, read_run(folder)] if (folder / RUN).exists() else [run]
    for left in (left for one in runs for left in folder.glob(f"{saving(one)}*")):
        shutil.rmtree(left)
    for left in (left for name in (RUN, METRICS, CURVE, HOLDER) for left in folder.glob(f"{SAVING}*-{name}")):
        left.unlink()  # from whichever machine: the folder is this run's alone
    replace_file(folder / RUN, json.dumps(run, indent=1).encode())
    replace_file(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def saving(run: dict[str, Any]) -> str:
    """How the names begin of what this run, and no other, is writing."""
    return f"{SAVING}{run['id'][:12]}-"


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add one line; it is on its way to the disk when this returns."""
    with open(folder / METRICS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every whole line; what a killed run left of the last one is passed over.

    Errors: ValueError, with file and line, for one that is no JSON object with a "step".
    """
    path = folder / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [_metrics_line(path, number, line) for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _metrics_line(path: Path, number: int, content: bytes) -> dict[str, Any]:
    try:
        line = json.loads(content)
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        raise ValueError(
            f'train: expected {path} of a run, each line a JSON object with a "step", got in line {number}: '
            f"{content[:60].decode(errors='replace').strip()!r}."
        )
    return line
