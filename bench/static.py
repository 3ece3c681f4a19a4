"""What is exact and needs no GPU: launches, bytes kept for backward, parameters. Counted, written, compared.

    python -m bench static            count, and write bench/results/static/*.json and the tables of docs/
    python -m bench static --check    count, and print what differs from those files; exit code 1 if it does

Registers, stack and shared memory of every kernel are in the same folder; `python -m trm_kernels.aot --write`
makes that file, and tests/trm_kernels/export/test_aot.py compares it by `changes` below.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure.counting import Counting, nbytes, storages_kept
from bench.peers import eager
from bench.peers.eager import PAPER, PLAIN, Recursion
from hybrid import HybridModel
from hybrid.bases import KNOWN_BASES, PRESET_BASES
from hybrid.info import on_meta, parts
from hybrid.model.cache_name import as_argument
from hybrid.presets import PresetConfigs
from trm_kernels.ops.attention.rope import Angles, rope_angles
from trm_kernels.recursion.recursion import trm_recursion
from trm_kernels.recursion.saved_bytes import SAVES
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights
from trm_kernels.runtime.backend import backend
from trm_kernels.runtime.launch import record

FOLDER = Path(__file__).parent / "results" / "static"

# the recursion that is counted: W1's, "TRM Sudoku", in bfloat16
W1 = Recursion(D=512, H=8, F=1536, num_layers=2, num_recursion_steps=6, num_cycles=3)
OURS = {
    "ours, save=all": {"save": "all", "candidate": "fused"},
    "ours, save=layer": {"save": "layer", "candidate": "fused"},
    "ours, save=step": {"save": "step", "candidate": "fused"},
    "ours, plain products (mm), save=all": {"save": "all", "candidate": "mm"},
}
EAGER = "eager (the TRM paper's code)"
COMPILED = "torch.compile"
LAUNCH_COLUMNS = ("evaluation", "evaluation, with backward", "W1 forward", "W1 forward and backward")

Figures = dict[str, Any]


# One recursion, ours or eager's, with tensors that hold no numbers or few


class Counted:
    """The tensors of a recursion, small or without memory: it runs only to be counted."""

    def __init__(self, numbers: Recursion, device: str, tokens: int = 4, dtype: torch.dtype = torch.bfloat16):
        D, F = numbers.D, numbers.F

        def matrix(n_out: int, n_in: int) -> Tensor:
            return torch.zeros(n_out, n_in, device=device, dtype=dtype, requires_grad=True)

        self.numbers = numbers
        self.weights = [
            LayerWeights(
                AttentionWeights(matrix(3 * D, D), matrix(D, D)),
                SwiGLUWeights(matrix(2 * F, D), matrix(D, F)),
            )
            for _ in range(numbers.num_layers)
        ]
        self.flat = [t for w in self.weights for part in w for t in part]
        self.x = torch.zeros(1, tokens, D, device=device, dtype=torch.bfloat16, requires_grad=True)
        self.angles = rope_angles(torch.arange(tokens, device=device)[None], D // numbers.H, 10000.0)

    def ours(self, save: str, candidate: str | None = None) -> tuple[Tensor, Tensor]:
        n = self.numbers
        return trm_recursion(
            self.x,
            self.x,
            self.x,
            self.weights,
            num_heads=n.H,
            num_recursion_steps=n.num_recursion_steps,
            num_cycles=n.num_cycles,
            save=save,
            candidate=candidate,
            angles=self.angles,
        )

    def eager(self, ways: eager.Parts, apply_f: Callable[..., Tensor] = eager.f) -> tuple[Tensor, Tensor]:
        state = self.x, self.x, self.x
        return eager.recursion(*state, self.weights, self.angles, self.numbers, parts=ways, apply_f=apply_f)

    def backward(self, out: tuple[Tensor, Tensor]) -> None:
        torch.autograd.grad(out, [self.x, *self.flat], [torch.empty_like(t) for t in out])


@contextmanager
def _counting() -> Iterator[Callable[[], int]]:
    """Kernels started in the block: launches of ours on an H100, and PyTorch's operators."""
    with record("sm90") as launches, Counting(inside_ours=True) as operators:
        yield lambda: len(launches) + operators.computing().total()


def _launches(run: Callable[[], tuple[Tensor, Tensor]], counted: Counted, with_backward: bool) -> int:
    with torch.set_grad_enabled(with_backward), _counting() as total:
        out = run()
        if with_backward:
            counted.backward(out)
        return total()


def _launch_row(make: Callable[[Recursion], tuple[Counted, Callable[[], Any]]]) -> list[float]:
    """One row of LAUNCH_COLUMNS. An evaluation counts half of what one more step (two layers) starts."""
    row = []
    for with_backward in (False, True):
        one, two = (
            _launches(run, counted, with_backward)
            for counted, run in (make(W1._replace(num_recursion_steps=n, num_cycles=1)) for n in (1, 2))
        )
        row.append((two - one) / W1.num_layers)
    for with_backward in (False, True):
        counted, run = make(W1)
        row.append(_launches(run, counted, with_backward))
    return row


def count_launches(with_compiled: bool = True) -> Figures:
    """Kernels started by an evaluation of a layer and by W1's whole recursion."""

    def ours(options: dict[str, str], numbers: Recursion) -> tuple[Counted, Callable[[], Any]]:
        counted = Counted(numbers, "meta")
        return counted, partial(counted.ours, **options)

    def papers(numbers: Recursion) -> tuple[Counted, Callable[[], Any]]:
        counted = Counted(numbers._replace(D=64, F=64), "cpu", dtype=torch.float32)
        return counted, partial(counted.eager, PAPER)

    with backend("auto"):
        rows = {name: _launch_row(partial(ours, options)) for name, options in OURS.items()}
    rows[EAGER] = _launch_row(papers)
    if with_compiled:
        rows[COMPILED] = _compiled_row()
    return _figures("kernels started", LAUNCH_COLUMNS, rows)


def _compiled_row() -> list[float]:
    """The same row from inductor's code for one f: calls of its kernels, of products and of attention.

    inductor compiles for the CPU here; its fusions for a GPU may differ. The sums of gradients over the uses
    of a weight are outside f and are left out.
    """
    counted = Counted(W1._replace(num_recursion_steps=1, num_cycles=1), "cpu", tokens=16)
    forward = _calls_in_generated_code(counted, with_backward=False)
    both = _calls_in_generated_code(counted, with_backward=True)
    calls = W1.num_cycles * (W1.num_recursion_steps + 1)
    with_gradient = W1.num_recursion_steps + 1
    L, sums = W1.num_layers, W1.num_cycles  # of y and x, once a cycle
    whole = [calls * forward + sums, (calls - with_gradient) * forward + with_gradient * both + sums]
    return [forward / L, both / L, *whole]


def _calls_in_generated_code(counted: Counted, with_backward: bool) -> int:
    from torch._inductor.utils import run_and_get_code

    torch.compiler.reset()
    compiled = torch.compile(eager.f, fullgraph=True)
    angles = Angles(*(torch.cat((t, t), dim=-1)[:, :, None] for t in counted.angles))

    def run() -> None:
        with torch.set_grad_enabled(with_backward):
            out = compiled(counted.x, counted.x, counted.weights, angles, counted.numbers, PLAIN)
            if with_backward:
                torch.autograd.grad(out, [counted.x, *counted.flat], torch.empty_like(out))

    _, files = run_and_get_code(run)
    called = r"(?:extern_kernels\.\w+|torch\.ops\.aten\.\w+\.\w+|cpp_fused\w*)\("
    found = sum(len(re.findall(called, file[file.index("def call") :])) for file in files)
    torch.compiler.reset()
    return found


def count_decode(with_compiled: bool = True) -> Figures:
    """Kernels that the TRMs of level 1 start for one token of generate(), beyond those of the base.

    Batch 1, a dynamic cache, everything in bfloat16. Per op these are the recursions, the projections around
    them, and RoPE's table, which is made once for both. In one launch it is one for each injection point.
    """
    preset = "llama_2_7b_level1"
    rows = {}
    for name, regime in (("launched per op", "per_op"), ("in one launch", "one_launch")):
        config = getattr(PresetConfigs, preset)()
        config.trm_regime, config.trm_dtype = regime, "bfloat16"
        model = on_meta(config, KNOWN_BASES[PRESET_BASES[preset]]).bfloat16().eval()
        with_trms = _launches_of_a_token(model)
        with model.disable_injection():
            rows[name] = [float(with_trms - _launches_of_a_token(model))]
    return _figures("kernels started by the TRMs of level 1", ("a token",), rows)


@torch.no_grad()
def _launches_of_a_token(model: HybridModel) -> int:
    """The launches of a token after a prompt and a first token, so that the dynamic cache has room."""
    ids, cache = torch.zeros(1, 8, dtype=torch.long, device="meta"), None
    for first, end in ((0, 8), (8, 9), (9, 10)):
        positions = torch.arange(first, end, device="meta")[None]  # as generate() gives them
        how = {"position_ids": positions, "use_cache": True, **as_argument(cache)}
        with backend("auto"), _counting() as total:
            cache = model(ids[:, : end - first], **how).past_key_values
            count = total()
    return count


def count_saved(with_compiled: bool = True) -> Figures:
    """Bytes kept for backward, for a token and an evaluation of a layer, at d 512.

    Computed from differences: of one more step, which is two evaluations, and of 16 more tokens. The second
    leaves out what does not grow with the text (a cast weight, kept at each use).
    """
    one_cycle = W1._replace(num_cycles=1)

    def per_token(
        run: Callable[[Counted], Any], device: str, dtype: torch.dtype = torch.bfloat16
    ) -> list[float]:
        kept = {}
        for n in (1, 2):
            for tokens in (16, 32):
                counted = Counted(one_cycle._replace(num_recursion_steps=n), device, tokens, dtype)
                known = (counted.x, *counted.flat, *counted.angles)
                kept[n, tokens] = nbytes(storages_kept(partial(run, counted), known))
        more = kept[2, 32] - kept[1, 32] - (kept[2, 16] - kept[1, 16])
        return [more / 16 / W1.num_layers]

    rows = {EAGER: per_token(lambda counted: counted.eager(PAPER), "cpu", torch.float32)}
    if with_compiled:
        torch.compiler.reset()
        # the partitioner and the decompositions of torch.compile, without its code
        compiled = torch.compile(eager.f, backend="aot_eager_decomp_partition", fullgraph=True)
        rows[COMPILED] = per_token(lambda counted: counted.eager(PLAIN, compiled), "cpu")
        torch.compiler.reset()
    with record("sm90"):
        for save in SAVES:
            rows[f"ours, save={save}"] = per_token(
                lambda counted, save=save: counted.ours(save),  # type: ignore[misc]
                "meta",
            )
    return _figures("bytes kept for backward", ("bytes per token and evaluation",), rows)


def count_parameters() -> Figures:
    """Parameters of the presets, from the modules."""
    rows = {}
    for preset, base in PRESET_BASES.items():
        counts: Counter[str] = Counter()
        for part in parts(on_meta(getattr(PresetConfigs, preset)(), KNOWN_BASES[base])):
            counts["base" if part.name == "base" else "trm"] += part.parameters
        rows[preset] = [float(counts["base"]), float(counts["trm"])]
    return _figures("parameters", ("base", "TRM"), rows)


COUNTS: dict[str, Callable[[bool], Figures]] = {
    "launches": count_launches,
    "decode": count_decode,
    "saved": count_saved,
    "parameters": lambda with_compiled: count_parameters(),
}


def _figures(what: str, columns: tuple[str, ...], rows: dict[str, list[float]]) -> Figures:
    tidy = {name: [int(v) if v == int(v) else v for v in row] for name, row in rows.items()}
    return {"what": what, "torch": torch.__version__.split("+")[0], "columns": list(columns), "rows": tidy}


# Written and compared


def load(name: str, folder: Path = FOLDER) -> Figures:
    figures: Figures = json.loads((folder / f"{name}.json").read_text())
    return figures


def write(name: str, figures: Figures, folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = re.sub(
        r"\[\s+([^\[\]]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", json.dumps(figures, indent=1)
    )
    (folder / f"{name}.json").write_text(text + "\n")


def changes(old: Any, new: Any, path: str = "") -> list[str]:
    """The differences between two trees of numbers, a line each with both figures. Less is better."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        at = [f"{path}, {key}" if path else str(key) for key in keys]
        return [
            line for key, p in zip(keys, at, strict=True) for line in changes(old.get(key), new.get(key), p)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i in range(len(old)) for line in changes(old[i], new[i], f"{path} [{i}]")]
    if old == new:
        return []
    verdict = "changed"
    if isinstance(old, int | float) and isinstance(new, int | float):
        verdict = "WORSE" if new > old else "better"
    return [f"{path}: {old} -> {new}, {verdict}"]


def _named(figures: Figures, of_ours: bool) -> dict[str, dict[str, float]]:
    """The rows with their columns' names; with of_ours those that do not depend on PyTorch's version."""
    rows = figures["rows"].items()
    return {
        name: dict(zip(figures["columns"], row, strict=True))
        for name, row in rows
        if not of_ours or name not in (EAGER, COMPILED)
    }


def check(name: str, old: Figures, new: Figures) -> list[str]:
    """What got worse or changed since `old` was written. Rows that were not counted now are left out."""
    of_ours = old["torch"] != new["torch"]  # eager and compiled code are another version's then
    before, now = _named(old, of_ours), _named(new, of_ours)
    before = {row: figures for row, figures in before.items() if row in now or row != COMPILED}
    return [f"{name}: {line}" for line in changes(before, now)]
