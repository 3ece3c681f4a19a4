"""The eight ways to turn and mirror a grid, in the order of the TRM paper's code, and the way back of each

0..3 are quarters of a turn to the left; 4 mirrors left and right, 5 top and bottom, 6 at the main diagonal,
7 at the other.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_QUARTERS = (0, 1, 2, 3, 0, 2, 3, 1)
KEEP_THE_SHAPE = (0, 2, 4, 5)  # of a grid that is no square


def turned(grid: NDArray[Any], way: int) -> NDArray[Any]:
    """[rows, columns], or [columns, rows], of a grid [rows, columns]."""
    grid = np.rot90(grid, _QUARTERS[way])
    return np.fliplr(grid) if way >= 4 else grid


def turned_back(grid: NDArray[Any], way: int) -> NDArray[Any]:
    """What `turned` made this grid of."""
    return turned(grid, {1: 3, 3: 1}.get(way, way))
