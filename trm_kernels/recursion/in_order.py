"""Token after token: each attends to what the tokens before it ended with

With cache "last" a token's keys and values are, for the tokens after it, those of its last evaluation of each
layer alone: of the update of y in the last cycle. To itself it attends as in any recursion, by the keys and
values of the evaluation at hand. So a cache has one slab a layer, whatever the numbers of steps and cycles.

A token's last keys are known when its recursion is over. Therefore the tokens of a call are computed one
after the other, in training too: the loop has as many rounds as there are tokens, and gradients flow from
each token to those before it. Decoding goes token by token anyway, and costs nothing more.

A row of many sequences' tokens, in a server's paged cache, goes in rounds: the first token of each sequence,
then the second of each. So decoding many sequences is one round.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trm_kernels.ops.attention.rope import Angles
from trm_kernels.recursion.inputs import AttentionInputs, EvaluationCache
from trm_kernels.recursion.spec import RecursionSpec

# x, y and z [B, 1, D] and what their attention reads -> y and z
OfToken = Callable[[Tensor, Tensor, Tensor, AttentionInputs], tuple[Tensor, Tensor]]
_Keys = tuple[Tensor, Tensor]  # keys and values [B, G, S, K]


def recursion_in_order(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    spec: RecursionSpec,
    num_layers: int,
    inputs: AttentionInputs,
    of_token: OfToken,
) -> tuple[Tensor, Tensor]:
    """y and z [B, T, D] of all tokens; `inputs` are those of all of them, and `of_token` computes one."""
    if hasattr(inputs.attend or inputs.update_cache, "rounds"):
        return _in_rounds(x, y, z, num_layers, inputs, of_token)
    T = x.shape[1]
    if T == 0:
        return y, z
    before: dict[int, _Keys] = {}
    ends = []
    for t in range(T):
        keys = LastKeys(spec, num_layers, inputs.update_cache, before)
        x_t, y_t, z_t = (u[:, t : t + 1] for u in (x, y, z))
        ends.append(of_token(x_t, y_t, z_t, _of_token(inputs, t, T)._replace(update_cache=keys)))
        before = dict(keys.after)  # a copy: backward may compute this token again (`save`)
    y_end, z_end = (torch.cat(end, dim=1) for end in zip(*ends, strict=True))
    return y_end, z_end


def rounds_of(numbers: Tensor) -> list[Tensor]:
    """The places [N] of tokens that go together, round after round; `numbers` count a sequence's tokens."""
    return [(numbers == i).nonzero()[:, 0] for i in range(int(numbers.max()) + 1)]


def _in_rounds(
    x: Tensor, y: Tensor, z: Tensor, num_layers: int, inputs: AttentionInputs, of_tokens: OfToken
) -> tuple[Tensor, Tensor]:
    """The same for a row [1, T, D] of many sequences, whose mask says which keys each token may attend to."""
    server: Any = inputs.attend or inputs.update_cache
    y_end, z_end = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    for tokens in server.rounds(x.shape[1], x.device):

        def attend(evaluation: int, qkv: Tensor, tokens: Tensor = tokens) -> Tensor:
            attended: Tensor = server.of_tokens(evaluation % num_layers, tokens, qkv)
            return attended

        def written_over(evaluation: int, *new: Tensor, tokens: Tensor = tokens) -> _Keys:
            both: _Keys = server.write(evaluation % num_layers, tokens, *new)
            return both

        if inputs.attend is not None:
            given = AttentionInputs(attend=attend)
        else:
            angles, mask = inputs.angles, inputs.mask
            assert mask is not None, "it says of each token which keys are of its sequence"
            given = inputs._replace(
                positions=None,
                angles=None if angles is None else Angles(*(part[:, tokens] for part in angles)),
                mask=mask[..., tokens, :],
                update_cache=written_over,
            )
        y_end[:, tokens], z_end[:, tokens] = of_tokens(x[:, tokens], y[:, tokens], z[:, tokens], given)
    return y_end, z_end


def _of_token(inputs: AttentionInputs, t: int, T: int) -> AttentionInputs:
    """The inputs of token t of T, which sees no keys of later ones."""

    def until_it(mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.ndim == 0 or mask.shape[-1] == 1 < T:  # the same for all keys
            return mask
        return mask[..., : mask.shape[-1] - (T - 1 - t)]

    angles, mask = inputs.angles, until_it(inputs.mask)
    if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., t : t + 1, :]
    return inputs._replace(
        positions=None,
        angles=None if angles is None else Angles(*(part[:, t : t + 1] for part in angles)),
        mask=mask,
        key_mask=until_it(inputs.key_mask),
    )


class LastKeys:
    """The EvaluationCache of one token: adds its own keys to those of the tokens before, and keeps the last.

    before   of the tokens before, a layer each; none with a cache, which has them
    after    the same with this token
    """

    def __init__(
        self, spec: RecursionSpec, num_layers: int, cache: EvaluationCache | None, before: dict[int, _Keys]
    ) -> None:
        self.num_layers, self.cache, self.before = num_layers, cache, before
        self.after: dict[int, _Keys] = {}
        self._last = spec.evaluations(num_layers) - num_layers

    def __call__(self, evaluation: int, keys: Tensor, values: Tensor) -> _Keys:
        """Those that the token attends to in this evaluation, [B, G, S, K]; its own are [B, G, 1, K]."""
        layer = evaluation % self.num_layers
        is_last = evaluation >= self._last
        if is_last and self.cache is not None:
            return self.cache(layer, keys, values)
        before = self.before.get(layer)
        if self.cache is not None:
            before = self.cache.so_far(layer)  # type: ignore[attr-defined]  # checked by the caller
        if before is not None:
            of_both = zip(before, (keys, values), strict=True)
            keys, values = (torch.cat([old.to(new.device), new], dim=2) for old, new in of_both)
        if is_last:
            self.after[layer] = keys, values
        return keys, values
