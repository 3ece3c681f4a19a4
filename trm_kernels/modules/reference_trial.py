"""Two forwards of one module on the same random numbers: do they give the same, gradients included?

    what_differs(inner, type(inner).forward, _forward)      # None, or in words

patch_reference_trm compares before it replaces a forward. Changes that users made in theirs (a gate on what
`L_level` returns, one more latent, dropout) show, whatever they are called.

Both run on clones of the module's parameters and buffers, with random numbers of their own: the module's
tensors, their `.grad`, its modes and other attributes (a counter of calls), and torch's generators stay as
they are. Half precision becomes float32 for
the trial, so that rounding hides nothing. Noise is added to the parameters, as one that is zero hides what it
multiplies. Both run in training mode and in eval mode, but for `puzzle_emb`, which in training mode expects
batches of one size; with two sequences and then with three, so that what tells them apart, or the first call
from the second, shows. What differs for some numbers only (a batch of 100) does not.

Cost   four forwards and backwards of two or three sequences of the module's length, and a copy of its tensors
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[[Any, Any, dict[str, Tensor]], Any]

_ROWS = {True: 2, False: 3}  # sequences in training mode, and in eval mode
_OF_TORCH = frozenset(vars(nn.Module()))
_NOISE = 0.02  # added to parameters
_TOLERANCE = 1e-2  # relative, in float32: TF32 passes, another formula does not
_HALF_TOLERANCE = 0.1  # for code that computes in half precision whatever it is told: rounding adds up
_HALVES = (torch.bfloat16, torch.float16)
_KEYS = {"inputs", "puzzle_identifiers"}


def what_differs(inner: nn.Module, theirs: Forward, ours: Forward) -> str | None:
    """How `theirs` differs from `ours` on a carry with z_H and z_L and a batch; None where it does not.

    A forward that fails on them differs: the words are then its error's.
    """
    try:
        with _left_alone(inner):
            for training, rows in _ROWS.items():
                given = _given(inner, rows)
                inner.train(training)
                getattr(inner, "puzzle_emb", nn.Identity()).eval()
                a, b = _outcome(inner, theirs, given), _outcome(inner, ours, given)
                if difference := _compare(a, b):
                    return f"{difference} in {'training' if training else 'eval'} mode"
    except Exception as error:  # of code that is not ours: it may raise anything
        return f"{type(error).__name__} ({error}) when it is tried"
    return None


@dataclass
class Latents:
    """A carry, for code without `empty_carry`."""

    z_H: Tensor
    z_L: Tensor


class WatchedBatch(dict[str, Tensor]):
    """A batch that remembers which keys it was asked for."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.asked: set[Any] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)


class _TrialInputs(NamedTuple):
    """What both forwards are given."""

    tensors: dict[str, Tensor]  # in place of the module's parameters and buffers
    learned: list[str]  # those that get gradients
    carry: Any
    batch: dict[str, Tensor]


class _Outcome(NamedTuple):
    """What a forward made of it."""

    outputs: dict[str, Any]
    gradients: dict[str, Tensor]
    asked: set[Any]  # keys of the batch


def _given(inner: Any, rows: int) -> _TrialInputs:
    generator, device = torch.Generator().manual_seed(0), _device(inner)

    def random(shape: Any) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(device)

    def clone(t: Tensor) -> Tensor:
        return t.detach().clone().to(torch.float32 if t.dtype in _HALVES else t.dtype)

    parameters = {name: clone(p) for name, p in inner.named_parameters()}
    learned = [name for name, t in parameters.items() if t.is_floating_point()]
    for name in learned:
        parameters[name] += _NOISE * random(parameters[name].shape)
    tensors = parameters | {name: clone(t) for name, t in inner.named_buffers()}

    carry = inner.empty_carry(rows) if hasattr(inner, "empty_carry") else Latents(*torch.empty(2, 1))
    known = _fields(carry) if is_dataclass(carry) else {}
    if not all(isinstance(known.get(name), Tensor) for name in ("z_H", "z_L")):
        raise TypeError(f"{type(carry).__name__} is no dataclass with tensors z_H and z_L")
    latent = (rows, inner.config.seq_len + inner.puzzle_emb_len, inner.config.hidden_size)
    of_others = {name: t.shape for name, t in known.items() if _is_float(t)}
    shapes = of_others | {"z_H": latent, "z_L": latent}
    carry = replace(carry, **{name: random(shape) for name, shape in shapes.items()})

    tokens = torch.randint(
        getattr(inner.config, "vocab_size", 2),
        (rows, inner.config.seq_len),
        generator=generator,
        device=generator.device,  # whatever `with torch.device(...)` patching happens in
    )
    batch = {"inputs": tokens, "puzzle_identifiers": torch.zeros(rows, device=generator.device)}
    return _TrialInputs(
        tensors, learned, carry, {name: t.to(device, torch.int32) for name, t in batch.items()}
    )


class _Call(nn.Module):
    """`forward` of `inner`, without the hooks on a call of it."""

    def __init__(self, inner: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.inner, self.function = inner, forward

    def forward(self, carry: Any, batch: dict[str, Tensor]) -> Any:
        return self.function(self.inner, carry, batch)


def _outcome(inner: nn.Module, forward: Forward, given: _TrialInputs) -> _Outcome:
    torch.default_generator.manual_seed(0)
    if _device(inner).type == "cuda":
        with torch.cuda.device(_device(inner)):
            torch.cuda.manual_seed(0)
    tensors = {name: t.clone().requires_grad_(name in given.learned) for name, t in given.tensors.items()}
    batch = WatchedBatch(given.batch)
    result = torch.func.functional_call(
        _Call(inner, forward), {f"inner.{name}": t for name, t in tensors.items()}, (given.carry, batch)
    )
    outputs = _outputs(result)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), device=_device(inner))
    for t in outputs.values():
        if _is_float(t) and t.requires_grad:
            weight = torch.randn(t.shape, generator=generator, device=generator.device).to(t.device)
            loss = loss + (t.float() * weight).sum()
    learned = [tensors[name] for name in given.learned]
    gradients = torch.autograd.grad(loss, learned, allow_unused=True)
    named = zip(given.learned, gradients, strict=True)
    return _Outcome(
        outputs, {name: g.detach() for name, g in named if g is not None and bool(g.any())}, batch.asked
    )


def _outputs(result: Any) -> dict[str, Any]:
    """What is in (carry, logits, (q of halting, q of going on)), by name. Errors: TypeError for others."""
    if not (isinstance(result, tuple) and len(result) == 3):
        count = len(result) if isinstance(result, tuple) else type(result).__name__
        raise TypeError(f"its forward returns {count} and not (carry, logits, (q, q))")
    carry, logits, q = result
    if not (is_dataclass(carry) and isinstance(logits, Tensor) and isinstance(q, tuple) and len(q) == 2):
        raise TypeError(f"its forward returns {[type(part).__name__ for part in result]}")
    named = {f"the carry's {name}": value for name, value in _fields(carry).items()}
    return named | {"the logits": logits, "q of halting": q[0], "q of going on": q[1]}


def _compare(theirs: _Outcome, ours: _Outcome) -> str | None:
    if others := theirs.asked - _KEYS:
        return f"a forward that asks the batch for {sorted(map(str, others))}"
    for name, want in theirs.outputs.items():
        got = ours.outputs.get(name)
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            if want is not got and want != got:
                return f"another value of {name}"
            continue
        if (want.shape, want.dtype) != (got.shape, got.dtype):
            return f"{name} of {tuple(want.shape)} {want.dtype} for {tuple(got.shape)} {got.dtype}"
        if want.requires_grad != got.requires_grad:
            return f"{name} {'with' if want.requires_grad else 'without'} gradient"
        if not (far := _relative(got, want, 0.0)) <= _tolerance(want):  # nan is refused too
            return f"a relative difference of {far:.2g} of {name}"
    floor = 1e-4 * max((float(g.norm()) for g in theirs.gradients.values()), default=0.0)
    tolerance = max(_tolerance(t) for t in theirs.outputs.values() if isinstance(t, Tensor))
    for name in theirs.gradients.keys() | ours.gradients.keys():
        want, got = theirs.gradients.get(name), ours.gradients.get(name)
        if want is None or got is None:
            if float((want if got is None else got).norm()) > floor:  # type: ignore[union-attr]
                return f"a gradient of {name} in one and none in the other"
        elif not (far := _relative(got, want, floor)) <= tolerance:
            return f"a relative difference of {far:.2g} of the gradient of {name}"
    return None


def _tolerance(t: Any) -> float:
    return _HALF_TOLERANCE if t.dtype in _HALVES else _TOLERANCE


def _relative(got: Tensor, want: Tensor, floor: float) -> float:
    """|got - want| / |want|, where `want` is as good as zero below `floor`; 0 where both are equal."""
    if not want.is_floating_point():
        return 0.0 if torch.equal(got, want) else float("inf")
    far, size = float((got - want).detach().float().norm()), float(want.detach().float().norm())
    return far / max(size, floor, 1e-30) if far else 0.0


def _device(inner: Any) -> torch.device:
    return inner.lm_head.weight.device


def _fields(carry: Any) -> dict[str, Any]:
    return {field.name: getattr(carry, field.name) for field in fields(carry)}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _left_alone(inner: nn.Module) -> Iterator[None]:
    """After it, modes, attributes and generators are as before; in it, nothing is compiled, no autocast."""
    device = _device(inner)
    modes = [(module, module.training) for module in inner.modules()]
    attributes = [(module, _own_attributes(module)) for module in inner.modules()]
    halves = [
        (module, name, value)
        for module in inner.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.dtype) and value in _HALVES
    ]
    cards = [device] if device.type == "cuda" else []
    try:
        for module, name, _ in halves:
            setattr(module, name, torch.float32)
        with (
            torch.random.fork_rng(cards),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, before in attributes:
            for name in _own_attributes(module).keys() - before.keys():
                del vars(module)[name]
            vars(module).update(before)
        for module, mode in modes:
            module.training = mode


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
