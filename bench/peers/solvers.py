"""The peers: functions that each make a solver of the workloads, and functions for the single ops.

A peer whose requirements are missing raises, and is listed with its error. All peers compute in bfloat16 from
the same tensors. torch.compile compiles f, the shared block that the recursion applies repeatedly. Under
"reduce-overhead" it compiles the whole recursion, because the graphs of f would overwrite each other's
results.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import eager as plain
from bench.peers.eager import PAPER, PLAIN, Cache, Parts, Recursion
from bench.peers.workloads import ROPE_THETA, Block, Solver, Workload
from trm_kernels.ops.attention import library as library_attention
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.ops.injection_blend import injection_blend
from trm_kernels.ops.injection_in import injection_in
from trm_kernels.recursion.injection import trm_injection
from trm_kernels.recursion.inputs import CacheRoom
from trm_kernels.recursion.recursion import trm_recursion
from trm_kernels.recursion.weights import InjectionWeights, LayerWeights, map_weights
from trm_kernels.runtime.backend import backend
from trm_kernels.testing.cases import CASES

Op = Callable[..., Any]


def _cast_once(recursion: Callable[..., Any]) -> Callable[..., Any]:
    """Weights cast to the state's dtype at the start, not at every use."""

    def run(x: Tensor, y: Tensor, z: Tensor, weights: Sequence[LayerWeights], *rest: Any) -> Any:
        return recursion(x, y, z, [map_weights(lambda t: t.to(x.dtype), w) for w in weights], *rest)

    return run


def _project_in(parts: Parts, h: Tensor, w_in: Tensor, eps: float) -> Tensor:
    return parts.linear(parts.rms(h, eps), w_in.to(h.dtype))


def _blend(h: Tensor, y: Tensor, w_out: Tensor) -> Tensor:
    return h + F.linear(y, w_out.to(y.dtype))


def _in_pytorch(parts: Parts) -> Solver:
    recursion: Callable[..., tuple[Tensor, Tensor]] = partial(plain.recursion, parts=parts)
    if parts.linear is F.linear:
        recursion = _cast_once(recursion)
    return Solver(recursion, partial(_project_in, parts), _blend)


def _compiled(parts: Parts = PLAIN, **options: Any) -> Solver:
    def project_in(h: Tensor, w_in: Tensor, eps: float) -> Tensor:
        return _project_in(parts, h, w_in, eps)

    f, project_in, blend = (
        torch.compile(it, dynamic=False, **options) for it in (plain.f, project_in, _blend)
    )
    return Solver(_cast_once(partial(plain.recursion, parts=parts, apply_f=f)), project_in, blend)


# Peers of the workloads


def paper() -> Solver:
    """What the TRM paper's code runs, uncompiled."""
    return _in_pytorch(PAPER)


def eager() -> Solver:
    """PyTorch's own norm and SDPA, weights cast once."""
    return _in_pytorch(PLAIN)


def eager_graph() -> Solver:
    return _graphed(eager())


def compiled() -> Solver:
    return _compiled()


def compiled_max_autotune() -> Solver:
    return _compiled(mode="max-autotune-no-cudagraphs")


def compiled_reduce_overhead() -> Solver:
    inner = _compiled(mode="reduce-overhead")
    whole = torch.compile(_cast_once(plain.recursion), dynamic=False, mode="reduce-overhead")
    return replace(inner, recursion=whole, marks_steps=True)


def compiled_graph() -> Solver:
    return _graphed(_compiled())


def compiled_with_library_attention(name: str) -> Solver:
    """SDPA held to one backend, or flash-attn; see trm_kernels/ops/attention/library.py."""

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        return library_attention.attend("bench", name, q, k, v, None, is_causal)

    if name == "flash_attn":
        _require("flash_attn", "flash_attn_interface")
    return _compiled(PLAIN._replace(attend=attend))


def compiled_flex_attention() -> Solver:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    masks: dict[tuple[int, str], Any] = {}

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Any:
        return flex_attention(q, k, v, block_mask=masks[q.shape[2], q.device.type] if is_causal else None)

    inner = _compiled(PLAIN._replace(attend=attend))

    def recursion(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        T, device = x.shape[1], x.device.type
        if (T, device) not in masks:  # once, outside of what is compiled
            masks[T, device] = create_block_mask(causal, None, None, T, T, device=device)
        return inner.recursion(x, *rest)

    return replace(inner, recursion=recursion)


def liger() -> Solver:
    """Liger-Kernel's norm, RoPE and SwiGLU around cuBLAS and SDPA. Its norm has a weight: ones."""
    _require("liger_kernel")
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    ones: dict[tuple[int, torch.dtype], Tensor] = {}

    def rms(v: Tensor, eps: float) -> Tensor:
        key = v.shape[-1], v.dtype
        if key not in ones:
            ones[key] = torch.ones(v.shape[-1], device=v.device, dtype=v.dtype)
        # offset 0, casting as in LLaMA, not in place
        return LigerRMSNormFunction.apply(v, ones[key], eps, 0.0, "llama", False)

    def rope(qk: Tensor, angles: Angles) -> Sequence[Tensor]:
        q, k = (t.transpose(1, 2) for t in qk.chunk(2, dim=2))
        cos, sin = (t[:, :, 0] for t in angles)
        return [t.transpose(1, 2) for t in LigerRopeFunction.apply(q, k, cos, sin)]

    def swiglu(gu: Tensor) -> Any:
        gate, up = gu.chunk(2, dim=-1)
        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())

    return _in_pytorch(PLAIN._replace(rms=rms, rope=rope, swiglu=swiglu))


class _Newest:
    """A cache whose last slot is for the newest token. A recursion in one launch writes it."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        self.caches = caches

    def __call__(self, evaluation: int, keys: Tensor, values: Tensor) -> Cache:
        return plain.write(self.caches[evaluation], keys, values)

    def room(self, *_: Any) -> CacheRoom:
        keys, values = (list(some) for some in zip(*self.caches, strict=True))
        return CacheRoom(keys, values, [], keys[0].shape[2] - 1)

    def written(self, tokens: int) -> None:
        """Write to the same slot in every run."""


def _settings(numbers: Recursion, caches: Sequence[Cache] | None) -> dict[str, Any]:
    """What is said of a recursion, as keywords."""
    return {
        "num_heads": numbers.H,
        "num_recursion_steps": numbers.num_recursion_steps,
        "num_cycles": numbers.num_cycles,
        "causal": numbers.causal,
        "eps": numbers.eps,
        "update_cache": None if caches is None else _Newest(caches),
    }


def ours(candidate: str | None = None, save: str = "auto", regime: str = "per_op") -> Solver:
    """The Triton kernels; an error where they cannot run, never the reference instead."""

    def recursion(
        x: Tensor,
        y: Tensor,
        z: Tensor,
        weights: Sequence[LayerWeights],
        angles: Angles,
        numbers: Recursion,
        caches: Sequence[Cache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        with backend("triton"):
            return trm_recursion(
                x,
                y,
                z,
                [map_weights(lambda t: t.to(x.dtype), w) for w in weights],
                angles=angles,
                save=save,
                candidate=candidate,
                regime=regime,
                **_settings(numbers, caches),
            )

    def project_in(h: Tensor, w_in: Tensor, eps: float) -> Tensor:
        with backend("triton"):
            return injection_in(h, w_in.to(h.dtype), eps, candidate=candidate)

    def blend(h: Tensor, y: Tensor, w_out: Tensor) -> Tensor:
        with backend("triton"):
            return injection_blend(h, y, w_out.to(y.dtype), 1.0, candidate=candidate)

    def inject(
        h: Tensor, block: Block, positions: Tensor, numbers: Recursion, caches: Sequence[Cache] | None
    ) -> Tensor:
        assert block.w_in is not None and block.w_out is not None
        size = (*h.shape[:2], numbers.D)
        with backend("triton"):
            return trm_injection(
                h,
                InjectionWeights(block.w_in, block.w_out),
                1.0,
                block.y_init.expand(size),
                block.z_init.expand(size),
                block.weights,
                positions=positions,
                rope_theta=ROPE_THETA,
                regime=regime,
                **_settings(numbers, caches),
            )

    return Solver(recursion, project_in, blend, inject if regime != "per_op" else None)


def ours_graph() -> Solver:
    return _graphed(ours())


def ours_in_one_launch() -> Solver:
    """A recursion, or the whole of an injection point, as one cooperative launch."""
    return ours(regime="one_launch")


def ours_in_one_launch_graph() -> Solver:
    return _graphed(ours_in_one_launch())


def _graphed(peer: Solver) -> Solver:
    return replace(peer, is_graphed=True)


def _require(*packages: str) -> None:
    if not any(importlib.util.find_spec(package) for package in packages):
        raise ModuleNotFoundError(f"{' or '.join(packages)} is not installed")


# by name; the first are the ones that matter most, for a run that is cut short
PEERS: dict[str, Callable[[], Solver]] = {
    "ours": ours,
    "eager": eager,
    "torch.compile": compiled,
    "TRM paper's eager": paper,
    "ours, CUDA graph": ours_graph,
    "torch.compile, CUDA graph": compiled_graph,
    "eager, CUDA graph": eager_graph,
    "ours, one launch": ours_in_one_launch,
    "ours, one launch, CUDA graph": ours_in_one_launch_graph,
    "ours, torch.mm + pointwise": partial(ours, candidate="mm"),
    "ours, save=step": partial(ours, save="step"),
    "torch.compile, SDPA cuDNN": partial(compiled_with_library_attention, "sdpa_cudnn"),
    "torch.compile, SDPA flash": partial(compiled_with_library_attention, "sdpa_flash"),
    "torch.compile, SDPA efficient": partial(compiled_with_library_attention, "sdpa_efficient"),
    "torch.compile, max-autotune-no-cudagraphs": compiled_max_autotune,
    "torch.compile, FlexAttention": compiled_flex_attention,
    "torch.compile, reduce-overhead": compiled_reduce_overhead,
    "torch.compile, flash-attn": partial(compiled_with_library_attention, "flash_attn"),
    "Liger-Kernel": liger,
}
MAIN = ("ours", "eager", "torch.compile", "ours, CUDA graph", "torch.compile, CUDA graph")
_INFERENCE = ("ours, one launch", "ours, one launch, CUDA graph")
_ATTEND = ("SDPA", "Flex", "flash", "save=", "Liger")  # differ from others in the recursion only


def peers_of(workload: Workload, all_of_them: bool) -> tuple[str, ...]:
    """The peers that are timed at a workload: the main ones, or all that differ there."""
    if not all_of_them:
        return MAIN if workload.has_backward else (*MAIN, *_INFERENCE)
    names = tuple(name for name in PEERS if not (workload.has_backward and name in _INFERENCE))
    if workload.numbers is None:
        return tuple(name for name in names if not any(part in name for part in _ATTEND))
    return tuple(name for name in names if workload.has_backward or "save=" not in name)


# Peers of the single ops: from a case's name to a callable, or None where there is none

_CASES = {case.name: case for case in CASES}


def eager_op(name: str) -> Op | None:
    """The reference: eager PyTorch, one kernel for each of its lines."""
    return _CASES[name].ref


def compiled_op(name: str, mode: str | None = None) -> Op | None:
    """The reference, compiled."""
    return torch.compile(_CASES[name].ref, mode=mode)


def ours_op(name: str) -> Op | None:
    """The op's Triton kernels; an error where they cannot run, never the reference instead."""

    def op(*tensors: Any) -> Any:
        with backend("triton"):
            return _CASES[name].op(*tensors)

    return op


def sdpa_op(library: str, name: str) -> Op | None:
    """RoPE as the reference has it, then SDPA held to one backend, or flash-attn."""
    if name not in ("rope_attention", "rope_attention_causal"):
        return None
    H, G = (8, 8) if name == "rope_attention" else (16, 4)
    from trm_kernels.ops.attention.rope_attention import rope_attention

    return partial(_attend_by, rope_attention, library, H, G, name == "rope_attention_causal")


def _attend_by(attention: Op, library: str, H: int, G: int, causal: bool, qkv: Tensor) -> Any:
    return attention(qkv, None, H, G, causal=causal, implementation=library)


OP_PEERS: dict[str, Callable[[str], Op | None]] = {
    "eager": eager_op,
    "ours": ours_op,
    "torch.compile": compiled_op,
    "torch.compile, max-autotune": partial(compiled_op, mode="max-autotune-no-cudagraphs"),
    "SDPA cuDNN": partial(sdpa_op, "sdpa_cudnn"),
    "SDPA flash": partial(sdpa_op, "sdpa_flash"),
    "SDPA efficient": partial(sdpa_op, "sdpa_efficient"),
    "flash-attn": partial(sdpa_op, "flash_attn"),
}
