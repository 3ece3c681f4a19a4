"""What this card reaches at best: bytes per second of a copy, operations per second of a bfloat16 product."""

from dataclasses import asdict, dataclass
from functools import partial

import torch

from bench.measure.timing import Timer, spread


@dataclass(frozen=True)
class Ceilings:
    """Ceilings measured in the same run as the times that are compared with them."""

    bytes_per_s: float  # read and written, of a copy far larger than the L2 cache
    flops_per_s: float  # bfloat16, of the largest product below
    flops_by_shape: dict[str, float]  # "M x N x K"


# 8192 cubed, and the products of W1 and W3: rows x columns x summed axis
SHAPES = ((8192, 8192, 8192), (768 * 97, 3072, 512), (768 * 97, 512, 1536), (8192, 11264, 2048))


def calibrate(device: str, is_tiny: bool = False) -> Ceilings:
    """Medians on random numbers, because products of zeros run faster."""
    timer = Timer(device)
    rounds, seconds = (3, 0.1) if is_tiny else (20, 1.0)
    count = 1 << (16 if is_tiny else 31)  # 2 GiB
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = timer.interleaved({"copy": partial(target.copy_, source)}, seconds, rounds)
    bytes_per_s = 2 * count / spread(times["copy"])["ms"] * 1e3
    del source, target
    found = {}
    for M, N, K in ((16, 16, 16),) if is_tiny else SHAPES:
        a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((M, K), (K, N)))
        out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
        times = timer.interleaved({"mm": partial(torch.mm, a, b, out=out)}, seconds, rounds)
        found[f"{M} x {N} x {K}"] = 2 * M * N * K / spread(times["mm"])["ms"] * 1e3
    return Ceilings(bytes_per_s, max(found.values()), found)


def as_facts(ceilings: Ceilings) -> dict[str, object]:
    return asdict(ceilings)
