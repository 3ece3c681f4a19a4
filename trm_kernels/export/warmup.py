"""Compile what a TRM will launch before it does, into Triton's cache, with or without the GPU.

    python -m trm_kernels.warmup --variants native/variants.toml --name level1 --arch 90 [--training]

The first call of a kernel compiles it, which takes seconds for each; a later process finds it in Triton's
cache (TRITON_CACHE_DIR). This fills the cache before anybody waits: while an image is built, say, on a
machine without a GPU. The TRM runs on "meta" tensors, and what it launches goes Triton's own way up to where
a GPU is needed, so that the cache has it under the very same key. A second run shows the difference in time.

Triton compiles a kernel anew where a number becomes 1, or a multiple of 16, or stops being one. So each of
the calls is made with one sequence and with several, with whole blocks of 16 tokens and without; the largest
has more rows than any limit of the settings' table.
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trm_kernels.export.compile import SHARED_LIMIT
from trm_kernels.export.launch_plan import DTYPES, Variant
from trm_kernels.export.native import read_variants
from trm_kernels.modules.trm import TRM
from trm_kernels.runtime.launch import Launch, record

_BATCHES = (1, 2, 16, 64)  # in rows: every range of tuning.row_limits
_TOKENS = (47, 48)
_PAST = (46, 47, 271, 287)  # and one more: S is a multiple of 16 and none, in one part and in two


def module_of(variant: Variant, device: str = "meta", dtype: torch.dtype | None = None) -> TRM:
    """The TRM of a variant, without memory or on a device; in the variant's dtype or another."""
    v = variant
    return TRM(
        v.hidden_size,
        v.num_heads,
        v.num_layers,
        num_key_value_heads=v.num_key_value_heads,
        intermediate_size=v.intermediate_size,
        num_recursion_steps=v.num_recursion_steps,
        num_cycles=v.num_cycles,
        causal=v.causal,
        rope_theta=v.rope_theta,
        eps=v.eps,
        device=device,
        dtype=dtype or DTYPES[v.dtype],
    )


def launches_of(variant: Variant, arch: str, is_training: bool = False) -> Iterator[Launch]:
    """What the TRM of a variant starts on `arch`, over calls of several sizes."""
    module = module_of(variant)
    for B in _BATCHES:
        for T in _TOKENS:
            yield from _forward(module, arch, B, T, is_training)
            if variant.causal:
                yield from _cached(module, arch, B, T, 0)
        for past in _PAST if variant.causal else ():
            yield from _cached(module, arch, B, 1, past)


def _forward(module: TRM, arch: str, B: int, T: int, is_training: bool) -> list[Launch]:
    x = torch.empty(B, T, module.hidden_size, dtype=module.y_init.dtype, device="meta")
    with torch.set_grad_enabled(is_training), record(arch) as launches:
        y, _ = module(x)
        if is_training:
            y.sum().backward()
    return launches


def _cached(module: TRM, arch: str, B: int, T: int, past: int) -> list[Launch]:
    """A prefill or a step of decoding, over a cache with room for more, as hybrid/model/cache.py grows it."""

    def update_cache(evaluation: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        room = (t.new_empty(*t.shape[:2], 2 * (past + T), t.shape[3]) for t in (k, v))
        keys, values = (t[:, :, : past + T] for t in room)
        return keys, values

    x = torch.empty(B, T, module.hidden_size, dtype=module.y_init.dtype, device="meta")
    positions = torch.empty(1, T, dtype=torch.int64, device="meta")
    with torch.no_grad(), record(arch) as launches:
        module(x, positions=positions, update_cache=update_cache)
    return launches


class _Driver:
    """What Triton asks about a GPU before it starts a kernel on it."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch[2:]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def as_if_on(arch: str) -> Iterator[None]:
    """Has Triton compile for `arch`, whether or not there is such a GPU."""
    import triton

    triton.runtime.driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        if torch.cuda.is_available():  # else there is no other driver
            triton.runtime.driver.reset_active()


def compile_as_launched(calls: Iterable[Launch], arch: str) -> int:
    """Have Triton compile what these launches need, launching nothing; returns how many kernels there are."""
    hashes, kernels = set(), {}
    with as_if_on(arch):
        for call in calls:
            kernels[id(call.kernel)] = call.kernel
            hashes.add(call.kernel.run(*call.args, grid=call.grid, warmup=True, **call.meta).hash)
    for kernel in kernels.values():
        kernel.device_caches.clear()  # device 0 may be another GPU
    return len(hashes)


def warm_up(variant: Variant, arch: str, is_training: bool = False) -> int:
    """Fills the cache; returns how many kernels there are."""
    return compile_as_launched(launches_of(variant, arch, is_training), arch)


def _arch_here() -> int:
    if not torch.cuda.is_available():
        raise SystemExit("warmup: expected --arch on a machine without a GPU, such as --arch 90, got none.")
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def main(argv: list[str] | None = None) -> int:
    """Fill the cache, and say what took how long."""
    parser = argparse.ArgumentParser(
        prog="python -m trm_kernels.warmup", description=__doc__.split("\n\n")[0]
    )
    known = sorted(int(arch[2:]) for arch in SHARED_LIMIT)
    parser.add_argument("--variants", type=Path, required=True, help="TOML file such as native/variants.toml")
    parser.add_argument("--name", nargs="+", help="variants in it; default all")
    parser.add_argument(
        "--arch", type=int, choices=known, metavar="N", help="default: the GPU of this machine"
    )
    parser.add_argument("--training", action="store_true", help="the backward as well")
    chosen = parser.parse_args(argv)
    arch = f"sm{chosen.arch or _arch_here()}"
    try:
        variants = read_variants(chosen.variants)
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(chosen.name or ()) - {v.name for v in variants}:
        parser.error(f"expected names among {[v.name for v in variants]}, got {sorted(unknown)}")
    for variant in variants:
        if chosen.name is None or variant.name in chosen.name:
            start = time.perf_counter()
            kernels = warm_up(variant, arch, chosen.training)
            print(f"{variant.name}: {kernels} kernels for {arch} in {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
