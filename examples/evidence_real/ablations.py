"""What makes a recursion learn: one lever changed at a time, equal steps. See docs/decisions/real-base.md.

With examples/ on the path: python -m evidence_real.ablations
"""

import argparse
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evidence_real.arms import planned
from evidence_real.cached import Cache, after
from evidence_real.command import BASE, FOLDER
from evidence_real.measures import Measures
from evidence_real.results import Lines, Run
from evidence_real.tasks import TASKS
from hybrid.demo.real import base as real_base
from hybrid.demo.real.adapters import with_recursion
from hybrid.demo.real.questions import Questions, encode
from hybrid.demo.real.training import Known, Model, TrainingPlan, train
from hybrid.demo.report import table

TASK = "words"
GAMES = 128
FIRST = 20_000  # of the held-out games: no trial and no arm of the evidence has looked at these
N = (1, 4, 8, 12)  # recursion steps at inference; what is compared is the last
SEEDS = range(5)
DOCUMENT = Path(__file__).parents[2] / "docs" / "decisions" / "real-base.md"
PUBLISHED = DOCUMENT.with_suffix("") / "ablations.jsonl"


@dataclass(frozen=True)
class Lever:
    """What differs from the first of LEVERS.

    settings    of HybridConfig
    gate        what the bias of the gate begins at
    from_zero   whether y and z begin at zero, and not at learned states
    narrow      whether products are in bfloat16 while it is trained, as LoRA on all layers has them
    """

    settings: dict[str, Any] = field(default_factory=dict)
    plan: TrainingPlan = TrainingPlan(steps=1500)
    gate: float | None = None
    from_zero: bool = False
    narrow: bool = False


_AS_IT_IS = Lever()
_WIDE = Lever({"trm_hidden_size": 128, "trm_intermediate_size": 336})
_TWO_LAYERS = Lever({"trm_num_layers": 2})
_LAYER_29 = Lever({"injection_layers": [29]})

LEVERS: dict[str, Lever] = {
    "as it is": _AS_IT_IS,
    "no norm behind W_in": Lever({"trm_input_norm": False}),
    "n from 1..8": Lever({"num_recursion_steps": 8}),
    "a gate that opens from .05": Lever({"blending_strategy": "gated"}, gate=-3.0),
    "y and z from zero": Lever(from_zero=True),
    "strength 1": Lever({"injection_strength": 1.0}),
    "width 128": _WIDE,
    "two layers": _TWO_LAYERS,
    "rate 1e-3": planned(_AS_IT_IS, learning_rate=1e-3),
    "rate 4e-3": planned(_AS_IT_IS, learning_rate=4e-3),
    "warm-up of 300 steps": planned(_AS_IT_IS, warmup_steps=300),
    "rate 4e-3, warm-up of 300 steps": planned(_AS_IT_IS, learning_rate=4e-3, warmup_steps=300),
    "width 128, warm-up of 300 steps": planned(_WIDE, warmup_steps=300),
    "two layers, warm-up of 300 steps": planned(_TWO_LAYERS, warmup_steps=300),
    "after layer 29": _LAYER_29,
    "after layer 29, warm-up of 300 steps": planned(_LAYER_29, warmup_steps=300),
    "after layers 29 and 30": Lever({"injection_layers": [29, 30]}),
    "as it is, in bfloat16": Lever(narrow=True),
    "after layer 15, in bfloat16": Lever({"injection_layers": [15], "injection_strength": 8.0}, narrow=True),
}


def model_of(lever: Lever, base: Any, seed: int) -> Model:
    """The recursion inside `base`, which is changed."""
    torch.manual_seed(seed)
    model = with_recursion(base, seed, **{"num_recursion_steps": 12} | lever.settings)
    model.trained_in = torch.bfloat16 if lever.narrow else torch.float32
    for name, parameter in model.trained().items():
        if lever.gate is not None and name.endswith("gate_bias"):
            nn.init.constant_(parameter, lever.gate)
        if lever.from_zero and name.endswith(("y_init", "z_init")):
            nn.init.zeros_(parameter).requires_grad_(False)
    return model


def make(lever: Lever, seed: int, cache: Cache) -> dict[str, Any]:
    """Train, and measure on games that nobody looked at."""
    task = TASKS[TASK]
    model = model_of(lever, real_base.load(cache.base_folder), seed)
    rows = cache.task(TASK, model.layer)["train"]
    texts = [task.text(FIRST + i, True, task.longer, task.closings[0]) for i in range(GAMES)]
    fresh = cache.part(f"{TASK}-fresh", encode(cache.tokenizer, texts), model.layer)
    known = Known(Questions(rows["ids"], rows["asked"]), model.layer, after(rows, model.layer))
    result: dict[str, Any] = {"trained_parameters": sum(p.numel() for p in model.trained().values())}
    result |= train(model, known, replace(lever.plan, seed=seed))
    by_moves = Measures(model, task, {"longer": fresh}, {}).by_moves
    return result | {"by_n": {str(n): by_moves(n) for n in N}}


def _accuracy(result: dict[str, Any], n: int, longer: bool = False) -> float:
    most = TASKS[TASK].most
    moves: list[float] = result["by_n"][str(n)]
    return statistics.mean(moves[most:] if longer else moves[:most])


def shown(lines: Lines) -> str:
    """A row for each lever of which there is a run; a seed that was not run is `-`."""
    rows = []
    for name in LEVERS:
        if not (found := lines.of(TASK, name)):
            continue
        each = {seed: _accuracy(result, N[-1]) for seed, result in found.items()}
        by_n = (statistics.mean(_accuracy(result, n) for result in found.values()) for n in N)
        longer = statistics.mean(_accuracy(result, N[-1], longer=True) for result in found.values())
        rows.append(
            [
                name,
                f"{statistics.mean(each.values()):.3f}",
                " ".join(f"{each[seed]:.3f}" if seed in each else "-" for seed in SEEDS),
                " ".join(f"{share:.2f}" for share in by_n),
                f"{longer:.3f}",
                f"{statistics.mean(result['cpu_seconds'] for result in found.values()):.0f}",
            ]
        )
    by = f"n = {' / '.join(map(str, N))}"
    return table(["", "accuracy", "each seed", by, "move 17 to 24", "CPU seconds"], *rows)


TABLES = {"ablations": shown}


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m evidence_real.ablations", description=__doc__)
    parser.add_argument("--levers", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--base", type=Path, default=BASE, help="its folder; fetched where there is none")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where results and hidden states are kept")
    parser.add_argument("--publish", action="store_true", help=f"write the results into {DOCUMENT.name}")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        lines = Lines(chosen.out / PUBLISHED.name, begin_with=PUBLISHED)
        cache = Cache(chosen.out / "states", real_base.folder_of(chosen.base))
    except ValueError as error:
        parser.error(str(error))
    for seed in chosen.seeds:
        for name in chosen.levers:
            run, lever = Run(TASK, name, seed), LEVERS[name]
            if lines.find(run, asdict(lever)) is None:
                lines.add(run, asdict(lever), make(lever, seed, cache))
                print(f"{name}, seed {seed}: {_accuracy(lines.of(TASK, name)[seed], N[-1]):.3f}", flush=True)
    if chosen.publish:
        lines.publish(DOCUMENT, TABLES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
