"""One row per op: how to make inputs, what it must equal, how close, and what it may use of a GPU.

Tests, benchmarks and the ahead-of-time compilation all read this table, so a new op is checked, timed
and compiled by adding its row.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trm_kernels.ops.add_rms_norm import add_rms_norm, add_rms_norm_ref
from trm_kernels.ops.attention.decode_attention import decode_attention, decode_attention_ref
from trm_kernels.ops.attention.rope import Angles, rope, rope_angles, rope_ref
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.ops.injection_blend import injection_blend, injection_blend_ref
from trm_kernels.ops.injection_in import injection_in, injection_in_ref
from trm_kernels.ops.linear_residual import linear_residual, linear_residual_ref
from trm_kernels.ops.linear_swiglu import linear_swiglu, linear_swiglu_ref
from trm_kernels.ops.norm_add import norm_add, norm_add_ref
from trm_kernels.ops.rstd_from_squares import rstd_from_squares, rstd_from_squares_ref
from trm_kernels.ops.swiglu_mlp import swiglu_mlp, swiglu_mlp_ref
from trm_kernels.recursion.injection import trm_injection
from trm_kernels.recursion.inputs import CacheRoom
from trm_kernels.recursion.quantize import quantize
from trm_kernels.recursion.recursion import trm_recursion
from trm_kernels.recursion.weights import AttentionWeights, InjectionWeights, LayerWeights, SwiGLUWeights
from trm_kernels.runtime.backend import backend, runs_triton

Shape = tuple[int, ...]

# What summing in another order may add to the relative error: a rounding or two in float32, next to
# nothing where the result is rounded to a narrower dtype anyway.
_FLOOR = {torch.float32: 1e-7, torch.float16: 1e-5, torch.bfloat16: 1e-4}
# A product sums K numbers; in float32 its error depends on the order more than on anything else.
_PRODUCT_FLOOR = {**_FLOOR, torch.float32: 1e-6}


@dataclass(frozen=True)
class Case:
    """An op and everything a check needs to know of it.

    The error of a correct op, measured against the reference in float64, is at most 1.1 times that of
    the reference in the op's own dtype, plus `floor`.
    """

    name: str
    op: Callable[..., Any]  # tensors -> a tensor, or several
    ref: Callable[..., Any]
    # (shape, dtype, seed), on the CPU; those that take a gradient require one, and may be none at all
    inputs: Callable[[Shape, torch.dtype, int], list[Tensor]]
    shapes: tuple[Shape, ...]  # small and awkward, for the interpreter
    bench: tuple[Shape, ...]  # sizes people run
    moved: Callable[[list[Tensor]], int]  # bytes a perfect forward reads and writes
    edges: tuple[Shape, ...] = ()  # compiled besides: where rows of the settings table end, or fit worst
    launches: int = 1  # kernels one forward starts
    launches_with_gradient: int = 2  # kernels one forward and one backward start
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    floor: Mapping[torch.dtype, float] = field(default_factory=lambda: _FLOOR)
    seeds: int = 3  # inputs drawn for a check: where rounding goes far, errors differ much between them
    max_registers: int = 255  # per thread, the most any of its kernels may take on any arch


def _row_tensors(count: int, shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """[..., D] each. Row sizes run from 1e-3, where eps weighs, to 10, where a wrong mean shows."""
    g = torch.Generator().manual_seed(seed)
    size = 10.0 ** (torch.arange(math.prod(shape[:-1])) % 5 - 3)
    tensors = [torch.randn(shape, generator=g) * size.view(*shape[:-1], 1) for _ in range(count)]
    return [t.to(dtype).requires_grad_() for t in tensors]


def _product_tensors(*kinds: str) -> Callable[[Shape, torch.dtype, int], list[Tensor]]:
    """Inputs of an op that multiplies rows [..., K] by weights; a shape is [..., K, N].

    K, N         rows of that width
    K-small      rows of that width whose sizes run from 1e-3 to 10
    NK, 2NK, KN  a weight of that shape, sized so that products are about 1
    1K, 1        the gate's weight and bias
    scale        one float32 number a row, from 1/8 to 2
    """

    def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
        *leading, K, N = shape
        g = torch.Generator().manual_seed(seed)
        rows = (torch.arange(math.prod(leading)) % 5).view(leading)

        def make(kind: str) -> Tensor:
            match kind:
                case "K" | "N":
                    return torch.randn(*leading, K if kind == "K" else N, generator=g)
                case "K-small":
                    return torch.randn(*leading, K, generator=g) * 10.0 ** (rows - 3)[..., None]
                case "NK" | "2NK":
                    return torch.randn(N if kind == "NK" else 2 * N, K, generator=g) * K**-0.5
                case "KN":
                    return torch.randn(K, N, generator=g) * N**-0.5
                case "1K":
                    return torch.randn(1, K, generator=g) * K**-0.5
                case "1":
                    return torch.randn(1, generator=g)
                case "scale":
                    return 2.0 ** (rows - 3)
            raise AssertionError(kind)

        return [make(kind).to(torch.float32 if kind == "scale" else dtype).requires_grad_() for kind in kinds]

    return inputs


def _residual_and_rstd(
    op: Callable[..., tuple[Tensor, Tensor]], rstd: Callable[..., Tensor], **chosen: str
) -> Callable[..., tuple[Tensor, Tensor]]:
    """What a deferred norm is made of: the number of tiles, which is up to the settings, does not show."""

    def composed(v: Tensor, w: Tensor, r: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, squares = op(v, w, r, row_scale, **chosen)
        return h, rstd(squares, h.shape[-1])

    return composed


def _read_once_and_written(*widths: str) -> Callable[[list[Tensor]], int]:
    """Bytes of all inputs and of outputs [..., width], where a width is an axis of an input: "1.0"."""

    def moved(tensors: list[Tensor]) -> int:
        rows = tensors[0][..., 0].numel()
        out = sum(tensors[int(i)].shape[int(axis)] for i, axis in (width.split(".") for width in widths))
        return sum(t.nbytes for t in tensors) + rows * out * tensors[0].element_size()

    return moved


# a softmax summed in blocks, and a gradient that is the difference of two such sums
_ATTENTION_FLOOR = {**_FLOOR, torch.float32: 2e-7}

# rows, then the summed axis and the columns of the product: long sums, several axes, no multiples, long rows
_PRODUCTS: tuple[Shape, ...] = ((4, 520, 24), (3, 7, 48, 40), (70, 33, 65), (5, 24, 520))
_MLP_SIZES: tuple[Shape, ...] = ((768 * 97, 512, 1536), (8192, 2048, 5632))
_RESIDUAL_SIZES: tuple[Shape, ...] = ((768 * 97, 512, 512), (768 * 97, 1536, 512), (8192, 5632, 2048))


def _projection(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """qkv [B, T, (H + 2G) K]. Keys of a size that leaves some weights near one and some near zero."""
    g = torch.Generator().manual_seed(seed)
    return [(1.5 * torch.randn(shape, generator=g)).to(dtype).requires_grad_()]


def _left_padding(B: int, S: int, device: torch.device) -> Tensor:
    """The first key that counts in each row, [B]; some key always does."""
    return 3 * torch.arange(B, device=device) % S


def _attention(
    name: str, heads: int, groups: int, causal: bool, is_padded: bool = False, **fields: Any
) -> Case:
    """A case of rope_attention with H = heads and G = groups, by our own kernels wherever they run."""

    def attend(qkv: Tensor, implementation: str) -> Tensor:
        B, T = qkv.shape[:2]
        key_mask = None
        if is_padded:
            key_mask = torch.arange(T, device=qkv.device) >= _left_padding(B, T, qkv.device)[:, None]
        return rope_attention(
            qkv, None, heads, groups, causal=causal, key_mask=key_mask, implementation=implementation
        )

    def op(qkv: Tensor) -> Tensor:
        has_kernel = qkv.dtype != torch.float64
        ours = runs_triton("rope_attention", qkv, has_kernel=has_kernel)
        return attend(qkv, "triton" if ours else "reference")

    def ref(qkv: Tensor) -> Tensor:
        return attend(qkv, "reference")

    def moved(tensors: list[Tensor]) -> int:
        (qkv,) = tensors
        return qkv.nbytes + qkv.nbytes // (heads + 2 * groups) * heads + 4 * heads * qkv[..., 0].numel()

    return Case(name, op, ref, _projection, moved=moved, floor=_ATTENTION_FLOOR, **fields)


def _cached(groups: int) -> Callable[[Shape, torch.dtype, int], list[Tensor]]:
    """q [B, H, K], k and v [B, G, S, K], without gradients; a shape is [B, H, S, K]."""

    def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
        B, H, S, K = shape
        g = torch.Generator().manual_seed(seed)
        sizes = (B, H, K), (B, groups, S, K), (B, groups, S, K)
        return [torch.randn(size, generator=g).to(dtype) for size in sizes]

    return inputs


def _padded_decode(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With left padding, free slots at the end of the cache, and every seventh key masked."""

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, S = k.shape[0], k.shape[2]
        starts = _left_padding(B, S, q.device)
        ends = S - torch.arange(B, device=q.device) % 2
        key_mask = (torch.arange(S, device=q.device) % 7 != 3).expand(B, S)
        return attend(q, k, v, starts, ends, key_mask)

    return padded


def _heads_and_angles(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """u [B, T, N, K], and RoPE's cosines and sines [B, T, K/2] for tokens anywhere in a long text."""
    B, T, _, K = shape
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=g).to(dtype).requires_grad_()
    return [u, *rope_angles(torch.randint(0, 5000, (B, T), generator=g), K, 10000.0)]


class _Heads(NamedTuple):
    """How attention's heads follow from the width, D."""

    width: int  # of a head; in small tests it is narrower, so that there are several
    share: int  # heads that share keys and values

    def counts(self, D: int) -> tuple[int, int]:
        """H and G."""
        H = max(2, self.share, D // self.width)
        return H, H // self.share


def _state_and_weights(heads: _Heads | None, shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """x, y, z [B, T, D], two matrices for tokens and two for channels; a shape is B, T, D, F.

    heads   None: tokens are mixed by an MLP
    """
    B, T, D, F = shape
    g = torch.Generator().manual_seed(seed)
    tokens = [(2 * F, T), (T, F)]
    if heads is not None:
        H, G = heads.counts(D)
        tokens = [((H + 2 * G) * D // H, D), (D, D)]
    tensors = [torch.randn(B, T, D, generator=g) for _ in range(3)]
    for n_out, n_in in (*tokens, (2 * F, D), (D, F)):
        tensors.append(torch.randn(n_out, n_in, generator=g) * n_in**-0.5)
    return [t.to(dtype).requires_grad_() for t in tensors]


def _recursion(
    name: str,
    heads: _Heads | None,
    candidate: str | None = None,
    regime: str = "per_op",
    with_gradient: bool = True,
    **fields: Any,
) -> Case:
    """A case of trm_recursion, the shortest: one layer, one cycle of one step."""

    def recursion(
        x: Tensor,
        y: Tensor,
        z: Tensor,
        *weights: Tensor,
        candidate: str | None = None,
        regime: str = "per_op",
    ) -> tuple[Tensor, Tensor]:
        mixer: AttentionWeights | SwiGLUWeights = SwiGLUWeights(*weights[:2])
        H, G = 1, 1
        if heads is not None:
            mixer, (H, G) = AttentionWeights(*weights[:2]), heads.counts(x.shape[2])
        return trm_recursion(
            x,
            y,
            z,
            [LayerWeights(mixer, SwiGLUWeights(*weights[2:]))],
            num_heads=H,
            num_key_value_heads=G,
            num_recursion_steps=1,
            causal=heads is not None,
            candidate=candidate,
            regime=regime,
        )

    def ref(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        with backend("reference"):
            return recursion(*tensors)

    def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
        tensors = _state_and_weights(heads, shape, dtype, seed)
        return tensors if with_gradient else [t.detach() for t in tensors]

    def moved(tensors: list[Tensor]) -> int:
        return sum(t.nbytes for t in tensors) + 2 * tensors[0].nbytes

    op = partial(recursion, candidate=candidate, regime=regime)
    dtypes = (torch.float32, torch.bfloat16)  # its kernels are those of the ops above, float16 included
    return Case(name, op, ref, inputs, moved=moved, dtypes=dtypes, floor=_PRODUCT_FLOOR, seeds=6, **fields)


@dataclass
class _Slots:
    """A cache of tensors [B, G, S, K], one pair for every evaluation; the last slot is the new token's."""

    keys: list[Tensor]
    values: list[Tensor]

    def __call__(self, evaluation: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        both = (self.keys[evaluation], k), (self.values[evaluation], v)
        old_and_new = [torch.cat((old[:, :, : -new.shape[2]], new), dim=2) for old, new in both]
        return old_and_new[0], old_and_new[1]

    def room(self, x: Tensor, *_: int) -> CacheRoom:
        return CacheRoom(self.keys, self.values, [], self.keys[0].shape[2] - x.shape[1])

    def written(self, tokens: int) -> None: ...


_ONE_LAUNCH_EVALUATIONS = 2  # one layer, one cycle of one step


def _decoding(
    heads: _Heads, quantized: str | None, shape: Shape, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """x, y, z [B, 1, D], four matrices, and keys and values of two evaluations; a shape is B, S, D, F.

    quantized   the matrices are in 8 bits, and their scales follow them
    """
    B, S, D, F = shape
    x, y, z, *weights = _state_and_weights(heads, (B, 1, D, F), torch.float32, seed)
    g, (H, G) = torch.Generator().manual_seed(seed + 1), heads.counts(D)
    slots = [torch.randn(B, G, S, D // H, generator=g) for _ in range(2 * _ONE_LAUNCH_EVALUATIONS)]
    tensors = [t.detach().to(dtype) for t in (x, y, z, *weights, *slots)]
    if quantized is None:
        return tensors
    pairs = [quantize(w, quantized) for w in weights]
    return [*tensors[:3], *(w for w, _ in pairs), *(scale for _, scale in pairs), *tensors[7:]]


def _one_launch(name: str, heads: _Heads, quantized: str | None = None, **fields: Any) -> Case:
    """A case of trm_recursion in one launch: one token a sequence, over a cache."""

    def recursion(regime: str, x: Tensor, y: Tensor, z: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weights, rest, scales = layer_of(rest[:4]), rest[4:], None
        if quantized is not None:
            scales, rest = [layer_of(rest[:4])], rest[4:]
        slots = [t.contiguous().clone() for t in rest]
        cache = _Slots(slots[:_ONE_LAUNCH_EVALUATIONS], slots[_ONE_LAUNCH_EVALUATIONS:])
        (B, G, S, _), (H, _) = slots[0].shape, heads.counts(x.shape[2])
        y, z = trm_recursion(
            x,
            y,
            z,
            [weights],
            num_heads=H,
            num_key_value_heads=G,
            num_recursion_steps=1,
            causal=True,
            positions=torch.full((1, 1), S - 1, device=x.device),
            update_cache=cache,
            key_mask=torch.arange(S, device=x.device) >= _left_padding(B, S, x.device)[:, None],
            scales=scales,
            regime=regime,
        )
        return y, z

    def ref(*tensors: Tensor) -> tuple[Tensor, ...]:
        with backend("reference"):
            return recursion("per_op", *tensors)

    def moved(tensors: list[Tensor]) -> int:
        return sum(t.nbytes for t in tensors) + 2 * tensors[0].nbytes

    inputs = partial(_decoding, heads, quantized)
    op = partial(recursion, "one_launch")
    return Case(name, op, ref, inputs, moved=moved, floor=_PRODUCT_FLOOR, seeds=6, **fields)


def _one_launch_injection(name: str, heads: _Heads, quantized: str | None = None, **fields: Any) -> Case:
    """A case of trm_injection in one launch: as above, with the projections and the gate around it."""

    def injection(regime: str, h: Tensor, *rest: Tensor) -> Tensor:
        around, (y, z), rest = InjectionWeights(*rest[:4]), rest[4:6], rest[6:]
        weights, rest, scales = layer_of(rest[:4]), rest[4:], None
        if quantized is not None:
            scales, rest = [layer_of(rest[:4])], rest[4:]
        slots = [t.contiguous().clone() for t in rest]
        cache = _Slots(slots[:_ONE_LAUNCH_EVALUATIONS], slots[_ONE_LAUNCH_EVALUATIONS:])
        (B, G, S, _), (H, _) = slots[0].shape, heads.counts(y.shape[2])
        return trm_injection(
            h,
            around,
            0.7,
            y,
            z,
            [weights],
            num_heads=H,
            num_key_value_heads=G,
            num_recursion_steps=1,
            positions=torch.full((1, 1), S - 1, device=h.device),
            update_cache=cache,
            key_mask=torch.arange(S, device=h.device) >= _left_padding(B, S, h.device)[:, None],
            scales=scales,
            regime=regime,
        )

    def ref(*tensors: Tensor) -> Tensor:
        with backend("reference"):
            return injection("per_op", *tensors)

    def inputs(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
        *of_recursion, N = shape
        (B, _, D, _), g = of_recursion, torch.Generator().manual_seed(seed + 2)
        sizes = (B, 1, N), (D, N), (N, D), (1, D), (1,)
        scales = 0.01, N**-0.5, D**-0.5, D**-0.5, 1.0  # so small a hidden state that eps weighs
        around = [
            (s * torch.randn(size, generator=g)).to(dtype) for size, s in zip(sizes, scales, strict=True)
        ]
        return [*around, *_decoding(heads, quantized, tuple(of_recursion), dtype, seed)[1:]]

    def moved(tensors: list[Tensor]) -> int:
        return sum(t.nbytes for t in tensors) + tensors[0].nbytes

    op = partial(injection, "one_launch")
    return Case(name, op, ref, inputs, moved=moved, floor=_PRODUCT_FLOOR, seeds=6, **fields)


def layer_of(matrices: Sequence[Tensor]) -> LayerWeights:
    """The four matrices of a layer with attention, by their names."""
    return LayerWeights(AttentionWeights(*matrices[:2]), SwiGLUWeights(*matrices[2:]))


CASES: tuple[Case, ...] = (
    Case(
        "add_rms_norm",
        add_rms_norm,
        add_rms_norm_ref,
        partial(_row_tensors, 2),
        shapes=((1, 32), (3, 7, 48), (35, 64), (5, 200), (2, 1000)),
        bench=((768 * 97, 512), (8192, 2048), (8192, 4096), (2048, 10240)),
        moved=lambda tensors: (
            sum(t.nbytes for t in tensors) + tensors[0].nbytes + 4 * tensors[0][..., 0].numel()
        ),
        max_registers=128,
    ),
    Case(
        "add_rms_norm-three",
        lambda x, r, s: add_rms_norm(x, r, s=s),
        lambda x, r, s: add_rms_norm_ref(x, r, s=s),
        partial(_row_tensors, 3),
        shapes=((1, 32), (3, 7, 48), (35, 64)),
        bench=((768 * 97, 512), (8192, 2048)),
        moved=lambda tensors: (
            sum(t.nbytes for t in tensors) + tensors[0].nbytes + 4 * tensors[0][..., 0].numel()
        ),
        max_registers=128,
    ),
    Case(
        "norm_add",
        norm_add,
        norm_add_ref,
        partial(_row_tensors, 2),
        shapes=((1, 32), (3, 7, 48), (35, 64), (5, 200), (2, 1000)),
        bench=((768 * 97, 512), (8192, 2048), (8192, 4096), (2048, 10240)),
        moved=lambda tensors: sum(t.nbytes for t in tensors) + tensors[0].nbytes,
        max_registers=128,
    ),
    Case(
        "linear_swiglu",
        partial(linear_swiglu, candidate="fused"),
        linear_swiglu_ref,
        _product_tensors("K", "2NK"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_MLP_SIZES,
        moved=_read_once_and_written("1.0"),
    ),
    Case(
        "linear_swiglu-scaled",
        partial(linear_swiglu, candidate="fused", recompute=True),
        linear_swiglu_ref,
        _product_tensors("K", "2NK", "scale"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_MLP_SIZES[:1],
        moved=_read_once_and_written("1.0"),
    ),
    Case(
        "linear_swiglu-mm",
        partial(linear_swiglu, candidate="mm"),
        linear_swiglu_ref,
        _product_tensors("K", "2NK", "scale"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_MLP_SIZES,
        moved=_read_once_and_written("1.0"),
    ),
    Case(
        "swiglu_mlp",
        partial(swiglu_mlp, candidate="fused"),
        swiglu_mlp_ref,
        _product_tensors("K", "2NK", "KN"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_MLP_SIZES,
        moved=_read_once_and_written("2.0"),
    ),
    Case(
        "swiglu_mlp-scaled",
        partial(swiglu_mlp, candidate="fused", recompute=True),
        swiglu_mlp_ref,
        _product_tensors("K", "2NK", "KN", "scale"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_MLP_SIZES[:1],
        moved=_read_once_and_written("2.0"),
    ),
    Case(
        "swiglu_mlp-mm",
        partial(swiglu_mlp, candidate="mm"),
        swiglu_mlp_ref,
        _product_tensors("K", "2NK", "KN", "scale"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_MLP_SIZES,
        moved=_read_once_and_written("2.0"),
    ),
    Case(
        "linear_residual",
        _residual_and_rstd(linear_residual, rstd_from_squares, candidate="fused"),
        _residual_and_rstd(linear_residual_ref, rstd_from_squares_ref),
        _product_tensors("K", "NK", "N"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_RESIDUAL_SIZES,
        moved=_read_once_and_written("1.0"),
        launches=2,
        launches_with_gradient=4,
    ),
    Case(
        "linear_residual-scaled",
        _residual_and_rstd(linear_residual, rstd_from_squares, candidate="fused"),
        _residual_and_rstd(linear_residual_ref, rstd_from_squares_ref),
        _product_tensors("K", "NK", "N", "scale"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_RESIDUAL_SIZES[:1],
        moved=_read_once_and_written("1.0"),
        launches=2,
        launches_with_gradient=4,
    ),
    Case(
        "linear_residual-mm",
        _residual_and_rstd(linear_residual, rstd_from_squares, candidate="mm"),
        _residual_and_rstd(linear_residual_ref, rstd_from_squares_ref),
        _product_tensors("K", "NK", "N", "scale"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=_RESIDUAL_SIZES,
        moved=_read_once_and_written("1.0"),
        launches=2,
        launches_with_gradient=4,
    ),
    Case(
        "injection_in",
        partial(injection_in, candidate="fused"),
        injection_in_ref,
        _product_tensors("K-small", "NK"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=((8192, 4096, 2048), (8192, 2048, 512)),
        moved=_read_once_and_written("1.0"),
    ),
    Case(
        "injection_in-mm",
        partial(injection_in, candidate="mm"),
        injection_in_ref,
        _product_tensors("K-small", "NK"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=((8192, 4096, 2048), (8192, 2048, 512)),
        moved=_read_once_and_written("1.0"),
    ),
    Case(
        "injection_blend",
        lambda h, y, w: injection_blend(h, y, w, 0.7, candidate="fused"),
        lambda h, y, w: injection_blend_ref(h, y, w, 0.7),
        _product_tensors("N", "K", "NK"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=((8192, 2048, 4096),),
        moved=_read_once_and_written("2.0"),
        launches_with_gradient=1,  # the gradients are products, no more
    ),
    Case(
        "injection_blend-gated",
        lambda h, y, w, *gate: injection_blend(h, y, w, 0.7, *gate, candidate="fused"),
        lambda h, y, w, *gate: injection_blend_ref(h, y, w, 0.7, *gate),
        _product_tensors("N", "K", "NK", "1K", "1"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=((8192, 2048, 4096),),
        moved=_read_once_and_written("2.0"),
    ),
    Case(
        "injection_blend-mm",
        lambda h, y, w, *gate: injection_blend(h, y, w, 0.7, *gate, candidate="mm"),
        lambda h, y, w, *gate: injection_blend_ref(h, y, w, 0.7, *gate),
        _product_tensors("N", "K", "NK", "1K", "1"),
        shapes=_PRODUCTS,
        floor=_PRODUCT_FLOOR,
        bench=((8192, 2048, 4096),),
        moved=_read_once_and_written("2.0"),
    ),
    _attention(
        "rope_attention",  # of a puzzle
        heads=8,
        groups=8,
        causal=False,
        shapes=((1, 9, 24 * 16), (1, 33, 24 * 8), (1, 35, 24 * 16)),
        bench=((768, 97, 24 * 64), (192, 916, 24 * 64)),
        launches_with_gradient=4,  # one rotates q and k, two of the gradient; in 16 bits sm90 does it in one
    ),
    _attention(
        "rope_attention_causal",  # in a language model
        heads=16,
        groups=4,
        causal=True,
        shapes=((1, 7, 24 * 16), (1, 17, 24 * 20)),
        bench=((4, 2048, 24 * 128),),
        launches_with_gradient=4,
    ),
    _attention(
        "rope_attention-padded",  # in a language model, everything on: the most registers
        heads=4,
        groups=2,
        causal=True,
        is_padded=True,
        shapes=((1, 5, 8 * 16), (2, 41, 8 * 8)),
        bench=tuple((4, 2048, 8 * K) for K in (32, 64, 96, 128)),
        edges=tuple((4, 2048, 8 * K) for K in (24, 62, 88, 126)),  # 126: of rows up to 127, K being even
        launches_with_gradient=4,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    _attention(
        "rope_attention-tile",  # of a puzzle, everything on
        heads=2,
        groups=2,
        causal=True,
        is_padded=True,
        shapes=((1, 5, 6 * 16), (2, 33, 6 * 8)),
        bench=tuple((768, 97, 6 * K) for K in (32, 64)),
        edges=((768, 97, 6 * 16), (768, 97, 6 * 48)),
        launches_with_gradient=4,
        dtypes=(torch.bfloat16,),
    ),
    Case(
        "rope",
        lambda u, cos, sin: rope(u, Angles(cos, sin)),
        lambda u, cos, sin: rope_ref(u, Angles(cos, sin)),
        _heads_and_angles,
        shapes=((1, 1, 1, 2), (2, 7, 3, 16), (1, 33, 5, 40)),
        bench=tuple((4, 2048, 20, K) for K in (64, 128, 256)),
        moved=lambda tensors: sum(t.nbytes for t in tensors) + tensors[0].nbytes,
    ),
    Case(
        "decode_attention",
        decode_attention,
        decode_attention_ref,
        _cached(groups=1),
        shapes=((1, 1, 1, 16), (2, 2, 300, 16), (3, 20, 33, 40)),  # a key; two parts; more than 16 heads
        bench=tuple((16, 16, 2048, K) for K in (64, 128)),
        moved=lambda tensors: sum(t.nbytes for t in tensors) + tensors[0].nbytes,
        floor=_ATTENTION_FLOOR,
        launches_with_gradient=1,  # it has none
    ),
    Case(
        "decode_attention-padded",
        _padded_decode(decode_attention),
        _padded_decode(decode_attention_ref),
        _cached(groups=2),
        shapes=((1, 2, 5, 16), (3, 4, 300, 24)),
        bench=tuple((16, 16, 2048, K) for K in (64, 128)),
        edges=tuple((16, 16, 2048, K) for K in (24, 126)),
        moved=lambda tensors: sum(t.nbytes for t in tensors) + tensors[0].nbytes,
        floor=_ATTENTION_FLOOR,
        launches_with_gradient=1,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    _recursion(
        "trm_recursion-fused",
        heads=_Heads(width=64, share=2),
        candidate="fused",
        shapes=((1, 3, 32, 24), (2, 5, 48, 20)),
        bench=((768, 97, 512, 1536),),
        launches=13,
        launches_with_gradient=28,
    ),
    _recursion(
        "trm_recursion-mm",
        heads=_Heads(width=128, share=1),
        candidate="mm",
        shapes=((1, 3, 32, 24), (1, 5, 64, 20)),
        bench=((4, 2048, 2048, 5632),),
        launches=13,
        launches_with_gradient=28,
    ),
    _recursion(
        "trm_recursion-tokens",
        heads=None,
        shapes=((1, 3, 32, 24), (2, 5, 40, 20)),
        bench=((768, 96, 512, 1536),),
        launches=15,
        launches_with_gradient=28,
    ),
    _recursion(
        "trm_recursion-one-launch",
        heads=_Heads(width=64, share=1),
        regime="one_launch",
        with_gradient=False,
        shapes=((1, 3, 32, 16), (2, 5, 48, 32)),
        bench=((1, 97, 512, 1536),),
        launches=1,
        launches_with_gradient=1,
    ),
    _one_launch(
        "trm_recursion-decode",
        heads=_Heads(width=128, share=4),
        dtypes=(torch.float32, torch.bfloat16),
        shapes=((1, 3, 32, 16), (2, 5, 64, 48)),
        bench=tuple((B, 2048, 2048, 5632) for B in (1, 32, 64)),
        launches=1,
        launches_with_gradient=1,
    ),
    _one_launch(
        "trm_recursion-decode-int8",
        heads=_Heads(width=128, share=4),
        quantized="int8",
        dtypes=(torch.bfloat16,),
        shapes=((1, 3, 32, 16), (2, 5, 64, 48)),
        bench=tuple((B, 2048, 2048, 5632) for B in (1, 32)),
        launches=1,
        launches_with_gradient=1,
    ),
    _one_launch_injection(
        "trm_injection-decode",
        heads=_Heads(width=128, share=4),
        dtypes=(torch.float32, torch.bfloat16),
        shapes=((1, 3, 32, 16, 48), (2, 5, 64, 48, 32)),
        bench=((1, 2048, 2048, 5632, 4096),),
        launches=1,
        launches_with_gradient=1,
    ),
    _one_launch_injection(
        "trm_injection-decode-int8",
        heads=_Heads(width=128, share=4),
        quantized="int8",
        dtypes=(torch.bfloat16,),
        shapes=((1, 3, 32, 16, 48), (2, 5, 64, 48, 32)),
        bench=((1, 2048, 2048, 5632, 4096),),
        launches=1,
        launches_with_gradient=1,
    ),
)
