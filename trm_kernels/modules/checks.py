"""What a TRM refuses: sizes that make no attention, words that no setting knows, calls that do not fit."""

import math
from numbers import Integral, Real

from torch import Tensor

from trm_kernels.ops.attention.rope_attention import IMPLEMENTATIONS
from trm_kernels.recursion.quantize import QUANTIZE
from trm_kernels.recursion.saved_bytes import SAVES
from trm_kernels.recursion.spec import CACHES
from trm_kernels.runtime.tuning import REGIMES


def check_token_mixer(mlp_t: bool, seq_len: int | None, causal: bool) -> None:
    """Refuse `mlp_t` without its number of tokens, or where tokens may not see those after them."""
    if mlp_t != (seq_len is not None):
        raise ValueError(f"TRM: expected mlp_t and seq_len together, got {mlp_t} and {seq_len}.")
    if mlp_t and causal:
        raise ValueError("TRM: expected mlp_t without causal (a mix over all tokens looks ahead), got both.")


def check_numbers(
    intermediate_size: int | None, seq_len: int | None, rope_theta: float | None, eps: float
) -> None:
    """Refuse numbers with which a TRM would compute something else than was asked, or NaN."""
    for name, count in (("intermediate_size", intermediate_size), ("seq_len", seq_len)):
        if count is not None and not (isinstance(count, Integral) and count >= 1):
            raise ValueError(f"TRM: expected {name} of at least 1 or None, got {count!r}.")
    if not (isinstance(eps, Real) and 0 <= eps < math.inf):
        raise ValueError(f"TRM: expected eps of at least 0 and finite, got {eps!r}.")
    if rope_theta is not None and not (isinstance(rope_theta, Real) and 0 < rope_theta < math.inf):
        raise ValueError(f"TRM: expected rope_theta above 0 and finite or None, got {rope_theta!r}.")


def check_inputs(
    x: Tensor, y: Tensor | None, z: Tensor | None, hidden_size: int, seq_len: int | None
) -> None:
    """Refuse an x that is no state of the TRM, and what is no tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"TRM: expected x, a floating tensor [B, T, {hidden_size}], got {got}.")
    if x.ndim != 3 or x.shape[-1] != hidden_size:
        raise ValueError(f"TRM: expected x [B, T, {hidden_size}], got {tuple(x.shape)}.")
    if seq_len is not None and x.shape[1] != seq_len:
        raise ValueError(f"TRM: expected {seq_len} tokens (seq_len, mlp_t), got {x.shape[1]}.")
    for name, state in (("y", y), ("z", z)):
        if not isinstance(state, Tensor | None):
            raise ValueError(f"TRM: expected {name}, a tensor like x or None, got {type(state).__name__}.")


def check_halting(halting: object, **only_with_it: object) -> None:
    """Refuse what is read with halting alone, where there is none."""
    given = [name for name, value in only_with_it.items() if value is not None]
    if halting is None and given:
        raise ValueError(f"TRM: expected halting with {', '.join(given)}, got none.")


def check_choices(attention: str, save: str, regime: str, quantize: str | None, cache: str) -> None:
    """Refuse a word that is none of those that the setting knows."""
    if cache not in CACHES:
        raise ValueError(f"TRM: expected cache to be one of {', '.join(CACHES)}, got {cache!r}.")
    if attention not in IMPLEMENTATIONS:
        raise ValueError(
            f"TRM: expected attention to be one of {', '.join(IMPLEMENTATIONS)}, got {attention!r}."
        )
    if save not in ("auto", *SAVES):
        raise ValueError(f"TRM: expected save to be auto, {', '.join(SAVES)}, got {save!r}.")
    if regime not in ("auto", *REGIMES):
        raise ValueError(f"TRM: expected regime to be auto, {', '.join(REGIMES)}, got {regime!r}.")
    if quantize not in (None, *QUANTIZE):
        raise ValueError(f"TRM: expected quantize to be None, {', '.join(QUANTIZE)}, got {quantize!r}.")


def check_sizes(
    who: str,
    hidden_size: int,
    num_heads: int,
    num_key_value_heads: int,
    num_layers: int,
    uses_rope: bool,
    prefix: str = "",
) -> None:
    """Refuse sizes that make no attention.

    Args:
        who: The caller's name, for the error.
        hidden_size: D.
        num_heads: H.
        num_key_value_heads: G.
        num_layers: Layers.
        uses_rope: Whether the head width has to be even.
        prefix: Of the names in the error, such as "trm_".

    Raises:
        ValueError: With what was expected and what came.
    """
    counts = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "num_layers": num_layers,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{who}: expected {prefix}{name} of at least 1, got {count}.")
    if hidden_size % num_heads:
        raise ValueError(
            f"{who}: expected {prefix}hidden_size to be a multiple of {prefix}num_heads, "
            f"got {hidden_size} and {num_heads}."
        )
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"{who}: expected {prefix}num_heads to be a multiple of {prefix}num_key_value_heads, "
            f"got {num_heads} and {num_key_value_heads}."
        )
    if uses_rope and hidden_size // num_heads % 2:
        raise ValueError(
            f"{who}: RoPE expected an even head width, got {hidden_size // num_heads} "
            f"(hidden_size {hidden_size} over {num_heads} heads)."
        )
