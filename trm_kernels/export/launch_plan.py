"""A recursion as a plan: which kernels run on which buffers, every number in it a function of the sizes

The recursion runs on "meta" tensors while its launches are recorded, at a few sizes. What comes out differs
in numbers only, and each of them is one term: a constant times some of the sizes, or times how many blocks
cover some of them. A plan holds these terms instead of the numbers, so that a program with a plan can run the
recursion at any size without Python: the library that CMakeLists.txt builds. Kernels, their settings and
their order are recorded, not written down again.

Sizes    B batch, T tokens, P tokens before them in the cache, S = P + T, C tokens the cache has room for
Calls    forward   from the initial state
         resume    from a y and a z that the caller has
         extend    some tokens, their keys and values added to a cache
         decode    one token a sequence, all keys in one part; decode-long: in more parts, see
         ops/attention/decode_attention.py

Settings differ with the rows B T of the products, so a call has a plan for each range of them in which they
stay the same (`row_limits`).

Products run by Triton throughout, where Python may choose torch.mm: its library would have to be on every
machine as well. The price is the difference between the two, at large widths and for few rows.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trm_kernels.export.compile import Compiled, compile_for
from trm_kernels.modules.checks import check_sizes
from trm_kernels.modules.layers import default_intermediate_size
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.ops.attention.rope_attention import rope_attention
from trm_kernels.ops.linear_residual import fill_linear
from trm_kernels.recursion.custom_op import fused_recursion_with_cache
from trm_kernels.recursion.fused_layer import Setting
from trm_kernels.recursion.fused_recursion import recursion_forward
from trm_kernels.recursion.spec import RecursionSpec, evaluations
from trm_kernels.recursion.weights import AttentionWeights, LayerWeights, SwiGLUWeights
from trm_kernels.runtime import tuning
from trm_kernels.runtime.gemm_common import rows_of
from trm_kernels.runtime.launch import Launch, record

CALLS = ("forward", "resume", "extend", "decode", "decode-long")
CACHE_CALLS = CALLS[2:]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A TRM of declared sizes; the names are those of `TRM`."""

    name: str
    hidden_size: int
    num_heads: int
    num_layers: int = 2
    num_key_value_heads: int = 0  # 0: num_heads
    intermediate_size: int = 0  # 0: as TRM chooses
    num_recursion_steps: int = 6
    num_cycles: int = 1
    causal: bool = True
    rope_theta: float = 10000.0
    eps: float = 1e-5
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "num_key_value_heads", self.num_key_value_heads or self.num_heads)
        set_(self, "intermediate_size", self.intermediate_size or default_intermediate_size(self.hidden_size))
        sizes = self.hidden_size, self.num_heads, self.num_key_value_heads, self.num_layers
        check_sizes(f"variant {self.name}", *sizes, uses_rope=True)
        if self.dtype not in DTYPES:
            raise ValueError(f"variant {self.name}: expected dtype in {list(DTYPES)}, got {self.dtype!r}.")
        if self.hidden_size % 16 or self.intermediate_size % 16:
            raise ValueError(
                f"variant {self.name}: expected hidden_size and intermediate_size to be multiples of 16, "
                f"got {self.hidden_size} and {self.intermediate_size}."
            )
        if self.num_recursion_steps < 1 or self.num_cycles < 1:
            raise ValueError(
                f"variant {self.name}: expected num_recursion_steps and num_cycles of at least 1, "
                f"got {self.num_recursion_steps} and {self.num_cycles}."
            )

    @property
    def head_width(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    @property
    def evaluations(self) -> int:
        """Slabs of keys and of values in a cache."""
        return evaluations(self.num_layers, self.num_recursion_steps, self.num_cycles)

    @property
    def calls(self) -> tuple[str, ...]:
        """What a plan is made for: only causal attention can keep keys and values."""
        return CALLS if self.causal else CALLS[:2]


class Sizes(NamedTuple):
    """What a call is asked for; S and those of the cache are as T, 0 and T without one."""

    B: int
    T: int
    P: int
    S: int
    C: int


def sizes_of(B: int, T: int, P: int = 0, C: int | None = None) -> Sizes:
    """The sizes of a call; without C the cache is exactly full."""
    return Sizes(B, T, P, P + T, P + T if C is None else C)


class Term(NamedTuple):
    """constant * the product of some sizes * ceil(times * the product of some sizes / block)"""

    constant: int
    of: tuple[str, ...] = ()
    blocks_of: tuple[str, ...] = ()
    block: int = 1
    times: int = 1

    def at(self, sizes: Sizes) -> int:
        """Its value at these sizes."""
        value = self.constant * _product(self.of, sizes)
        if self.blocks_of:
            value *= -(-self.times * _product(self.blocks_of, sizes) // self.block)
        return value

    @property
    def is_constant(self) -> bool:
        """Whether it has the same value at all sizes."""
        return not self.of and not self.blocks_of


def _product(names: Iterable[str], sizes: Sizes) -> int:
    return prod(getattr(sizes, name) for name in names)


_PRODUCTS = [names for n in range(4) for names in combinations(Sizes._fields, n)]
_BLOCKED = [(names, 2**i) for names in (("B", "T"), ("B",), ("T",), ("S",)) for i in range(1, 13)]


def term(values: Iterable[int], probes: Sequence[Sizes]) -> Term:
    """The simplest term with these values at these sizes."""
    return _term(tuple(values), tuple(probes))


@cache
def _term(values: tuple[int, ...], probes: tuple[Sizes, ...]) -> Term:
    for candidate in _candidates(values, probes):
        if all(candidate.at(s) == value for s, value in zip(probes, values, strict=True)):
            return candidate
    raise AssertionError(f"no term has the values {values} at {probes}")


def _candidates(values: Sequence[int], probes: Sequence[Sizes]) -> Iterator[Term]:
    """Terms of every shape that have the first of the values, simple shapes first."""
    for names, block in ((), 1), *_BLOCKED:
        for of in _PRODUCTS:
            unit = Term(1, of, names, block)
            at_first = unit.at(probes[0])
            yield unit._replace(constant=values[0] // at_first) if at_first else Term(0)
    for names, block in _BLOCKED:
        value, size = max(zip(values, (_product(names, s) for s in probes), strict=True), key=lambda v: v[1])
        yield Term(1, (), names, block, times=value * block // size)


@dataclass(frozen=True)
class Buffer:
    """Whose memory: x, y, z, y_out, z_out, cos, sin, weight, keys, values or work; which of them."""

    role: str
    index: int = 0


class Address(NamedTuple):
    """Where in a buffer, in bytes."""

    buffer: Buffer
    offset: Term


Value = Address | Term | float | None


class Argument(NamedTuple):
    """What machine code is given: kind is "pointer", "i32", "i64" or "f32"."""

    kind: str
    value: Address | Term | float


@dataclass(frozen=True)
class KernelStep:
    """A kernel's launch, with terms and addresses in place of numbers and tensors."""

    launch: Launch  # at one size; arguments use the alignment guaranteed at every size: what is compiled
    grid: tuple[Term, Term, Term]
    values: tuple[Value, ...]  # in place of the launch's arguments


@dataclass(frozen=True)
class CopyStep:
    """[depth, height] rows of `width` bytes; rows and the first of each depth lie a pitch apart."""

    target: Address
    source: Address
    width: Term
    height: Term
    depth: Term
    target_pitch: Term
    source_pitch: Term
    target_height: Term  # rows from one depth to the next
    source_height: Term


@dataclass(frozen=True)
class LaunchPlan:
    """The steps of one call up to some rows B T, and the bytes of each work buffer."""

    call: str
    max_rows: int
    steps: tuple[KernelStep | CopyStep, ...]
    work: tuple[Term, ...]


@dataclass(frozen=True)
class Copy:
    """A copy that PyTorch was asked for while launches were recorded: both [B, T, G, K], G and K together."""

    target: Tensor
    source: Tensor


@dataclass(frozen=True)
class RecordedCall:
    """The recursion at one size: what it does, in order, and whose memory is whose."""

    steps: tuple[Launch | Copy, ...]
    owned: tuple[tuple[Buffer, Tensor], ...]  # all other memory is work


class _WithoutLibraries(TorchDispatchMode):
    """Turns products into launches and copies into records; anything else that computes is an error."""

    _MOVE_NOTHING = (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
        *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split"),
        *("split_with_sizes", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view"),
    )

    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "mm":
            v, w = args
            out = kwargs["out"] if "out" in kwargs else v.new_empty(v.shape[0], w.shape[1])
            fill_linear(out, v, w.t())
            return out
        if name == "copy_":
            self.launches.append(Copy(args[0], args[1]))
            return args[0]
        is_ours = func.namespace == "trm_kernels"
        assert is_ours or name in self._MOVE_NOTHING, f"{name} is neither a launch nor a product"
        return func(*args, **kwargs)


def record_call(variant: Variant, call: str, arch: str, sizes: Sizes) -> RecordedCall:
    """What `call` does at these sizes with the settings of `arch`."""
    v, dtype = variant, DTYPES[variant.dtype]
    H, G, K = v.num_heads, v.num_key_value_heads, v.head_width
    B, T, P, S, C = sizes
    owned: list[tuple[Buffer, Tensor]] = []

    def own(role: str, *shape: int, index: int = 0, dtype: torch.dtype = dtype) -> Tensor:
        t: Tensor = torch.empty(shape, dtype=dtype, device="meta")
        owned.append((Buffer(role, index), t))
        return t

    D, F = v.hidden_size, v.intermediate_size
    shapes = ((H + 2 * G) * K, D), (D, H * K), (2 * F, D), (D, F)
    weights = []
    for layer in range(v.num_layers):
        qkv, o, gate_up, down = (own("weight", *shape, index=4 * layer + i) for i, shape in enumerate(shapes))
        weights.append(LayerWeights(AttentionWeights(qkv, o), SwiGLUWeights(gate_up, down)))
    x = own("x", B, T, v.hidden_size)
    y, z = (own(role, B, T, v.hidden_size) for role in ("y", "z"))
    if call != "resume":
        initial = (own("weight", v.hidden_size, index=4 * v.num_layers + i) for i in range(2))
        y, z = (t.expand(B, T, -1) for t in initial)
    cos, sin = (own(role, S, K // 2, dtype=torch.float32)[None, P:] for role in ("cos", "sin"))

    def attend(evaluation: int, qkv: Tensor) -> Tensor:
        def update_cache(k: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            both = []
            for role, new in (("keys", k), ("values", value)):
                room = own(role, B, C, G, K, index=evaluation)
                room[:, P:S].copy_(new.transpose(1, 2))
                both.append(room[:, :S].transpose(1, 2))
            return both[0], both[1]

        angles = Angles(cos, sin)
        return rope_attention(
            qkv, None, H, G, None, True, None, update_cache, angles=angles, implementation="triton"
        )

    spec = RecursionSpec(
        H,
        G,
        v.num_recursion_steps,
        v.num_cycles,
        grad_cycles=0,
        causal=v.causal,
        eps=v.eps,
        attention="triton",
        save="all",
        candidate="fused",
    )
    with torch.no_grad(), record(arch) as launches, _WithoutLibraries(launches):
        if call in CACHE_CALLS:
            out = fused_recursion_with_cache(x, y, z, weights, spec, attend)
        else:
            setting = Setting(B, T, spec, cos, sin, None)
            out = recursion_forward(rows_of(x), rows_of(y), rows_of(z), weights, setting)[:2]
    owned += [(Buffer("y_out"), out[0]), (Buffer("z_out"), out[1])]
    return RecordedCall(tuple(launches), tuple(owned))


# Sizes at which a call is recorded: some large, so that no number of blocks is 1 at all of them; odd, so
# that what comes out as a multiple of 16 always is one. One row alone is not among them: it has strides of
# its own.
_PROBES = {
    "forward": [sizes_of(*s) for s in ((1, 5), (3, 37), (2, 4099), (37, 263), (131, 19), (7, 1031))],
    "extend": [
        sizes_of(*s)
        for s in (
            (1, 5, 2, 9),
            (3, 37, 11, 101),
            (2, 4099, 77, 5003),
            (37, 263, 301, 997),
            (131, 19, 2003, 3001),
            (7, 1031, 5, 1039),
        )
    ],
    "decode": [
        sizes_of(*s)
        for s in ((5, 1, 4, 9), (131, 1, 36, 101), (4099, 1, 130, 1361), (517, 1, 221, 997), (41, 1, 0, 3001))
    ],
    "decode-long": [
        sizes_of(*s)
        for s in (
            (5, 1, 300, 901),
            (131, 1, 517, 533),
            (4099, 1, 1029, 1361),
            (517, 1, 4001, 4999),
            (41, 1, 20011, 30011),
        )
    ],
}
_PROBES["resume"] = _PROBES["forward"]


def decode_keys(variant: Variant, arch: str) -> int:
    """Keys up to which one token is decoded in one part."""
    size = DTYPES[variant.dtype].itemsize
    return tuning.lookup_decode(arch, variant.head_width, size).keys


def row_limits(variant: Variant, arch: str) -> tuple[int, ...]:
    """The max_rows of a call's plans, ascending; the last one's is beyond any call."""
    return tuning.row_limits(arch, DTYPES[variant.dtype].itemsize)


def plan(variant: Variant, call: str, arch: str, max_rows: int = tuning.ANY_ROWS) -> LaunchPlan:
    """The plan of a call up to so many rows, one of row_limits, with the settings of `arch` for them.

    It is recorded as if all of the sizes had that many: what it holds are terms, which know no range.
    """
    probes = _PROBES[call]
    with tuning.as_for_rows(max_rows):
        recordings = [record_call(variant, call, arch, sizes) for sizes in probes]
    lowered = [_Lowered(recording) for recording in recordings]
    work = [term(sizes, probes) for sizes in zip(*(each.work_bytes for each in lowered), strict=True)]
    steps = [_merge(step, probes) for step in zip(*(each.steps for each in lowered), strict=True)]
    slots, work = _share(steps, work)
    return LaunchPlan(call, max_rows, tuple(_with_slots(step, slots) for step in steps), tuple(work))


class _Lowered:
    """One recording with buffers for tensors."""

    def __init__(self, recording: RecordedCall) -> None:
        self.buffers = {t.untyped_storage()._cdata: buffer for buffer, t in recording.owned}
        self.work_bytes: list[int] = []
        self.steps: list[Any] = []
        for step in recording.steps:
            if isinstance(step, Copy):
                self.steps.append((step, self._place(step.target), self._place(step.source)))
            else:
                places = {i: self._place(a) for i, a in enumerate(step.args) if isinstance(a, Tensor)}
                self.steps.append((step, places))

    def _place(self, t: Tensor) -> tuple[Buffer, int]:
        storage = t.untyped_storage()
        if storage._cdata not in self.buffers:
            self.buffers[storage._cdata] = Buffer("work", len(self.work_bytes))
            self.work_bytes.append(storage.nbytes())
        return self.buffers[storage._cdata], int(t.storage_offset()) * t.element_size()


def _address(places: Sequence[tuple[Buffer, int]], probes: Sequence[Sizes]) -> Address:
    buffers, offsets = zip(*places, strict=True)
    assert len(set(buffers)) == 1, f"one argument lies in {set(buffers)}, depending on the sizes"
    return Address(buffers[0], term(offsets, probes))


def _merge(same: Sequence[Any], probes: Sequence[Sizes]) -> KernelStep | CopyStep:
    """One step from what it is at each of the sizes."""
    steps = [step for step, *_ in same]
    if isinstance(steps[0], Copy):
        target, source = (_address([each[i] for each in same], probes) for i in (1, 2))
        return _merge_copies(steps, target, source, probes)
    first = steps[0]
    assert all((s.kernel, s.meta) == (first.kernel, first.meta) for s in steps), (
        "another kernel at other sizes"
    )
    values: list[Value] = []
    for i, given in enumerate(zip(*(s.args for s in steps), strict=True)):
        if isinstance(given[0], Tensor):
            values.append(_address([places[i] for _, places in same], probes))
        else:
            values.append(term(given, probes) if isinstance(given[0], int) else given[0])
    compiled_for = (
        _representative(value) if isinstance(value, Term) else given
        for value, given in zip(values, first.args, strict=True)
    )
    x, y, z = (term(axis, probes) for axis in zip(*((*s.grid, 1, 1)[:3] for s in steps), strict=True))
    return KernelStep(
        Launch(first.kernel, first.grid, tuple(compiled_for), first.meta), (x, y, z), tuple(values)
    )


def _representative(value: Term) -> int:
    """A number that a kernel is compiled for: with the alignment that the term has at every size."""
    if value.is_constant:
        return value.constant
    return 32 if value.constant % 16 == 0 else 33


def compiled(step: KernelStep, arch: str) -> tuple[Compiled, tuple[Argument, ...]]:
    """The step's machine code, and what it is given: nothing of what is compiled in."""
    kernel = compile_for(step.launch, arch)
    names = {"fp32": "f32", "i32": "i32", "i64": "i64"}
    given = []
    for value, kind in zip(step.values, kernel.signature, strict=False):
        if kind != "constexpr":
            assert value is not None
            given.append(Argument("pointer" if kind.startswith("*") else names[kind], value))
    of_machine = {"pointer": "u64", "i64": "u64", "i32": "u32", "f32": "f32"}
    # Triton adds two pointers to scratch memory, which none of these kernels uses
    expected = (*(of_machine[a.kind] for a in given), "u64", "u64")
    assert expected == kernel.parameters, f"{kernel.name} takes {kernel.parameters}, not {expected}"
    return kernel, tuple(given)


def _merge_copies(
    steps: Sequence[Copy], target: Address, source: Address, probes: Sequence[Sizes]
) -> CopyStep:
    def fitted(number: Callable[[Copy], int]) -> Term:
        return term(map(number, steps), probes)

    for copy in steps:
        for t in (copy.target, copy.source):
            assert t.stride(3) == 1 and t.stride(2) == t.shape[3] and t.stride(0) % t.stride(1) == 0
    size = steps[0].target.element_size()
    return CopyStep(
        target,
        source,
        fitted(lambda c: c.target.shape[2] * c.target.shape[3] * size),
        fitted(lambda c: c.target.shape[1]),
        fitted(lambda c: c.target.shape[0]),
        fitted(lambda c: c.target.stride(1) * size),
        fitted(lambda c: c.source.stride(1) * size),
        fitted(lambda c: c.target.stride(0) // c.target.stride(1)),
        fitted(lambda c: c.source.stride(0) // c.source.stride(1)),
    )


def _addresses(step: KernelStep | CopyStep) -> list[Address]:
    if isinstance(step, CopyStep):
        return [step.target, step.source]
    return [value for value in step.values if isinstance(value, Address)]


def _share(steps: Sequence[KernelStep | CopyStep], work: Sequence[Term]) -> tuple[list[int], list[Term]]:
    """(the slot of each work buffer, the bytes of each slot): equal sizes take turns."""
    used: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        for address in _addresses(step):
            if address.buffer.role == "work":
                used.setdefault(address.buffer.index, []).append(i)
    slots, sizes, free_from = [0] * len(work), list[Term](), list[int]()
    for buffer, times in sorted(used.items(), key=lambda item: item[1][0]):
        fits = (s for s in range(len(sizes)) if sizes[s] == work[buffer] and free_from[s] < times[0])
        slot = next(fits, len(sizes))
        if slot == len(sizes):
            sizes.append(work[buffer])
            free_from.append(0)
        slots[buffer], free_from[slot] = slot, times[-1]
    return slots, sizes


def _with_slots(step: KernelStep | CopyStep, slots: Sequence[int]) -> KernelStep | CopyStep:
    def moved(a: Address) -> Address:
        is_work = a.buffer.role == "work"
        return a._replace(buffer=Buffer("work", slots[a.buffer.index])) if is_work else a

    if isinstance(step, CopyStep):
        return replace(step, target=moved(step.target), source=moved(step.source))
    return replace(step, values=tuple(moved(v) if isinstance(v, Address) else v for v in step.values))
