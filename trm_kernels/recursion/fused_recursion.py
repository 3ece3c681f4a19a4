"""The loop of recursion.py as launches: all cycles, steps and layers, forward and backward

Cycles without gradient run in one set of buffers and keep nothing. Cycles with gradient keep, for each token
and evaluation of a layer, what `save` says (POLICIES of saved_bytes.py). X is a row of D elements and J one
of F, in the dtype of x:

    save     kept                                                           computed again in backward
    all      h2, qkv, o, h, g and u of recursion/fused_layer.py: 6X + 2J (*)      norms
    layer    h2, where the layer ends and the next starts: X                norms, all but the last product
    step     h2 of an f's last layer: X / layers                            norms, all but the last product

(*) where keys and values have as many heads as queries; and 4 (H + 1) bytes of row statistics. What is
computed again comes from the same kernels, so all three give the same gradients to the bit.

Backward goes from the last evaluation to the first. The gradients of the weights and of x are summed over all
of them in float32, in this order, and rounded once.

Nothing in here waits for the device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from trm_kernels.ops.norm_add import fill_norm_add, fill_norm_add_bwd
from trm_kernels.recursion.fused_layer import (
    Inner,
    Scratch,
    Setting,
    empty_inner,
    empty_scratch,
    layer_backward,
    layer_forward,
)
from trm_kernels.recursion.weights import LayerWeights, map_weights

# (evaluation, qkv [B, T, (H + 2G) K]) -> o [B, T, H K]: attention that reads a cache
AttendEvaluation = Callable[[int, Tensor], Tensor]

Room = TypeVar("Room")


class State(NamedTuple):
    """y or z: rms(h), or h itself where it is normed already."""

    h: Tensor  # [M, D]
    is_normed: bool = False


class SavedF(NamedTuple):
    """What one f leaves for backward, a layer each."""

    h2: list[Tensor]  # only the last layer's where the policy keeps no states
    inner: list[Inner]  # none where it keeps no inner


class _Buffers:
    """What all evaluations of one call use one after the other, and f on it."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[LayerWeights],
        setting: Setting,
        attend: AttendEvaluation | None = None,
    ) -> None:
        self.x, self.weights, self.setting, self.attend = x, weights, setting, attend
        self.v, self.y, self.y_and_x = (torch.empty_like(x) for _ in range(3))
        self.scratch: list[Scratch] = _one_a_shape(weights, lambda w: empty_scratch(x, w, setting))
        self.evaluation = 0

    def empty_inner(self, is_kept: bool) -> list[Inner]:
        """Room for one layer, which all layers of one shape share."""
        return _one_a_shape(self.weights, lambda w: empty_inner(self.x, w, self.setting, is_kept))

    def start_cycle(self, y: State) -> Tensor:
        """y [M, D]; fills y + x, once for all steps."""
        eps = self.setting.spec.eps
        fill_norm_add(self.y_and_x, y.h, self.x, eps, y.is_normed)
        if y.is_normed:
            return y.h
        fill_norm_add(self.y, y.h, None, eps)
        return self.y

    def start_layer(self, state: State, r: Tensor | None) -> Tensor:
        """v [M, D]: the state and, for the first layer of an f, r."""
        fill_norm_add(self.v, state.h, r, self.setting.spec.eps, state.is_normed)
        return self.v

    def f(self, state: State, r: Tensor, h2: Sequence[Tensor | None], inner: Sequence[Inner]) -> None:
        """f(state + r), by filling h2 and inner, one each a layer."""
        for i, w in enumerate(self.weights):
            v = self.start_layer(state, r if i == 0 else None)
            attend = None if self.attend is None else partial(self.attend, self.evaluation)
            layer_forward(v, w, inner[i], self.scratch[i], self.setting, h2[i], attend)
            self.evaluation += 1
            if (h := h2[i]) is not None:
                state = State(h)


def _one_a_shape(weights: Sequence[LayerWeights], make: Callable[[LayerWeights], Room]) -> list[Room]:
    """make(w) for each layer, the same one for layers of the same shape."""
    made: dict[tuple[torch.Size, ...], Room] = {}
    rooms = []
    for w in weights:
        shape = tuple(t.shape for part in w for t in part)
        if shape not in made:
            made[shape] = make(w)
        rooms.append(made[shape])
    return rooms


def recursion_forward(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    weights: Sequence[LayerWeights],
    setting: Setting,
    attend: AttendEvaluation | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[SavedF]]:
    """All cycles, forward; x, y and z are rows [M, D].

    Returns:
        y, z, the h of the y and z with which gradients start (none where those are the arguments), and what
        each differentiated f keeps for backward.
    """
    spec, policy = setting.spec, setting.spec.policy
    work = _Buffers(x, weights, setting, attend)
    shared = work.empty_inner(is_kept=False)
    L, first = len(weights), spec.num_cycles - spec.differentiated_cycles
    passing = torch.empty_like(x)  # h2 that only the next layer reads
    of_y, of_z = (torch.empty_like(x) for _ in range(2)) if first else (passing, passing)
    starts: list[Tensor] = []
    kept: list[SavedF] = []

    def f(state: State, r: Tensor, h2: Tensor, keeps: bool) -> State:
        if not keeps:
            work.f(state, r, [h2] * L, shared)
            return State(h2)
        h2s = [torch.empty_like(x) if policy.keeps_states or i == L - 1 else passing for i in range(L)]
        inner = shared
        if policy.keeps_inner:
            inner = [empty_inner(x, w, setting, is_kept=True) for w in weights]
        work.f(state, r, h2s, inner)
        kept.append(SavedF(h2s if policy.keeps_states else h2s[-1:], inner if policy.keeps_inner else []))
        return State(h2s[-1])

    of = {"y": State(y, is_normed=True), "z": State(z, is_normed=True)}
    for cycle in range(spec.num_cycles):
        keeps = cycle >= first
        if cycle == first and first:
            starts = [of["y"].h, of["z"].h]
        y_rows = work.start_cycle(of["y"])
        for _ in range(spec.num_recursion_steps):
            of["z"] = f(of["z"], work.y_and_x, of_z, keeps)
        of["y"] = f(of["z"], y_rows, of_y, keeps)

    ends = []
    for state in of.values():
        ends.append(torch.empty_like(x))
        fill_norm_add(ends[-1], state.h, None, spec.eps)
    return ends[0], ends[1], starts, kept


class _Backward:
    """What the backward of all f shares: buffers, and the gradients of the weights."""

    def __init__(
        self, x: Tensor, weights: Sequence[LayerWeights], setting: Setting, wants_weights: bool
    ) -> None:
        self.x, self.weights, self.setting = x, weights, setting
        self.work = _Buffers(x, weights, setting)
        self.dw = [map_weights(_float32_zeros, w) for w in weights] if wants_weights else []
        self.again: list[Inner] = []  # room for what is computed again, one layer's or a whole f's
        self.computes_again = setting.spec.policy.computes_again
        if self.computes_again == "layer":
            self.again = self.work.empty_inner(is_kept=True)
        elif self.computes_again == "f":
            self.again = [empty_inner(x, w, setting, is_kept=True) for w in weights]

    def f(
        self, state: State, r: Tensor, kept: SavedF, dout: Tensor, dout2: Tensor | None, total: Tensor | None
    ) -> Tensor:
        """The gradient of state + r, from that of the norm of the last h2: dout + dout2.

        total   float32, to which dout + dout2 is added
        """
        h2, inner = kept
        if self.computes_again == "f":
            h2 = [*(torch.empty_like(self.x) for _ in self.weights[1:]), *h2]
            self.work.f(state, r, [*h2[:-1], None], self.again)
        for i in reversed(range(len(self.weights))):
            dh2 = torch.empty_like(self.x)
            fill_norm_add_bwd(dh2, dout, h2[i], self.setting.spec.eps, dout2, dy_sum=total)
            v = self.work.start_layer(State(h2[i - 1]) if i else state, None if i else r)
            w = self.weights[i]
            if self.computes_again == "layer":
                layer_forward(v, w, self.again[i], self.work.scratch[i], self.setting, None)
            of_layer = self.again[i] if self.computes_again else inner[i]
            dout = layer_backward(dh2, v, w, of_layer, self.dw[i] if self.dw else None, self.setting)
            dout2 = total = None
        return dout


def recursion_backward(
    gradients: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    starts: tuple[State, State],
    kept: Sequence[SavedF],
    weights: Sequence[LayerWeights],
    setting: Setting,
    wants_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, list[LayerWeights]]:
    """All differentiated cycles, backward.

    Args:
        gradients: dy and dz, rows [M, D].
        x: Rows [M, D].
        starts: The y and z with which gradients start.
        kept: What each differentiated f kept.
        weights: The layers' matrices.
        setting: As the forward was given it.
        wants_weights: Whether the gradients of the weights are computed.

    Returns:
        dx, dy, dz, and the gradients of the weights, or none.
    """
    (dy, dz), (y, z), n = gradients, starts, setting.spec.num_recursion_steps
    back = _Backward(x, weights, setting, wants_weights)
    total: Tensor | None = None  # dx, float32
    # y and z with which each cycle starts, and after its steps
    ys = [y, *(State(f.h2[-1]) for f in kept[n :: n + 1])]
    zs = [z, *(State(f.h2[-1]) for i, f in enumerate(kept) if i % (n + 1) < n)]
    dy = torch.zeros_like(x) if dy is None else dy
    for cycle in reversed(range(setting.spec.differentiated_cycles)):
        of_cycle, z_of = kept[cycle * (n + 1) :], zs[cycle * n :]
        y_rows = back.work.start_cycle(ys[cycle])
        dy_and_z = back.f(z_of[n], y_rows, of_cycle[n], dy, None, None)
        dy_and_x = torch.zeros_like(x, dtype=torch.float32)
        dv = dy_and_z
        for step in reversed(range(n)):
            # v = z + (y + x) of the step after this one has the same gradient in all three
            of_sum = dy_and_x if step < n - 1 else None
            dv = back.f(z_of[step], back.work.y_and_x, of_cycle[step], dv, dz, of_sum)
            dz = None
        dz = dv
        dy_and_x += dv
        dy = (dy_and_x + dy_and_z).to(x.dtype)
        total = dy_and_x if total is None else total.add_(dy_and_x)
    assert total is not None and dz is not None, "at least one cycle is differentiated"
    return total.to(x.dtype), dy, dz, [map_weights(lambda t: t.to(x.dtype), w) for w in back.dw]


def _float32_zeros(t: Tensor) -> Tensor:
    return torch.zeros_like(t, dtype=torch.float32)
