"""All arms of all tasks, with every seed: two processes side by side, a thread each; what is there stays."""

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from evidence import picture, tables
from evidence.results import Results, Run
from evidence.tasks import TASKS
from hybrid.saving.files import replace_file

FOLDER = Path("build/evidence")
SEEDS = (0, 1, 2)
RESULTS, REPORT, PICTURE = "results.json", "tables.md", "evidence.png"
DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence.md"
PUBLISHED = DOCUMENT.with_suffix("")  # the folder of what the document shows


def missing(results: Results, tasks: Iterable[str], seeds: Iterable[int], quick: bool) -> list[Run]:
    """The runs that are not there yet with today's settings, seed by seed."""
    wanted = [Run(task, arm, seed) for seed in seeds for task in tasks for arm in TASKS[task].ARMS]
    return [run for run in wanted if results.find(run, TASKS[run.task].settings(run.arm, quick)) is None]


def make(run: Run, quick: bool) -> dict[str, Any]:
    """One run, in whichever process."""
    torch.set_num_threads(1)
    return TASKS[run.task].run(run.seed, run.arm, quick)


def make_all(runs: list[Run], quick: bool, processes: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with what came of it, as soon as it is known; one process is this one."""
    if processes == 1:
        yield from ((run, make(run, quick)) for run in runs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(make, run, quick): run for run in runs}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def report(results: Results, folder: Path) -> None:
    """Write all tables, and the picture of the shell game."""
    replace_file(folder / REPORT, tables.all_tables(results).encode())
    if tables.GAME in results.runs:
        picture.draw(results, folder / PICTURE)


def publish(results: Results) -> None:
    """Make these results those of the document: results.json, its figure, its tables."""
    PUBLISHED.mkdir(exist_ok=True)
    replace_file(PUBLISHED / RESULTS, results.path.read_bytes())
    picture.draw(results, PUBLISHED / PICTURE)
    text = DOCUMENT.read_text(encoding="utf-8")
    replace_file(DOCUMENT, tables.rewritten(text, results).encode())


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="make evidence", description="Where recursion pays, and where not.")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer steps: a few minutes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default 0 1 2, quick 0")
    parser.add_argument("--processes", type=int, default=2, help="side by side, one thread each; default 2")
    parser.add_argument("--publish", action="store_true", help="then write the results into docs/evidence.md")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default {FOLDER}, quick {FOLDER}/quick")
    chosen = parser.parse_args(argv)
    if chosen.publish and (chosen.quick or chosen.seeds or chosen.tasks != list(TASKS)):
        parser.error("--publish: expected all tasks with all seeds, got a part.")
    folder = chosen.out or (FOLDER / "quick" if chosen.quick else FOLDER)
    seeds = chosen.seeds or (SEEDS[:1] if chosen.quick else SEEDS)

    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        results = Results(folder / RESULTS)
    except ValueError as error:
        parser.error(str(error))
    results.versions = versions()
    runs = missing(results, chosen.tasks, seeds, chosen.quick)
    print(f"{len(runs)} runs to make", flush=True)
    for done, (run, result) in enumerate(make_all(runs, chosen.quick, chosen.processes), start=1):
        results.add(run, TASKS[run.task].settings(run.arm, chosen.quick), result)
        print(
            f"{done}/{len(runs)}  {run.task}, {run.arm}, seed {run.seed}: accuracy {result['accuracy']:.3f}"
            f"  {result['cpu_seconds']:.0f} s of CPU time",
            flush=True,
        )
    report(results, folder)
    if chosen.publish:
        publish(results)
    print(f"{results.path} is written. {time.perf_counter() - began:.0f} s")
    return 0
