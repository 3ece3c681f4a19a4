"""Launch settings, as data. No kernel and no op file chooses a block size on its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

_Row = TypeVar("_Row")
_UNTIMED = "nothing yet: chosen by registers and spills, not by time"
ANY_ROWS = 2**31
_MODEL = "nothing yet: chosen by `python -m bench static --cost`, which predicts from machine code"


@dataclass(frozen=True)
class RowLaunch:
    """How one program covers whole rows of a [M, D] tensor."""

    max_block_d: int  # the widest row it serves: D, rounded up to a power of two
    BLOCK_M: int
    num_warps: int
    num_stages: int = 1  # nothing to pipeline: a row is loaded once
    measured_on: str = _UNTIMED


@dataclass(frozen=True)
class TileLaunch:
    """How one program covers a tile of a [M, N] tensor, or walks along its rows a tile at a time."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int = 1
    measured_on: str = _UNTIMED

    @property
    def meta(self) -> dict[str, int]:
        """What a launch passes by name."""
        return _numbers(self, "BLOCK_M", "BLOCK_N", "num_warps", "num_stages")


@dataclass(frozen=True)
class GemmLaunch:
    """How one program computes a [BLOCK_M, BLOCK_N] tile of a product, BLOCK_K of the sum at a time."""

    element_size: int  # bytes of an element of the factors: 2 for float16 and bfloat16, 4 for float32
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8  # row tiles that follow each other while the weight's columns are in L2
    parts: int = 1  # of a tile's columns, one after the other in the epilogue: fewer registers (swiglu_mlp)
    joins_weights: bool = False  # gate and up as one product of twice the columns (linear_swiglu)
    # serves where gate and up (linear_swiglu) or the row scale's gradient (swiglu_mlp) are written as well
    writes_more: bool = True
    maxnreg: int | None = None  # registers a thread, where a few less let a second block in
    by_descriptors: bool = False  # tiles are copied by their descriptors (TMA), on sm90 (linear_residual)
    max_rows: int = ANY_ROWS  # serves products of up to so many rows, M
    measured_on: str = _UNTIMED

    @property
    def meta(self) -> dict[str, int]:
        """What a launch passes by name."""
        meta = _numbers(self, "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages")
        return meta if self.maxnreg is None else meta | {"maxnreg": self.maxnreg}


@dataclass(frozen=True)
class Choice:
    """Which candidate computes a product with an epilogue, up to which width of the model."""

    element_size: int
    max_width: int
    candidate: str  # one of CANDIDATES
    measured_on: str = "nothing yet: break-even predicted from bytes and FLOPs"


@dataclass(frozen=True)
class AttentionLaunch:
    """A tile of BLOCK_M queries by BLOCK_N keys."""

    max_head_width: int  # K
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    element_size: int = 2  # bytes: serves dtypes up to this size
    max_keys: int | None = None  # serves sequences up to this length
    multiple_of: int = 1  # serves head widths that are multiples of this: those of 16 load 16 bytes at a time
    measured_on: str = _UNTIMED


@dataclass(frozen=True)
class DecodeLaunch:
    """One query against `keys` keys a program, BLOCK_N of them at a time."""

    max_head_width: int  # K
    keys: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    element_size: int = 2  # bytes: serves dtypes up to this size
    measured_on: str = _UNTIMED


@dataclass(frozen=True)
class OneLaunch:
    """All phases of a recursion in one launch, over up to max_rows rows (tokens of all sequences)."""

    element_size: int  # bytes of an element of the weights
    max_rows: int
    BLOCK_M: int  # rows, columns and the summed axis of a tile of a product
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_Q: int  # queries and keys of a tile of attention
    BLOCK_S: int
    keys: int  # in a part, where one token a sequence attends to many keys
    num_warps: int = 8
    num_stages: int = 3
    maxnreg: int = 240  # registers a thread; left alone the assembler may take 128, and spill
    K_PARTS: int = 1  # of the summed axis, a warp each: one_launch/products.py
    asks_ahead: bool = False  # for the next phase's weights, before the barrier
    measured_on: str = _UNTIMED

    @property
    def meta(self) -> dict[str, int]:
        """What a launch passes by name."""
        tiles = "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_Q", "BLOCK_S", "K_PARTS"
        return _numbers(self, *tiles, "num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Regime:
    """How a recursion without gradient is launched, in what is no larger than this."""

    regime: str  # one of REGIMES
    max_rows: int = 2**31  # tokens of all sequences
    max_tokens: int = 2**31  # of a sequence
    max_width: int = 2**31
    measured_on: str = "nothing yet"


@dataclass(frozen=True)
class AttentionChoice:
    """Which implementation of attention `auto` takes."""

    implementation: str
    max_tokens: int | None = None
    max_head_width: int | None = None
    measured_on: str = "nothing yet: our kernels where RoPE weighs most, SDPA where the products do"


def _numbers(row: Any, *names: str) -> dict[str, int]:
    return {name: getattr(row, name) for name in names}


# fused: one kernel, the epilogue inside the product. mm: torch.mm, and one kernel for the rest.
CANDIDATES = ("fused", "mm")
_ANY_WIDTH = 2**31


# op -> arch -> settings, narrowest rows first. An arch without an entry takes "any".
_TABLE: dict[str, dict[str, tuple[RowLaunch, ...]]] = {
    "add_rms_norm": {
        "any": (
            RowLaunch(max_block_d=128, BLOCK_M=16, num_warps=4),
            RowLaunch(max_block_d=512, BLOCK_M=4, num_warps=4),
            RowLaunch(max_block_d=2048, BLOCK_M=1, num_warps=4),
            RowLaunch(max_block_d=16384, BLOCK_M=1, num_warps=8),
        ),
    },
    "norm_add": {
        "any": (
            RowLaunch(max_block_d=128, BLOCK_M=16, num_warps=4),
            RowLaunch(max_block_d=512, BLOCK_M=4, num_warps=4),
            RowLaunch(max_block_d=2048, BLOCK_M=1, num_warps=4),
            RowLaunch(max_block_d=16384, BLOCK_M=1, num_warps=16),
        ),
    },
    "injection_in": {
        "any": (
            RowLaunch(max_block_d=512, BLOCK_M=4, num_warps=4),
            RowLaunch(max_block_d=2048, BLOCK_M=1, num_warps=4),
            RowLaunch(max_block_d=16384, BLOCK_M=1, num_warps=8),
        ),
    },
    "rstd_from_squares": {
        "any": (
            RowLaunch(max_block_d=32, BLOCK_M=64, num_warps=4),
            RowLaunch(max_block_d=1024, BLOCK_M=2, num_warps=4),
        ),
    },
    "rope": {
        "any": (
            RowLaunch(max_block_d=64, BLOCK_M=32, num_warps=4),  # 8 elements a thread: 16 bytes in 16 bits
            RowLaunch(max_block_d=128, BLOCK_M=16, num_warps=4),
            RowLaunch(max_block_d=512, BLOCK_M=8, num_warps=4),
        ),
    },
}

# op -> arch -> settings, one for each size of an element
_SMALL = (  # fits everywhere, and keeps rows that are not aligned in registers
    GemmLaunch(2, BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=3),
    GemmLaunch(4, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=3),
)
_NARROW = (  # two sums at once, of tiles or of a tile and of what goes along with its rows
    GemmLaunch(2, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, num_warps=8, num_stages=3),
    GemmLaunch(4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=8, num_stages=3),
)
_WIDE = (  # one sum
    GemmLaunch(2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=3),
    GemmLaunch(4, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4, num_stages=3),
)
# Predicted for Hopper (bench/NOTES.md): one wgmma of 256 columns reads the rows once for gate and up, two of
# 64 read them for each; a wider tile whose epilogue runs in parts leaves room for a second block
_JOINED = GemmLaunch(
    2,
    BLOCK_M=128,
    BLOCK_N=128,
    BLOCK_K=64,
    num_warps=8,
    num_stages=3,
    joins_weights=True,
    writes_more=False,  # it would spill
    measured_on=_MODEL,
)
_IN_PARTS = GemmLaunch(
    2,
    BLOCK_M=128,
    BLOCK_N=128,
    BLOCK_K=64,
    num_warps=8,
    num_stages=3,
    parts=4,
    writes_more=False,
    maxnreg=128,
    measured_on=_MODEL,
)
# Few rows make few large tiles: they keep a few multiprocessors busy and leave the others idle. Small tiles,
# loaded further ahead. Sums in parts (split K) are left out: predicted, the launch that adds the parts up
# takes what they save. The limits are the same for all ops, as a launch plan is made for each.
FEW, SOME = 256, 2048
_MMA_FEW = GemmLaunch(2, 64, 32, 64, num_warps=4, num_stages=4, max_rows=FEW, measured_on=_MODEL)
_MMA_SOME = GemmLaunch(2, 64, 64, 64, num_warps=4, num_stages=3, max_rows=SOME, measured_on=_MODEL)
_WGMMA_FEW = GemmLaunch(2, 64, 32, 128, num_warps=4, num_stages=4, max_rows=FEW, measured_on=_MODEL)
_WGMMA_SOME = replace(_MMA_SOME, num_stages=4)
_JOINED_FEW = replace(_MMA_FEW, joins_weights=True)
_JOINED_SOME = replace(_MMA_SOME, joins_weights=True)
# Predicted for mma: two blocks share a multiprocessor, within its registers and 99 KB (RTX 4090), so that the
# tensor cores have something to do while one of them loads or writes
_MMA_JOINED = replace(_JOINED_SOME, max_rows=ANY_ROWS, writes_more=False)  # it would spill on sm80
_MMA_IN_PARTS = GemmLaunch(
    2, 128, 64, 64, num_warps=8, num_stages=3, parts=2, writes_more=False, maxnreg=128, measured_on=_MODEL
)
_MMA_WIDE = {
    "sm80": GemmLaunch(2, 128, 128, 32, num_warps=8, num_stages=4, maxnreg=128, measured_on=_MODEL),
    "sm89": GemmLaunch(2, 128, 64, 64, num_warps=8, num_stages=3, measured_on=_MODEL),
}
# one block, whose wgmma of 256 columns reads the rows of v half as often as two of 128
_WGMMA_WIDE = GemmLaunch(2, 128, 256, 64, num_warps=8, num_stages=3, measured_on=_MODEL)
_WGMMA_BY_DESCRIPTORS = replace(_WGMMA_WIDE, by_descriptors=True)
# the first row that serves is taken; those after it are candidates beside it, which `using` takes
_GEMMS: dict[str, dict[str, tuple[GemmLaunch, ...]]] = {
    "linear_swiglu": {
        "any": _SMALL,
        "sm80": (_JOINED_FEW, _MMA_JOINED, *_NARROW),
        "sm89": (_JOINED_FEW, _MMA_JOINED, *_NARROW),
        "sm90": (_JOINED_FEW, _JOINED_SOME, _JOINED, *_NARROW),
    },
    "swiglu_mlp": {
        "any": _SMALL,
        "sm80": (_MMA_FEW, _MMA_IN_PARTS, *_NARROW),
        "sm89": (_MMA_FEW, _MMA_IN_PARTS, *_NARROW),
        "sm90": (_WGMMA_FEW, _IN_PARTS, *_NARROW),
    },
    "linear_residual": {
        "any": _SMALL,
        "sm80": (_MMA_FEW, _MMA_SOME, _MMA_WIDE["sm80"], *_WIDE),
        "sm89": (_MMA_FEW, _MMA_SOME, _MMA_WIDE["sm89"], *_WIDE),
        "sm90": (_WGMMA_FEW, _WGMMA_SOME, _WGMMA_WIDE, _WGMMA_BY_DESCRIPTORS, *_WIDE),
    },
    "injection_in": {
        "any": _SMALL,
        "sm80": (_MMA_FEW, _MMA_SOME, *_NARROW),
        "sm89": (_MMA_FEW, _MMA_SOME, *_NARROW),
        "sm90": (_WGMMA_FEW, _WGMMA_SOME, *_NARROW),
    },
    "injection_blend": {
        "any": _SMALL,
        "sm80": (_MMA_SOME, *_NARROW),
        "sm89": (_MMA_SOME, *_NARROW),
        "sm90": (replace(_WGMMA_SOME, max_rows=FEW), *_NARROW),
    },
}

# op -> arch -> settings of the kernel beside torch.mm, and of gradients that no product needs
_TILES: dict[str, dict[str, TileLaunch]] = {
    "linear_swiglu": {"any": TileLaunch(BLOCK_M=4, BLOCK_N=256, num_warps=4)},
    "linear_residual": {"any": TileLaunch(BLOCK_M=4, BLOCK_N=256, num_warps=4)},
    "injection_blend": {"any": TileLaunch(BLOCK_M=4, BLOCK_N=512, num_warps=4)},
}

# op -> arch -> candidates, narrowest model first. Without tensor cores a float32 product takes so long
# that an epilogue saves nothing worth the difference to cuBLAS.
_FUSED_WHERE_NARROW = (Choice(2, 1024, "fused"), Choice(2, _ANY_WIDTH, "mm"), Choice(4, _ANY_WIDTH, "mm"))
_CHOICES: dict[str, dict[str, tuple[Choice, ...]]] = {
    "linear_swiglu": {"any": _FUSED_WHERE_NARROW},
    "swiglu_mlp": {"any": _FUSED_WHERE_NARROW},
    "linear_residual": {"any": _FUSED_WHERE_NARROW},
    "injection_in": {"any": _FUSED_WHERE_NARROW},
    # at every width: what it saves is a tensor as large as the language model's hidden state
    "injection_blend": {"any": (Choice(2, _ANY_WIDTH, "fused"), Choice(4, _ANY_WIDTH, "mm"))},
}

_DKV_32_BITS = (
    AttentionLaunch(64, BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2, element_size=4),
    AttentionLaunch(128, BLOCK_M=16, BLOCK_N=16, num_warps=8, num_stages=2, element_size=4),
)


def _few_warps(max_head_width: int, BLOCK_M: int, BLOCK_N: int) -> AttentionLaunch:
    """Predicted for Hopper: two blocks of four warps fill each other's waits, which one of eight cannot."""
    sizes = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": 4, "num_stages": 2}
    return AttentionLaunch(max_head_width, **sizes, multiple_of=16, measured_on=_MODEL)


# kernel -> arch -> settings, the first that serves; `using` takes those behind it. A kernel without a tile on
# some arch has no row there.
ATTENTION: dict[str, dict[str, tuple[AttentionLaunch, ...]]] = {
    "rope_attention_fwd": {
        "any": (
            AttentionLaunch(63, BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),  # masked: more registers
            AttentionLaunch(64, BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2),
            AttentionLaunch(128, BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
            AttentionLaunch(64, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2, element_size=4),
            AttentionLaunch(128, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2, element_size=4),
        ),
        "sm90": (
            _few_warps(64, 128, 64),
            _few_warps(128, 64, 64),
            AttentionLaunch(64, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            AttentionLaunch(128, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            AttentionLaunch(64, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2, element_size=4),
            AttentionLaunch(128, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2, element_size=4),
        ),
    },
    "rope_attention_bwd_dq": {
        "any": (
            AttentionLaunch(64, BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
            AttentionLaunch(127, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2),
            AttentionLaunch(128, BLOCK_M=64, BLOCK_N=32, num_warps=4, num_stages=2),
            AttentionLaunch(64, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2, element_size=4),
            AttentionLaunch(128, BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2, element_size=4),
        ),
        "sm90": (
            _few_warps(64, 64, 64),
            _few_warps(128, 64, 64),
            AttentionLaunch(64, BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=2),
            AttentionLaunch(128, BLOCK_M=128, BLOCK_N=32, num_warps=8, num_stages=2, multiple_of=16),
            AttentionLaunch(127, BLOCK_M=64, BLOCK_N=32, num_warps=8, num_stages=2),
            AttentionLaunch(64, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2, element_size=4),
            AttentionLaunch(128, BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2, element_size=4),
        ),
    },
    "rope_attention_bwd_dkv": {
        "any": (
            AttentionLaunch(63, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2, multiple_of=16),
            AttentionLaunch(63, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1),  # two stages spill
            AttentionLaunch(64, BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=2),
            AttentionLaunch(128, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2, multiple_of=16),
            AttentionLaunch(127, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),
            *_DKV_32_BITS,
        ),
        "sm90": (
            _few_warps(64, 64, 64),
            _few_warps(128, 32, 64),
            AttentionLaunch(64, BLOCK_M=64, BLOCK_N=64, num_warps=8, num_stages=2),
            AttentionLaunch(128, BLOCK_M=32, BLOCK_N=64, num_warps=8, num_stages=2, multiple_of=16),
            AttentionLaunch(127, BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=2),  # 64 spill on Triton 3.6
            *_DKV_32_BITS,
        ),
    },
    "rope_attention_bwd_tile": {
        "any": (),  # spills on sm80 and sm89, at 64 keys as at 128
        "sm90": (
            AttentionLaunch(
                64, BLOCK_M=128, BLOCK_N=128, num_warps=8, num_stages=1, max_keys=128, multiple_of=16
            ),
        ),
    },
}

DECODE: dict[str, tuple[DecodeLaunch, ...]] = {
    "any": (
        DecodeLaunch(128, keys=256, BLOCK_N=64, num_warps=4, num_stages=2),
        DecodeLaunch(128, keys=256, BLOCK_N=16, num_warps=4, num_stages=2, element_size=4),
    ),
}


_ONE_LAUNCH_OF_16_ROWS = (  # whose warps divide the columns; the second spills on sm89 with Triton 3.6
    OneLaunch(1, 16, BLOCK_M=16, BLOCK_N=16, BLOCK_K=256, BLOCK_Q=16, BLOCK_S=64, keys=256),
    OneLaunch(2, 16, BLOCK_M=16, BLOCK_N=16, BLOCK_K=256, BLOCK_Q=16, BLOCK_S=64, keys=256, maxnreg=208),
)


def _by_warps(num_stages: int) -> tuple[OneLaunch, ...]:
    """Rows for decoding whose warps divide the summed axis, by predictions: bench/NOTES.md."""
    first = replace(
        _ONE_LAUNCH_OF_16_ROWS[0],
        num_warps=4,
        num_stages=num_stages,
        K_PARTS=4,
        asks_ahead=True,
        measured_on=_MODEL,
    )
    return first, replace(first, element_size=2)


_ONE_LAUNCH_SMALL = (  # two buffers ahead fit 99 KB
    *_by_warps(num_stages=3),
    OneLaunch(1, _ANY_WIDTH, BLOCK_M=32, BLOCK_N=16, BLOCK_K=128, BLOCK_Q=16, BLOCK_S=64, keys=256),
    OneLaunch(2, 32, BLOCK_M=32, BLOCK_N=16, BLOCK_K=128, BLOCK_Q=16, BLOCK_S=64, keys=256),
    OneLaunch(2, 64, BLOCK_M=64, BLOCK_N=16, BLOCK_K=64, BLOCK_Q=16, BLOCK_S=64, keys=256),
    OneLaunch(2, _ANY_WIDTH, BLOCK_M=32, BLOCK_N=32, BLOCK_K=128, BLOCK_Q=32, BLOCK_S=64, keys=256),
    OneLaunch(4, 16, BLOCK_M=16, BLOCK_N=16, BLOCK_K=64, BLOCK_Q=16, BLOCK_S=16, keys=256),
    OneLaunch(4, _ANY_WIDTH, BLOCK_M=32, BLOCK_N=16, BLOCK_K=64, BLOCK_Q=16, BLOCK_S=16, keys=256),
)
_ONE_LAUNCH_LARGE = (  # more of the weights on their way at a time
    *_ONE_LAUNCH_OF_16_ROWS,
    _ONE_LAUNCH_SMALL[2],
    OneLaunch(2, 32, BLOCK_M=32, BLOCK_N=16, BLOCK_K=256, BLOCK_Q=16, BLOCK_S=64, keys=256),
    OneLaunch(2, 64, BLOCK_M=64, BLOCK_N=16, BLOCK_K=128, BLOCK_Q=16, BLOCK_S=64, keys=256),
    *_ONE_LAUNCH_SMALL[5:],
)


# arch -> settings, the first that serves; those behind one that serves are candidates, which `using` takes
ONE_LAUNCH: dict[str, tuple[OneLaunch, ...]] = {
    "any": _ONE_LAUNCH_SMALL,
    "sm80": (*_by_warps(num_stages=4), *_ONE_LAUNCH_LARGE),  # as many buffers as a block may have
    "sm90": (*_by_warps(num_stages=6), *_ONE_LAUNCH_LARGE),
}

# per_op: the ops' own kernels. one_launch: all phases in one cooperative launch. per_phase: the same kernel,
# launched once a phase.
REGIMES = ("per_op", "one_launch", "per_phase")

# arch -> what "auto" takes, the first that serves
_REGIME_CHOICES: dict[str, tuple[Regime, ...]] = {"any": (Regime("per_op"),)}

# arch -> multiprocessors, where no device is there to say it: A100, RTX 4090, H100 and H200
MULTIPROCESSORS = {"sm80": 108, "sm89": 128, "sm90": 132, "any": 1}

# arch -> choices, the first that serves
ATTENTION_CHOICES: dict[str, tuple[AttentionChoice, ...]] = {
    "any": (
        AttentionChoice("triton", max_tokens=128, max_head_width=128),
        AttentionChoice("triton", max_head_width=64),
        AttentionChoice("sdpa"),
    ),
    "sm90": (AttentionChoice("triton", max_tokens=128, max_head_width=128), AttentionChoice("sdpa")),
}


def lookup(op: str, arch: str, block_d: int) -> RowLaunch:
    """The settings of `op` for rows of `block_d` elements on `arch`.

    Errors: ValueError when no row of the table is wide enough.
    """
    rows = _TABLE[op].get(arch, _TABLE[op]["any"])
    for row in rows:
        if block_d <= row.max_block_d:
            return row
    raise ValueError(
        f"{op}: expected a last axis of at most {rows[-1].max_block_d} elements, got one that fills "
        f"{block_d}; wider rows have no launch settings. backend('reference') takes any width."
    )


def gemm(
    op: str, arch: str, element_size: int, is_aligned: bool, M: int | None = None, writes_more: bool = False
) -> GemmLaunch:
    """The settings of the product in `op` for elements of that many bytes on `arch`.

    Rows that are not aligned take "any" everywhere: they are loaded an element at a time, through registers,
    and those of a large tile do not fit. M: the product's rows; None, or a number that torch.compile does not
    know yet, for settings that serve any. writes_more: what not every row serves, see GemmLaunch.
    """
    if M is not None:
        M = _as_for_rows.get() or M
    rows = _GEMMS[op].get(arch if is_aligned else "any", _GEMMS[op]["any"])
    serve: Iterator[GemmLaunch] = (
        row for row in rows if row.max_rows == ANY_ROWS or (type(M) is int and row.max_rows >= M)
    )
    if is_aligned and op in (instead := _instead.get()):
        serve = chain([instead[op]], serve)
    return next(
        row for row in serve if row.element_size == element_size and (row.writes_more or not writes_more)
    )


_as_for_rows: ContextVar[int] = ContextVar("trm_kernels_as_for_rows", default=0)


@contextmanager
def as_for_rows(M: int) -> Iterator[None]:
    """Settings are those of M rows, however many there are: one plan serves all sizes up to `row_limits`."""
    token = _as_for_rows.set(M)
    try:
        yield
    finally:
        _as_for_rows.reset(token)


def row_limits(arch: str, element_size: int) -> tuple[int, ...]:
    """Up to how many rows the settings of the products on `arch` stay the same; the last has no end."""
    limits = {row.max_rows for _, row in gemm_candidates(arch) if row.element_size == element_size}
    return tuple(sorted(limits))


_instead: ContextVar[dict[str, Any]] = ContextVar("trm_kernels_instead", default={})  # noqa: B039


@contextmanager
def using(op: str, row: GemmLaunch | AttentionLaunch | OneLaunch) -> Iterator[None]:
    """Take this row, where it serves, for a product, a kernel of attention or "one_launch": to compare it."""
    token = _instead.set(_instead.get() | {op: row})
    try:
        yield
    finally:
        _instead.reset(token)


def one_launch_candidates(arch: str) -> list[OneLaunch]:
    """The rows on `arch` behind one that is taken."""
    rows = ONE_LAUNCH.get(arch, ONE_LAUNCH["any"])
    return [row for row in rows if one_launch(arch, row.element_size, row.max_rows) != row]


def attention_candidates(arch: str) -> Iterator[tuple[str, AttentionLaunch]]:
    """(kernel, row) of all settings of attention on `arch`, those behind one that is taken included."""
    return _rows_of(ATTENTION, arch)


def gemm_candidates(arch: str) -> Iterator[tuple[str, GemmLaunch]]:
    """(op, row) of all products' settings on `arch`, those behind one that is taken included."""
    return _rows_of(_GEMMS, arch)


def _rows_of(table: dict[str, dict[str, tuple[_Row, ...]]], arch: str) -> Iterator[tuple[str, _Row]]:
    for name, of_archs in table.items():
        for row in of_archs.get(arch, of_archs["any"]):
            yield name, row


def tile(op: str, arch: str) -> TileLaunch:
    """The settings of the pointwise kernels of `op` on `arch`."""
    return _TILES[op].get(arch, _TILES[op]["any"])


def choose(
    op: str, arch: str, element_size: int, width: int, is_aligned: bool, candidate: str | None = None
) -> str:
    """The candidate that computes `op` in a model of that width: the one asked for, or the table's.

    Rows that are not aligned are left to torch.mm, since the small tiles of `gemm` are slow.
    """
    if candidate is not None:
        return candidate
    if not is_aligned:
        return "mm"
    rows = _CHOICES[op].get(arch, _CHOICES[op]["any"])
    return next(row.candidate for row in rows if row.element_size == element_size and width <= row.max_width)


def find_attention(
    kernel: str, arch: str, head_width: int, element_size: int, keys: int
) -> AttentionLaunch | None:
    """The table's settings of an attention kernel on `arch`, or None where it has no tile that serves.

    Says whether there is a kernel, also while torch.compile traces. A launch asks `attention`.
    """
    rows = ATTENTION[kernel].get(arch, ATTENTION[kernel]["any"])
    return next((row for row in rows if _attends(row, head_width, element_size, keys)), None)


def _attends(row: AttentionLaunch, head_width: int, element_size: int, keys: int) -> bool:
    is_wide_enough = head_width <= row.max_head_width and element_size <= row.element_size
    is_aligned = head_width % row.multiple_of == 0
    return is_wide_enough and is_aligned and (row.max_keys is None or keys <= row.max_keys)


def lookup_attention(
    kernel: str, arch: str, head_width: int, element_size: int, keys: int
) -> AttentionLaunch:
    """As find_attention. Errors: ValueError where no row serves."""
    row = find_attention(kernel, arch, head_width, element_size, keys)
    if row is None:
        widest = max(row.max_head_width for rows in ATTENTION[kernel].values() for row in rows)
        raise ValueError(
            f"{kernel}: expected a head width of at most {widest}, got {head_width}; wider heads have no "
            "launch settings. The implementations 'sdpa' and 'reference' take any width."
        )
    return row


def attention(kernel: str, arch: str, head_width: int, element_size: int, keys: int) -> AttentionLaunch:
    """The row of `using` where it serves, else the table's: for a launch. Errors: as lookup_attention."""
    instead = _instead.get().get(kernel)
    if instead is not None and _attends(instead, head_width, element_size, keys):
        return instead
    return lookup_attention(kernel, arch, head_width, element_size, keys)


def lookup_decode(arch: str, head_width: int, element_size: int) -> DecodeLaunch:
    """The settings of decode_attention on `arch`. Errors: ValueError where no row serves."""
    rows = DECODE.get(arch, DECODE["any"])
    for row in rows:
        if head_width <= row.max_head_width and element_size <= row.element_size:
            return row
    widest = max(row.max_head_width for row in rows)
    raise ValueError(
        f"decode_attention: expected a head width of at most {widest}, got {head_width}; wider heads have no "
        "launch settings. backend('reference') takes any width."
    )


def one_launch(arch: str, element_size: int, rows: int) -> OneLaunch:
    """The settings of a recursion in one launch, by the bytes of a weight's element and the rows."""
    known = ONE_LAUNCH.get(arch, ONE_LAUNCH["any"])
    if "one_launch" in (instead := _instead.get()):
        known = (instead["one_launch"], *known)
    for row in known:
        if element_size == row.element_size and rows <= row.max_rows:
            return row
    raise AssertionError(f"the last row for elements of {element_size} bytes has to take everything")


def regime(arch: str, rows: int, tokens: int, width: int) -> str:
    """What "auto" takes for a recursion without gradient over sequences of so many tokens."""
    for row in _REGIME_CHOICES.get(arch, _REGIME_CHOICES["any"]):
        if rows <= row.max_rows and tokens <= row.max_tokens and width <= row.max_width:
            return row.regime
    raise AssertionError(f"the last row for {arch} has to take everything")


def attention_implementation(arch: str, tokens: int, head_width: int) -> str:
    """What `auto` runs on `arch`."""
    for row in ATTENTION_CHOICES.get(arch, ATTENTION_CHOICES["any"]):
        fits_tokens = row.max_tokens is None or tokens <= row.max_tokens
        if fits_tokens and (row.max_head_width is None or head_width <= row.max_head_width):
            return row.implementation
    raise AssertionError(f"the last choice for {arch} has to take everything")
