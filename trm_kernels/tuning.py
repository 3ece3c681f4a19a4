"""Launch settings, as data. No kernel and no op file chooses a block size on its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowLaunch:
    """How one program covers whole rows of a [M, D] tensor."""

    max_block_d: int  # the widest row it serves: D, rounded up to a power of two
    BLOCK_M: int
    num_warps: int
    num_stages: int = 1  # nothing to pipeline: a row is loaded once
    measured_on: str = "nothing yet: chosen by registers and spills, not by time"


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
