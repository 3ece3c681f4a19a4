"""The tables of docs/, from bench/results/** and the planner: no number by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; `python -m bench tables` writes all anew.
"""

from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

from bench import static
from bench.measure import roofline
from bench.peers.workloads import WORKLOADS
from bench.report.figures import RESULTS, Measured, ms, read, table
from hybrid.bases import KNOWN_BASES, LEVELS, PRESET_BASES
from hybrid.cli import main
from hybrid.demo.marked_tables import with_tables
from hybrid.plan.cards import CARDS
from hybrid.plan.fit import fit
from hybrid.plan.guide import LEVEL_HARDWARE
from hybrid.plan.memory import memory
from hybrid.plan.run import Run
from hybrid.plan.table import text_tokens
from hybrid.plan.work import speed, work
from hybrid.presets import PRESETS

DOCS = Path(__file__).parents[2] / "docs"
LEVEL_PAGES = {level: DOCS / f"level-{level}.md" for level in LEVELS}
PAGES = (
    *(DOCS / f"{name}.md" for name in ("points-and-width", "kernels", "one-launch", "benchmarks", "planner")),
    *LEVEL_PAGES.values(),
)
# the guide's cards and text
PLANNED = {
    1: "--cards 1xA100-80GB --gigabytes 1",
    2: "--cards 1xA100-80GB --gigabytes 10",
    3: "--cards 8xA100-80GB --gigabytes 100",
    4: "--cards 16xH100-80GB --gigabytes 1000",
}


def number(value: float) -> str:
    """With commas, and a fraction only where there is one."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def launches() -> str:
    figures = static.load("launches")
    rows = [[name, *map(number, row)] for name, row in figures["rows"].items()]
    return table(("kernels started by", *figures["columns"]), rows)


def decode() -> str:
    rows = static.load("decode")["rows"].items()
    return table(("the TRMs of level 1", "kernels a token"), [[name, number(row[0])] for name, row in rows])


def saved_bytes() -> str:
    figures = static.load("saved")
    most = figures["rows"][static.EAGER][0]
    rows = [[name, number(row[0]), f"1/{most / row[0]:.1f}"] for name, row in figures["rows"].items()]
    return table(("kept for backward", "bytes per token and evaluation", "of eager's"), rows)


def parameters() -> str:
    figures = static.load("parameters")
    rows = [
        [f"`{name}`", number(base), number(trm), number(base + trm)]
        for name, (base, trm) in figures["rows"].items()
    ]
    return table(("preset", "base", "TRM", "together"), rows)


def resources() -> str:
    """The maxima over all kernels, a row for each architecture."""
    rows = []
    for arch, cases in static.load("resources")["kernels"].items():
        # of each kernel three figures, and behind them its fingerprint
        used = [figures[:3] for kernels in cases.values() for figures in kernels.values()]
        registers, stack, shared = (max(column) for column in zip(*used, strict=True))
        rows.append([arch, number(len(used)), number(registers), number(stack), number(shared)])
    columns = (
        "architecture",
        "kernels",
        "registers a thread",
        "stack, bytes a thread",
        "shared, bytes a block",
    )
    return table(columns, rows)


def predicted() -> str:
    """Predicted floors of each workload, in milliseconds."""
    rows = []
    for workload in WORKLOADS:
        row = [f"{workload.name}: {workload.title}"]
        for name, card in roofline.CARDS.items():
            floors = [
                roofline.floor_ms(workload, workload.batch[name], way, card)[1] for way in roofline.WAYS
            ]
            row.append(f"{' / '.join(map(ms, floors))} ({workload.batch[name]})")
        rows.append(row)
    return table(["predicted floor, ms: eager / torch.compile / ours (batch)", *roofline.CARDS], rows)


def measured() -> str:
    """Workloads by measured device: ours in milliseconds, and how much faster it is than others."""
    found = [m for m in read([RESULTS]) if m.kind != "flushed"]
    devices = list(dict.fromkeys(m.device for m in found))
    if not devices:
        return "No card has been measured yet."
    rows = []
    for workload in WORKLOADS:
        row = [workload.name]
        for device in devices:
            row += _measured_cells([m for m in found if (m.device, m.workload) == (device, workload.name)])
        rows.append(row)
    columns = [
        f"{device}: {what}"
        for device in devices
        for what in ("ours, ms", "faster than eager by", "than the best torch.compile by")
    ]
    return table(["", *columns], rows)


def _measured_cells(found: list[Measured]) -> list[str]:
    """Ours, and the ratios of the others' medians to it: the better of plain and CUDA graph for each."""

    def best(*begins: str) -> float | None:
        return min((m.ms for m in found if m.ms and m.peer.startswith(begins)), default=None)

    ours, eager, compiled = best("ours"), best("eager", "TRM paper"), best("torch.compile")
    if ours is None:
        return ["", "", ""]
    return [ms(ours), *("" if other is None else f"{other / ours:.2f}" for other in (eager, compiled))]


def plan_of_level(level: int) -> str:
    """The plan of a level on the guide's hardware in short: a row for phase 1 and one for phase 2."""
    cards, card = LEVEL_HARDWARE[level]
    base = PRESET_BASES[LEVELS[level]]
    run = Run(base, KNOWN_BASES[base], PRESETS[LEVELS[level]](), CARDS[card], cards)
    rows = []
    for phase, dtype in ((1, "bfloat16"), (2, "float32")):
        asked = run.but(phase=phase, dtype=dtype)
        found = fit(asked)
        fitting = found.run or asked
        taken, fast = memory(fitting), speed(fitting)
        per_gb = text_tokens(1) / fast.tokens_per_second / 86400
        rows.append(
            [
                f"{phase}, {cards}x {card}",
                f"{memory(asked).total / 1e9:,.1f}",
                "; ".join(found.changes) or "nothing",
                f"{taken.total / 1e9:,.1f}",
                f"{work(fitting).total.all / 1e9:,.0f}",
                f"{fast.tokens_per_second:,.0f}",
                f"{per_gb:,.2f}",
                f"{24 * per_gb * fitting.cards:,.0f}",
            ]
        )
    columns = (
        "phase, cards",
        "GB a card",
        "what makes it fit",
        "GB a card then",
        "GFLOP a token",
        "tokens/s at most",
        "days a GB of text",
        "GPU-hours a GB",
    )
    return table(columns, rows)


def plan_output(level: int) -> str:
    """What `trm-hybrid plan` prints for a level on its page's cards, in both phases."""
    parts = []
    for phase in (1, 2):
        argv = ["plan", "--level", str(level), "--phase", str(phase), *PLANNED[level].split()]
        with redirect_stdout(StringIO()) as out:
            assert main(argv) == 0
        parts.append(f"    trm-hybrid {' '.join(argv)}\n\n```text\n{out.getvalue().rstrip()}\n```")
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    "launches": launches,
    "decode": decode,
    "saved-bytes": saved_bytes,
    "parameters": parameters,
    "resources": resources,
    **{f"plan-level-{level}": partial(plan_of_level, level) for level in LEVELS},
    **{f"plan-output-{level}": partial(plan_output, level) for level in LEVELS},
    "predicted": predicted,
    "measured": measured,
}


def rewritten(text: str) -> str:
    """The text with every table in it made anew. Raises ValueError as with_tables does."""
    return with_tables(text, TABLES, "tables")


def rewrite(path: Path) -> bool:
    """Make the tables of a page anew. Returns whether the file changed."""
    old = path.read_text(encoding="utf-8")
    new = rewritten(old)
    if new != old:
        path.write_text(new, encoding="utf-8")
    return new != old


def rewrite_pages() -> list[Path]:
    """Make the tables of all pages anew. Returns the pages that changed."""
    return [page for page in PAGES if rewrite(page)]
