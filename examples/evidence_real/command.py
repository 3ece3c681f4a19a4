"""Runs on a real base, one after the other; each is written when it is made, none is made twice."""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from evidence_real import picture, tables
from evidence_real.arms import ARMS, model_of
from evidence_real.cached import Cache, after, parts_of
from evidence_real.measures import Measures
from evidence_real.results import Lines, Run
from evidence_real.tasks import TASKS
from hybrid.demo.real import base as real_base
from hybrid.demo.real.questions import Questions
from hybrid.demo.real.training import Known, train

FOLDER = Path("build/evidence-real")
BASE = Path("build/smollm2")
RESULTS = "results.jsonl"
PICTURE = "accuracy-by-recursion-steps.png"
SEEDS = (0, 1, 2, 3, 4)
DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence-real.md"
PUBLISHED = DOCUMENT.with_suffix("") / RESULTS
FILLERS = ", fillers"
_MAIN = [name for name in TASKS if not name.endswith(FILLERS)]


def settings(run: Run) -> dict[str, Any]:
    """All that decides what a run computes but the seed."""
    return asdict(ARMS[run.arm])


def make(run: Run, cache: Cache) -> dict[str, Any]:
    """Train and measure one arm."""
    arm = ARMS[run.arm]
    name = run.task + FILLERS if arm.fillers else run.task
    task, parts, texts = TASKS[name], cache.task(name), cache.texts
    model = model_of(arm, real_base.load(cache.base_folder), run.seed)
    result: dict[str, Any] = {"trained_parameters": sum(p.numel() for p in model.trained().values())}
    if arm.learns != "nothing":
        rows, kept = parts["train"], texts["kept"]
        known = Known(Questions(rows["ids"], rows["asked"]), model.layer, after(rows, model.layer))
        plan = replace(arm.plan, seed=run.seed)
        result |= train(model, known, plan, (kept["ids"], after(kept, model.layer), after(kept)))
    closings = {number: parts_of(task, 0)[f"closing {number}"] for number in range(len(task.closings))}
    return result | Measures(model, task, parts, texts).all(arm, cache.tokenizer, closings)


def wanted(tasks: list[str], arms: list[str], seeds: list[int]) -> Iterator[Run]:
    """All runs that are asked for, seed by seed; what a task has no use for is left out."""
    for seed in seeds:
        for task in tasks:
            for arm in arms:
                has_moves = TASKS[task].asks_often
                if (seed == SEEDS[0] or ARMS[arm].learns != "nothing") and (
                    has_moves or not ARMS[arm].fillers
                ):
                    yield Run(task, arm, seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evidence_real",
        description=__doc__,
        epilog="make evidence-real ARGS='--tasks words --seeds 0' is the same.",
    )

    def add(name: str, all_of: Iterable[str], what: str) -> None:
        names = list(all_of)
        known = "; ".join(f'"{name}"' for name in names)
        help = f"{what}; not given: all of {known}"
        parser.add_argument(name, nargs="+", choices=names, default=names, metavar="NAME", help=help)

    add("--tasks", _MAIN, "what is to be learned")
    add("--arms", ARMS, "what learns it")
    parser.add_argument(
        "--seeds", nargs="*", type=int, default=list(SEEDS), help="not given: 0 to 4; none named: no run"
    )
    parser.add_argument("--base", type=Path, default=BASE, help="its folder; fetched where there is none")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results and hidden states are kept")
    parser.add_argument("--afresh", action="store_true", help="make published runs again, in a new --out")
    parser.add_argument("--publish", action="store_true", help="write the results into docs/evidence-real.md")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    if chosen.afresh and chosen.out.exists():
        told = "expected a new --out with --afresh, got"
        parser.error(f"{told} {chosen.out}, which is gone on with without --afresh.")
    if chosen.afresh and chosen.publish:
        parser.error("expected --afresh or --publish, got both: what is published would be lost.")
    try:
        lines = Lines(chosen.out / RESULTS, begin_with=None if chosen.afresh else PUBLISHED)
        runs = dict.fromkeys(wanted(chosen.tasks, chosen.arms, chosen.seeds))
        todo = [run for run in runs if not lines.find(run, settings(run))]
        for task in dict.fromkeys(run.task for run in todo):
            TASKS[task].check()
        cache = Cache(chosen.out / "states", real_base.folder_of(chosen.base))
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(todo)} runs to make", flush=True)
    for done, run in enumerate(todo, start=1):
        began = time.perf_counter()
        result = make(run, cache)
        lines.add(run, settings(run), result)
        print(
            f"{done}/{len(todo)} {run.task}, {run.arm}, seed {run.seed}: closing {result['closing']}, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    if chosen.publish:
        published = lines.publish(DOCUMENT, tables.TABLES)
        picture.draw(lines, published.with_name(PICTURE))
    return 0
