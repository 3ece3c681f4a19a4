"""Cards: what each has by its data sheet, and what it costs by assumption. `8xA100-80GB` is eight of one."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One accelerator.

    memory_bytes         as the name says, in units of 10^9; what a card reports is 2 to 7 percent more
    flops_per_s          bfloat16 products with float32 sums, dense, data sheet
    float32_flops_per_s  float32 outside of the tensor cores, data sheet
    bytes_per_s          of its memory, data sheet
    watts                at most, data sheet
    products             the share of flops_per_s that large products are taken to reach
    attention            the share of that which attention reaches, forward and backward together
    dollars_per_hour     rented, assumed; the A100's is the cost sheet's
    dollars              bought, assumed; the A100-80GB's is the cost sheet's
    """

    name: str
    memory_bytes: float
    flops_per_s: float
    float32_flops_per_s: float
    bytes_per_s: float
    watts: float
    products: float
    attention: float
    dollars_per_hour: float
    dollars: float


# Data sheets of NVIDIA: Ada GPU architecture (RTX 4090), A100 (SXM), H100 (SXM), H200 (SXM).
# The shares are assumed: products as cuBLAS commonly reaches, attention after the papers of FlashAttention-2
# (Ampere, Ada) and FlashAttention-3 (Hopper).
CARDS = {
    card.name: card
    for card in (
        Card("RTX4090", 24e9, 165e12, 82.6e12, 1.008e12, 450, 0.90, 0.75, 0.50, 2_000),
        Card("A100-40GB", 40e9, 312e12, 19.5e12, 1.555e12, 400, 0.85, 0.57, 2.00, 10_000),
        Card("A100-80GB", 80e9, 312e12, 19.5e12, 2.039e12, 400, 0.85, 0.57, 3.00, 15_000),
        Card("H100-80GB", 80e9, 989e12, 67e12, 3.35e12, 700, 0.80, 0.54, 4.00, 30_000),
        Card("H200-141GB", 141e9, 989e12, 67e12, 4.8e12, 700, 0.80, 0.54, 5.00, 35_000),
    )
}
_SHORTER = {"A100": "A100-80GB", "H100": "H100-80GB", "H200": "H200-141GB", "4090": "RTX4090"}


def parse_cards(text: str) -> tuple[int, Card]:
    """(how many, which) of `8xA100-80GB`, `1xRTX4090` or `H200`.

    Errors: ValueError for a card that is not known, and for no card at all.
    """
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\S.*)", text.strip(), flags=re.IGNORECASE)
    wanted = re.sub(r"[\s_]", "", found[2] if found else text).upper().removeprefix("NVIDIA")
    names = {name.upper(): name for name in CARDS} | _SHORTER
    if found is None or wanted not in names:
        raise ValueError(f"plan: expected --cards such as 8xA100-80GB, of {', '.join(CARDS)}; got {text!r}.")
    count = int(found[1] or 1)
    if count < 1:
        raise ValueError(f"plan: expected at least one card, got {text!r}.")
    return count, CARDS[names[wanted]]
