"""How time is read: interleaved, on the device, as a median with its spread.

kinds of run    warm: repeated on the same tensors. flushed: after the L2 cache was overwritten
interleaved     a, b, a, b, ... in one process, so that a change of the clock rate affects both
on a GPU        events before and after a whole step; on a CPU the host's clock
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]
Spread = dict[str, float]

FLUSH_BYTES = 256 << 20  # four times the largest L2 here (H100 50 MB, H200 60 MB, RTX 4090 72 MB)
_QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"


def spread(milliseconds: list[float]) -> Spread:
    """Median, 20th and 80th percentile, and the number of samples."""
    ordered = sorted(milliseconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {"ms": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8), "runs": len(ordered)}


def ratios(of: list[float], to: list[float]) -> Spread:
    """of / to, pair by pair: above 1 where `to` is the faster."""
    found = spread([a / b for a, b in zip(of, to, strict=True)])
    return {"ratio": found["ms"], "p20": found["p20"], "p80": found["p80"], "runs": found["runs"]}


class Timer:
    """Measures times on one device."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.cold = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def once(self, run: Run) -> float:
        """Seconds of one run on the host's clock, the device idle before and after."""
        self.wait()
        begin = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - begin

    def interleaved(
        self, runs: Mapping[str, Run], seconds: float, most: int = 60, flushed: bool = False
    ) -> dict[str, list[float]]:
        """Milliseconds of each, in as many rounds as fit into `seconds`: at least 5, at most `most`."""
        one_round = sum(self.once(run) for run in runs.values())  # warms up as well
        one_round = min(one_round, sum(self.once(run) for run in runs.values()))
        rounds = max(5, min(most, int(seconds / max(one_round, 1e-6))))
        found: dict[str, list[float]] = {name: [] for name in runs}
        names = list(runs)
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):  # none is always the first
                found[name].append(self._one(runs[name], flushed))
        return found

    def _one(self, run: Run, flushed: bool) -> float:
        if not self.on_gpu:
            return self.once(run) * 1e3
        if flushed and self.cold is not None:
            self.cold.zero_()
        torch.cuda.synchronize()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last))


def captured(run: Run) -> Run:
    """A CUDA graph of `run`; calling it replays the graph and gives the tensors it writes.

    Errors: RuntimeError without a GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs a CUDA device, and PyTorch finds none")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def peak_bytes(run: Run, device: str) -> int | None:
    """The peak bytes that `run` allocates on a GPU beyond what is allocated already."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    del out
    return torch.cuda.max_memory_allocated() - before


def card_state() -> dict[str, str]:
    """Clocks, power and temperature as nvidia-smi reads them now; read only, never set."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"nvidia-smi": f"{type(error).__name__}"}
    if done.returncode != 0:
        return {"nvidia-smi": (done.stdout + done.stderr).strip()[:200]}
    return dict(
        zip(
            _QUERY.split(","), (part.strip() for part in done.stdout.splitlines()[0].split(",")), strict=False
        )
    )
