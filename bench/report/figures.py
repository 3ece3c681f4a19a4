"""Results as Markdown tables and plots, a comparison of two runs, the short table of a GPU run.

It reads the files of bench/gpu.py (a section per stage, see store.py), those of `pytest bench
--benchmark-json`, and folders of such files. Times are medians. p20 and p80 are their spread; in pytest's
files these are the quartiles.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import static
from bench.measure import store
from bench.measure.ceilings import Ceilings
from bench.measure.roofline import CARDS as PREDICTED
from bench.measure.roofline import Reached, floor_ms
from bench.peers.workloads import WORKLOADS, known_card

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Measured:
    """One peer at one workload, on one device."""

    device: str
    workload: str
    peer: str
    kind: str  # "warm", "flushed", or "" where there is no time
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    ours_faster: tuple[float, float, float] | None = None  # this / ours: median, p20, p80, of pairs
    peak_bytes: int | None = None
    first_call_s: float | None = None
    batch: int = 0
    why: str = ""  # why there is no time

    @property
    def key(self) -> tuple[str, str, str]:
        return self.workload, self.peer, self.kind


# Reading


def read(paths: Iterable[Path]) -> list[Measured]:
    """All results in the folders and files; other files of a folder are skipped.

    Errors: ValueError for a file that was named and holds no results.
    """
    paths, found = list(paths), []
    for file in _files(paths):
        content = json.loads(file.read_text())
        if "benchmarks" in content:
            found += [_of_pytest(b) for b in content["benchmarks"]]
        elif "stages" in content:
            for stage in content["stages"].values():
                found += _of_stage(stage)
        elif file in paths:
            raise ValueError(f"report: expected results of bench.gpu or of pytest bench, got {file}.")
    return found


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        inside = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        yield from (p for p in inside if p.parent.name != "static")


def _of_stage(content: dict[str, Any]) -> list[Measured]:
    facts = content["facts"]
    if "workload" not in facts:
        return []
    found = []
    for peer, record in content["records"].items():
        known: dict[str, Any] = {
            "device": facts.get("device", "unknown"),
            "workload": facts["workload"],
            "peer": peer,
            "peak_bytes": record.get("peak_bytes"),
            "first_call_s": record.get("first_call_s"),
            "batch": facts.get("batch", 0),
        }
        kinds = [kind for kind in ("warm", "flushed") if kind in record]
        for kind in kinds:
            times = record[kind]
            pair = times.get("ours_faster")
            faster = None if pair is None else (pair["ratio"], pair["p20"], pair["p80"])
            spread = {name: times[name] for name in ("ms", "p20", "p80")}
            found.append(Measured(**known, kind=kind, ours_faster=faster, **spread))
        if not kinds:
            why = f"{record['state']}: {record.get('why', 'stopped by a time limit')}"
            found.append(Measured(**known, kind="", why=why))
    return found


def _of_pytest(benchmark: dict[str, Any]) -> Measured:
    stats, extra = benchmark["stats"], benchmark["extra_info"]
    milliseconds = (1e3 * stats[name] for name in ("median", "q1", "q3"))
    peer = (benchmark.get("params") or {}).get("peer") or benchmark["name"]
    workload = benchmark["group"] or benchmark["name"]
    known = {"batch": extra.get("batch", 0), "peak_bytes": extra.get("peak_bytes")}
    return Measured(extra.get("device", "unknown"), workload, peer, "warm", *milliseconds, **known)


def ceilings_of(run: Mapping[str, Any]) -> dict[str, Reached]:
    """By device: the ceilings that the first stage of its run measured, for its floors."""
    environment = run.get("environment", {"facts": {}, "records": {}})
    record = environment["records"].get("ceilings", {})
    if record.get("state") != "ok":
        return {}
    measured = Ceilings(record["bytes_per_s"], record["flops_per_s"], record["flops_by_shape"])
    device = environment["facts"].get("device", "unknown")
    return {device: Reached(measured.flops_per_s, measured.bytes_per_s)}


# Tables


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column is left-aligned, the others right-aligned."""
    lines = [f"| {' | '.join(columns)} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def ms(value: float | None) -> str:
    """Milliseconds with three figures."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _times(measured: list[Measured], floor: float | None) -> str:
    rows = []
    for m in measured:
        faster = "" if m.ours_faster is None else "{:.2f} ({:.2f}-{:.2f})".format(*m.ours_faster)
        share = "" if floor is None or m.ms is None else f"{floor / m.ms:.0%}"
        memory = "" if m.peak_bytes is None else f"{m.peak_bytes / 1e9:.2f}"
        first = "" if m.first_call_s is None else f"{m.first_call_s:.1f}"
        spread = "" if m.p20 is None else f"{ms(m.p20)}-{ms(m.p80)}"
        rows.append([m.peer, m.kind or m.why, ms(m.ms), spread, faster, share, memory, first])
    return table(
        ["peer", "", "ms", "p20-p80", "ours is faster by", "of the floor", "peak GB", "first call, s"], rows
    )


def markdown(measured: list[Measured], ceilings: dict[str, Reached]) -> str:
    """A section for each device and workload."""
    parts = ["# Measured", ""]
    for device, name in dict.fromkeys((m.device, m.workload) for m in measured):
        mine = [m for m in measured if (m.device, m.workload) == (device, name)]
        workload = next((w for w in WORKLOADS if w.name == name), None)
        parts += [f"## {name}, {device}", ""]
        floor = None
        if workload is not None and (name_of_card := known_card(device)):
            card, whose = ceilings.get(device), "of the ceilings measured in the same run"
            if card is None:
                card, whose = PREDICTED[name_of_card], f"predicted for {name_of_card}"
            ideal, floor = floor_ms(workload, mine[0].batch, "ours", card)
            parts += [f"{workload.title}; batch {mine[0].batch}.", ""]
            parts += [
                f"Floor, {whose}: {ms(floor)} ms kernel by kernel, {ms(ideal)} ms if all overlapped.",
                "",
            ]
        parts += [_times(mine, floor), ""]
    return "\n".join(parts)


def short_table(path: Path) -> str:
    """A line per workload and a list of failures, for the end of a GPU run."""
    lines = []
    for stage in store.read(path).values():
        if "workload" in stage["facts"]:
            continue
        for what, record in stage["records"].items():
            lines.append(
                f"{what}: {record['state']} {record.get('summary') or record.get('why') or ''}".rstrip()
            )
    measured = read([path]) if path.exists() else []
    for workload in dict.fromkeys(m.workload for m in measured):
        mine = [m for m in measured if m.workload == workload]
        for kind in ("warm", "flushed"):
            timed = [m for m in mine if m.kind == kind]
            if not timed:
                continue
            text = "  ".join(
                f"{m.peer} {ms(m.ms)}" + ("" if m.ours_faster is None else f" (x{m.ours_faster[0]:.2f})")
                for m in timed
            )
            lines.append(f"{workload} {kind}, ms (x: ours is faster by): {text}")
        lines += [f"{workload} {m.peer}: {m.why}" for m in mine if not m.kind]
    return "\n".join(lines)


def compare(a: list[Measured], b: list[Measured]) -> str:
    """Ratios of the first run's times to the second's: above 1 the second is faster."""
    of_b = {m.key: m for m in b if m.ms}
    rows = []
    for one in a:
        other = of_b.get(one.key)
        if other is None or not (one.ms and one.p20 and one.p80 and other.ms and other.p20 and other.p80):
            continue
        low, high = one.p20 / other.p80, one.p80 / other.p20
        verdict = "within noise" if low <= 1 <= high else "faster" if low > 1 else "SLOWER"
        ratio = f"{one.ms / other.ms:.2f} ({low:.2f}-{high:.2f})"
        rows.append([f"{one.workload}, {one.peer}, {one.kind}", ms(one.ms), ms(other.ms), ratio, verdict])
    if not rows:
        return "The two have nothing in common."
    return table(["what", "A, ms", "B, ms", "A / B", "B is"], rows)


# Plots


def plots(measured: list[Measured], ceilings: dict[str, Reached], out: Path) -> list[Path]:
    """Throughput with the floor drawn in, memory by policy, latency against batch."""
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    written = [_plot_memory(out)]
    for device in dict.fromkeys(m.device for m in measured):
        mine = [m for m in measured if m.device == device and m.kind == "warm"]
        card = ceilings.get(device)
        for workload in WORKLOADS:
            if timed := [m for m in mine if m.workload == workload.name]:
                floor = None
                if card is not None and known_card(device):
                    floor = floor_ms(workload, timed[0].batch, "ours", card)[1]
                written.append(_plot_throughput(timed, workload.title, floor, out))
        for family in ("W4", "W6"):
            if timed := [m for m in mine if m.workload.startswith(f"{family}-") and m.batch]:
                written.append(_plot_latency(timed, family, out))
    return written


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


def _plot_throughput(timed: list[Measured], title: str, floor: float | None, out: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(timed) + 1.5))
    timed = timed[::-1]
    axes.barh([m.peer for m in timed], [1e3 / (m.ms or 1) for m in timed])
    if floor is not None:
        axes.axvline(1e3 / floor, color="black", linestyle="--", label=f"floor, {ms(floor)} ms")
        axes.legend()
    axes.set_xlabel("steps a second")
    axes.set_title(f"{title}\n{timed[0].device}, batch {timed[0].batch}", fontsize=9)
    return _save(figure, out / f"throughput-{_slug(timed[0].device)}-{timed[0].workload}.png")


def _plot_memory(out: Path) -> Path:
    from matplotlib import pyplot

    rows = static.load("saved")["rows"]
    figure, axes = pyplot.subplots(figsize=(8, 3))
    axes.barh(list(rows)[::-1], [row[0] for row in rows.values()][::-1])
    axes.set_xlabel("bytes kept for backward, per token and evaluation of a layer, d 512 (counted)")
    return _save(figure, out / "memory-by-policy.png")


def _plot_latency(timed: list[Measured], family: str, out: Path) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for peer in dict.fromkeys(m.peer for m in timed):
        points = sorted((m.batch, m.ms or 0.0) for m in timed if m.peer == peer)
        axes.plot(*zip(*points, strict=True), marker="o", label=peer)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch")
    axes.set_ylabel("ms")
    axes.set_title(f"{family}, {timed[0].device}", fontsize=9)
    axes.legend(fontsize=6)
    return _save(figure, out / f"latency-{_slug(timed[0].device)}-{family}.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def write(paths: list[Path], out: Path) -> str:
    """report.md and its plots in `out`; returns the text."""
    measured = read(paths)
    ceilings: dict[str, Reached] = {}
    for file in _files(paths):
        ceilings |= ceilings_of(json.loads(file.read_text()).get("stages", {}))
    text = markdown(measured, ceilings)
    images = plots(measured, ceilings, out)
    text += "\n".join(f"![{image.stem}]({image.name})" for image in images) + "\n"
    (out / "report.md").write_text(text)
    return text
