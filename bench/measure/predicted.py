"""The workloads' times on a card, predicted kernel by kernel from machine code, torch.compile's beside them

    python -m bench static --cost     print it, and write bench/results/static/cost.json

A step of ours is run on tensors without numbers, and what it starts is kept. A kernel that multiplies takes
the cycles of cycles.py at its grid, and its bytes through device memory; a kernel overlaps both in part, so
their squares are added. Any other takes its bytes. Products and attention of libraries run at assumed rates,
the same for torch.compile, whose kernels are listed in roofline.py. A kernel in a CUDA graph takes GAP too,
and a library's LEAST at least. One launch of the whole recursion: one_launch.py.

None of it is a measurement. What it is for: to see what a change of a kernel or of a setting gains or loses
where there is no GPU, and which kernel is farthest behind.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import roofline
from bench.measure.cycles import MULTIPROCESSORS, KernelCost, kernel_cost
from bench.measure.one_launch import seconds
from bench.peers import solvers
from bench.peers.workloads import WORKLOADS, Workload
from trm_kernels.export.compile import compile_for
from trm_kernels.recursion.one_launch.kernel import one_launch_kernel
from trm_kernels.runtime.launch import LAUNCHERS, Launch, record, tensors_of

GAP = 1.5e-6  # seconds between two kernels of a graph
LEAST = 2.5e-6  # of a library's product or attention, however small
RECORDED_CARD = "h200"


@dataclass(frozen=True)
class LibraryRates:
    """What a card's libraries are assumed to reach, in FLOP/s."""

    short: float  # products that sum up to 1536 numbers an element
    long: float  # others
    matrix: float  # gradients of a matrix, which sum over all rows
    attention: tuple[float, float]  # forward and backward, heads of 64
    wide_attention: tuple[float, float]  # of 128
    clock: float  # cycles a second under load

    def product(self, summed: int, of_matrix: bool) -> float:
        """Of a product that sums so many numbers an element."""
        return self.matrix if of_matrix else self.short if summed <= 1536 else self.long


# Assumed, after what cuBLAS, cuDNN and FlashAttention are reported to reach on these cards under load
_HOPPER = LibraryRates(540e12, 730e12, 600e12, (420e12, 360e12), (520e12, 450e12), 1.65e9)
RATES = {
    "rtx4090": LibraryRates(140e12, 150e12, 140e12, (140e12, 110e12), (150e12, 115e12), 2.4e9),
    "a100": LibraryRates(230e12, 260e12, 240e12, (180e12, 140e12), (200e12, 160e12), 1.35e9),
    "h100": _HOPPER,
    "h200": _HOPPER,
}
ARCHS = {"rtx4090": "sm89", "a100": "sm80", "h100": "sm90", "h200": "sm90"}
# PyTorch's flash attention beside cuDNN's on Hopper, forward and backward; the latter in one order of sums
_OF_FLASH = 0.75, 0.65
# a short sequence leaves most of a library's tile empty: 97 tokens take the time of 128, and start often
_SHORT_TOKENS, _OF_SHORT = 256, 0.7


class Library(NamedTuple):
    """A call of PyTorch that starts a kernel."""

    name: str
    flops: float
    bytes: float
    summed: int = 0
    of_matrix: bool = False
    attends: str = ""  # "forward", "backward"
    tokens: int = 0
    width: int = 0  # of a head


Event = Launch | Library


def _nbytes(t: Tensor) -> int:
    """Bytes of its own: an axis along which it does not move has one element."""
    moves = zip(t.shape, t.stride(), strict=True)
    return prod(size for size, stride in moves if stride) * t.element_size()


class _Events(TorchDispatchMode):
    """Keeps PyTorch's calls that compute, in order, between the launches."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        if op.namespace == "trm_kernels":
            with self:
                return LAUNCHERS[name](*args, **kwargs)
        out = op(*args, **kwargs)
        if not (op.is_view or "empty" in name or name in ("detach", "_unsafe_view", "_reshape_alias")):
            self.events.append(_library(name, [a for a in args if isinstance(a, Tensor)], out))
        return out


def _library(name: str, inputs: list[Tensor], out: Any) -> Library:
    outs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
    moved = float(sum(map(_nbytes, inputs)) + sum(map(_nbytes, outs)))
    if "scaled_dot_product" in name:
        # q, k and v [B, H, T, K] are the first, or the ones behind the gradient of what came out
        is_back = "backward" in name
        q, k = inputs[is_back : is_back + 2]
        flops = 4.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        way = "backward" if is_back else "forward"
        flops *= 2.5 if is_back else 1
        return Library(name, flops, moved, 0, False, way, int(k.shape[2]), int(q.shape[3]))
    if name in ("mm", "addmm", "addmm_"):
        a, b = inputs[-2:]
        M, K, N = a.shape[0], a.shape[1], b.shape[1]
        return Library(name, 2.0 * M * N * K, moved, int(K), of_matrix=4 * max(M, N) < K)
    return Library(name, 0.0, moved)


def events(workload: Workload, batch: int, arch: str, solver: solvers.Solver) -> list[Event]:
    """What one step starts, in order."""
    problem = workload.make(batch, "meta")
    found: list[Event] = []
    with record(arch) as launches, _Events(launches):  # one list: in the order in which they come
        problem.step(solver)()
        found += launches
    return found


@dataclass(frozen=True)
class Predicted:
    """All launches of one kernel in a step, with the same settings and sizes."""

    name: str
    count: int
    seconds: float  # of all of them
    flops: float = 0.0  # of all of them
    cost: KernelCost | None = None
    waves: float = 0.0
    label: str = ""  # what the record calls it


def _seconds(compute: float, moved: float, card: str, least: float = 0.0) -> float:
    memory = moved / roofline.CARDS[card].bytes_per_s
    return max(float((compute**2 + memory**2) ** 0.5), least) + GAP


def of_library(call: Library, card: str, causal: bool) -> float:
    """Seconds."""
    rates = RATES[card]
    if call.attends:
        both = rates.wide_attention if call.width > 64 else rates.attention
        is_back = call.attends == "backward"
        rate = both[is_back] * (_OF_SHORT if call.tokens < _SHORT_TOKENS else 1.0)
        if ARCHS[card] == "sm90" and "flash" in call.name:
            rate *= _OF_FLASH[is_back]
        return _seconds(call.flops * (0.5 if causal else 1.0) / rate, call.bytes, card, LEAST)
    if not call.flops:
        return _seconds(0.0, call.bytes, card)
    return _seconds(call.flops / rates.product(call.summed, call.of_matrix), call.bytes, card, LEAST)


def of_launch(call: Launch, card: str) -> Predicted:
    """One launch of ours."""
    arch = ARCHS[card]
    kernel = compile_for(call, arch)
    cost = kernel_cost(kernel, call.meta.get("num_stages", 1))
    pointers = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors_of(call.args)}
    moved = float(sum(map(_nbytes, pointers.values())))
    programs = prod(call.grid)
    if cost is None:
        return Predicted(kernel.name, 1, _seconds(0.0, moved, card))
    sms = MULTIPROCESSORS[arch].count
    rounds = times_around(call)
    compute = cost.of_grid(programs, rounds, sms) / RATES[card].clock
    waves = programs / (sms * cost.blocks)
    tile = "x".join(str(call.meta[n]) for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "KEYS") if n in call.meta)
    label = f"{kernel.name.strip('_')}, {programs} programs of {tile}, {rounds:g} times around"
    return Predicted(kernel.name, 1, _seconds(compute, moved, card), _flops(call), cost, waves, label)


def _named(call: Launch) -> dict[str, Any]:
    return dict(zip(call.kernel.arg_names, call.args, strict=False)) | call.meta


def times_around(call: Launch) -> float:
    """How often a program goes around its main loop, on average over the grid; 0 without a loop."""
    a, name = _named(call), call.kernel.fn.__name__
    if "KEYS" in a:
        return float(a["KEYS"] // a["BLOCK_N"])
    if "BLOCK_K" in a and "K" in a:
        return float(-(-a["K"] // a["BLOCK_K"]))
    if not name.startswith("rope_attention") or "tile" in name:
        return 0.0
    of_rows = a["T"], a["BLOCK_M"], a["S"], a["BLOCK_N"]  # a program has some queries, and goes along keys
    if "dkv" in name:
        of_rows = *of_rows[2:], *of_rows[:2]
    rows, of_a_program, others, at_a_time = of_rows
    seen = [-(-others // at_a_time)]
    if a["IS_CAUSAL"]:  # as many queries see a key as keys a query, on average
        ends = range(of_a_program, rows + of_a_program, of_a_program)
        seen = [-(-min(others, end) // at_a_time) for end in ends]
    return sum(seen) / len(seen) * (a["GROUP"] if "dkv" in name else 1)


def _flops(call: Launch) -> float:
    """Operations that the result needs; attention's backward has five products for the forward's two."""
    a, name = _named(call), call.kernel.fn.__name__
    if "BLOCK_K" in a and "K" in a and "M" in a:
        weights = 2 if "linear_swiglu_fwd" in name else 1
        return 2.0 * a["M"] * a["N"] * a["K"] * weights
    if name.startswith("rope_attention"):
        q = a["q_ptr"]
        attended = 4.0 * q.shape[0] * a["H"] * a["T"] * a["S"] * a["K"] * (0.5 if a["IS_CAUSAL"] else 1.0)
        return attended * {"fwd": 1.0, "dq": 1.5, "dkv": 2.0, "tile": 2.5}[name.split("_")[-2]]
    return 0.0


def step(workload: Workload, card: str, solver: solvers.Solver) -> list[Predicted]:
    """A step of ours, a row for each kernel and size, the longest first."""
    rows: dict[Any, Predicted] = {}
    known: dict[Any, Predicted] = {}
    causal = workload.numbers is not None and workload.numbers.causal
    for event in events(workload, workload.batch[card], ARCHS[card], solver):
        if isinstance(event, Library):
            what = f"{event.name} {event.attends}" if event.attends else event.name
            of_dw = " of a matrix" if event.of_matrix else ""
            key: Any = (what + of_dw, event.summed > 1536)
            one = Predicted(f"PyTorch: {what}{of_dw}", 1, of_library(event, card, causal), event.flops)
        else:
            sizes = tuple((tuple(t.shape), t.stride()) for t in tensors_of(event.args))
            exact = event.kernel, event.grid, sizes, tuple(event.meta.items())
            if exact not in known:
                known[exact] = of_launch(event, card)
            one = known[exact]
            key = one.name, one.label, one.cost
        if key not in rows:
            rows[key] = replace(one, count=0, seconds=0.0, flops=0.0)
        so_far = rows[key]
        rows[key] = replace(
            so_far,
            count=so_far.count + 1,
            seconds=so_far.seconds + one.seconds,
            flops=so_far.flops + one.flops,
        )
    return sorted(rows.values(), key=lambda row: -row.seconds)


def torch_compile(workload: Workload, card: str) -> float:
    """Seconds of torch.compile with the library's best attention, from the kernels that roofline.py lists."""
    n, rates = workload.numbers, RATES[card]
    width = 64 if n is None else n.D // n.H
    both = rates.wide_attention if width > 64 else rates.attention
    of_tokens = _OF_SHORT if workload.tokens < _SHORT_TOKENS else 1.0
    total = 0.0
    for kernel in roofline.kernels_of(workload, workload.batch[card], "torch.compile"):
        if kernel.kind.startswith("attention"):
            rate = both[kernel.kind == "attention_backward"] * of_tokens
        else:
            rate = rates.product(n.D if n else workload.width, "matrix" in kernel.name or "dw" in kernel.name)
        total += _seconds(kernel.flops / rate, kernel.bytes, card, LEAST if kernel.flops else 0.0)
    return total


def one_launch(workload: Workload, card: str) -> float:
    """Seconds of a workload without backward in one launch an injection point, or for all."""
    started = events(workload, workload.batch[card], ARCHS[card], solvers.ours_in_one_launch())
    launches = [e for e in started if isinstance(e, Launch) and e.kernel is one_launch_kernel]
    assert launches and not workload.has_backward
    return sum(seconds(call, card, ARCHS[card], RATES[card].clock) for call in launches)


@dataclass(frozen=True)
class Comparison:
    """A workload on a card: ours, kernel by kernel, and torch.compile."""

    workload: Workload
    rows: list[Predicted]
    compiled: float  # seconds
    in_one_launch: float | None = None  # seconds, of a workload that can

    @property
    def ours(self) -> float:
        """Seconds of a step."""
        return sum(row.seconds for row in self.rows)


def compare(card: str, names: Iterable[str] = ()) -> Iterator[Comparison]:
    """The workloads of these names, or all, one after the other."""
    for workload in WORKLOADS:
        if not names or workload.name in names:
            can = not workload.has_backward and workload.numbers is not None
            yield Comparison(
                workload,
                step(workload, card, solvers.ours()),
                torch_compile(workload, card),
                one_launch(workload, card) if can else None,
            )


def text(found: Comparison, card: str, most: int = 8) -> str:
    """What is predicted of a workload on a card, the longest kernels of ours first."""
    lines = [
        f"{found.workload.name} on {card}, predicted: {1e3 * found.ours:.2f} ms, "
        f"torch.compile {1e3 * found.compiled:.2f} ms, {found.compiled / found.ours:.2f} times as fast"
    ]
    if found.in_one_launch is not None:
        lines[0] += f"; in one launch {1e3 * found.in_one_launch:.2f} ms"
    lines.append(
        f"  {'kernel':<38}{'times':>6}{'ms':>9}{'us each':>9}{'TFLOPS':>8}{'blocks':>7}{'waves':>7}"
        "  cycles a loop: tensor, shared, issue, special"
    )
    for row in found.rows[:most]:
        line = f"  {row.name:<38}{row.count:>6}{1e3 * row.seconds:>9.3f}{1e6 * row.seconds / row.count:>9.1f}"
        line += f"{row.flops / row.seconds / 1e12:>8.0f}"
        if row.cost is not None:
            unit = ", ".join(f"{cycles:.0f}" for cycles in row.cost.loop)
            line += f"{row.cost.blocks:>7}{row.waves:>7.1f}  {unit}"
        lines.append(line)
    if lost := {row: row.seconds - row.flops / RATES[card].long for row in found.rows if row.cost}:
        worst = max(lost, key=lambda row: lost[row])
        lines.append(
            f"  loses most: {worst.name}, {1e3 * lost[worst]:.2f} ms beyond a long library product's time"
        )
    return "\n".join(lines)


def figures(found: Iterable[Comparison]) -> dict[str, Any]:
    """By workload, microseconds of a step and of each kernel of ours that multiplies: less is better."""
    import triton

    rows: dict[str, dict[str, float]] = {}
    for one in found:
        of_workload = rows[one.workload.name] = {"a step": round(1e6 * one.ours, 1)}
        if one.in_one_launch is not None:
            of_workload["in one launch"] = round(1e6 * one.in_one_launch, 1)
        for row in one.rows:
            if row.cost is not None:
                of_workload[row.label] = round(1e6 * row.seconds / row.count, 1)
    what = f"microseconds on an {RECORDED_CARD}, predicted from machine code; nothing was measured"
    return {"what": what, "triton": triton.__version__, "rows": rows}
