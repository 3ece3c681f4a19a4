"""Checksums of a base's tensors: each value counts, and its place; the same on every device.

A tensor is read as 64-bit words w. With odd weights drawn once by splitmix64, its checksum is

    sum over chunks c of V[c] * (sum over words j of W[j] * w[c, j] + H[j] * (w[c, j] >> 32))   modulo 2^64

so that more than one changed value changes it all but always. The upper halves count a second time, as the
upper bits of a product are lost: without H, an even number of turned signs there would change nothing.
Nothing is copied but what is not contiguous; memory is read once, on the tensor's own device. On one
thread of a CPU that others used as well 1.08 GB took 0.37 s (2.9 GB/s, the best of 5). 13.5 GB, a 7B base in
bfloat16, would take 5 s at that rate, which is extrapolated.

Source: multiply-shift hashing of vectors, Dietzfelbinger, 1996; splitmix64, Steele, Lea and Flood, 2014.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hybrid.model.quantized_base import integers, is_quantized_tensor

_CHUNK = 2**17  # words of 8 bytes: 1 MiB, which stays in a CPU's cache
_AT_ONCE = 2**7  # chunks of one multiplication on a GPU
_PRODUCTS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # of splitmix64


def tensor_sums(named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """name -> (dtype, shape, checksum) of each tensor, as it is. Tensors without values are left out."""
    found = {}
    for name, t in named:
        t = integers(t) if is_quantized_tensor(t) else t.detach()
        if t.device.type != "meta":
            found[name] = (str(t.dtype).removeprefix("torch."), tuple(t.shape), _sum(t))
    return found


def digest(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """One checksum of all tensors with their names and shapes, floating ones as they are in `dtype`."""
    lines = []
    for name, t in named:
        t = t.detach()
        t = t.to(dtype) if t.is_floating_point() else t
        lines.append(f"{name} {tuple(t.shape)} {_sum(t)}")
    return _of_lines(lines)


def digest_of_sums(sums: Mapping[str, tuple[str, tuple[int, ...], int]], dtype: str) -> str | None:
    """What `digest` gives of the tensors that were summed; None where one would be cast to `dtype`."""
    if any(name != dtype and getattr(torch, name).is_floating_point for name, _, _ in sums.values()):
        return None
    return _of_lines(f"{name} {shape} {total}" for name, (_, shape, total) in sums.items())


def _of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sum(t: Tensor) -> int:
    """The checksum of one tensor, 0 .. 2^64 - 1."""
    data = t.contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # words begin at whole addresses
        data = data.clone()
    rest = len(data) % 8
    words = data[: len(data) - rest].view(torch.int64)
    sums = _chunk_sums(words)
    if rest:
        tail = torch.zeros(8, dtype=torch.uint8, device=data.device)
        tail[:rest] = data[len(data) - rest :]
        sums.append(tail.view(torch.int64))
    of_chunks = torch.cat(sums).cpu() if sums else torch.zeros(0, dtype=torch.int64)
    weights = torch.from_numpy(_odd_numbers(_CHUNK, len(of_chunks)))
    return int((of_chunks * weights).sum()) % 2**64


def _chunk_sums(words: Tensor) -> list[Tensor]:
    low, high = _weights(words.device)
    if words.device.type == "cpu":
        return [
            (torch.dot(part, low[: len(part)]) + torch.dot(part >> 32, high[: len(part)]))[None]
            for part in words.split(_CHUNK)
            if len(part)
        ]
    whole = len(words) // _CHUNK * _CHUNK  # elsewhere torch has no dot of integers
    parts = [part.view(-1, _CHUNK) for part in words[:whole].split(_CHUNK * _AT_ONCE) if len(part)]
    rest = words[whole:][None]
    parts += [rest] if rest.numel() else []
    return [(part * low[: part.shape[1]] + (part >> 32) * high[: part.shape[1]]).sum(1) for part in parts]


@cache
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """[_CHUNK] each: W and H."""
    low, high = _odd_numbers(0, _CHUNK), _odd_numbers(2 * _CHUNK, _CHUNK)
    return torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)


def _odd_numbers(first: int, count: int) -> np.ndarray:
    """The splitmix64 numbers first .. first + count - 1, made odd, as int64."""
    step, one, two = (np.uint64(p) for p in _PRODUCTS)
    z = (np.arange(first + 1, first + count + 1, dtype=np.uint64)) * step
    z = (z ^ (z >> np.uint64(30))) * one
    z = (z ^ (z >> np.uint64(27))) * two
    return ((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)
