"""What a TRM refuses when it is made: sizes that make no attention, and words that no setting knows."""

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
