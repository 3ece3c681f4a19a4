"""Sudoku of boxes R x C, made on the spot: [count, (R C)^2] int64, row by row; 1..R C is a digit, 0 a blank.

Solutions  one base grid with its digits, bands, stacks, rows and columns permuted and, if boxes are square,
           perhaps transposed: 192 of the 288 grids of 4x4, a small part of those of 6x6 and 9x9.
Puzzles    givens at random, kept if naked and hidden singles solve it. That proves the solution unique, and
           makes the puzzle an easy one: these are not the hard ones of the TRM paper.
Held out   by solution: about one in eight, chosen by a checksum, is the answer of no training puzzle.
"""

import torch
from torch import Tensor

_HELD_OUT_ONE_IN = 8
_DRAWN_TOGETHER = 1024
_IN_VAIN = 20  # times that many, without a puzzle, and there is none to be found


def solved_grids(count: int, box: tuple[int, int], generator: torch.Generator) -> Tensor:
    """[count, (R C)^2] solutions of boxes R x C: the base grid, permuted."""
    rows, columns = box
    side = rows * columns

    def order(bands: int, lines: int) -> Tensor:
        """[count, R C] rows or columns: bands change places, and the lines within a band."""
        band = torch.rand(count, bands, 1, generator=generator).argsort(1)
        return (lines * band + torch.rand(count, bands, lines, generator=generator).argsort(2)).flatten(1)

    row, column = order(columns, rows)[:, :, None], order(rows, columns)[:, None, :]
    digits = 1 + torch.rand(count, side, generator=generator).argsort(1)
    grids = digits.gather(1, ((columns * row + row // rows + column) % side).flatten(1))
    grids = grids.view(count, side, side)
    if rows == columns:
        grids = torch.where(torch.rand(count, 1, 1, generator=generator) < 0.5, grids, grids.mT)
    return grids.flatten(1)


def solved_by_singles(puzzles: Tensor, box: tuple[int, int]) -> Tensor:
    """[count] whether naked and hidden singles fill every cell: then there is no other solution."""
    rows, columns = box
    side = rows * columns
    cells, digits = torch.arange(side * side), torch.arange(side)
    row, column = cells // side, cells % side
    box_of = row // rows * rows + column // columns
    units = torch.cat([digits[:, None] == unit for unit in (row, column, box_of)]).float()
    peers = ((units.T @ units > 0) & ~torch.eye(side * side, dtype=torch.bool)).float()
    possible = (puzzles[:, :, None] == 0) | (puzzles[:, :, None] == 1 + digits)  # [count, cell, digit]
    while True:
        before = possible
        single = possible & (possible.sum(-1, keepdim=True) == 1)
        possible = possible & ~(peers @ single.float() > 0)
        only_place = (units @ possible.float() == 1).float()
        hidden = possible & (units.T @ only_place > 0)
        possible = torch.where(hidden.any(-1, keepdim=True), hidden, possible)
        if torch.equal(possible, before):
            return (possible.sum(-1) == 1).all(-1)


def is_held_out(solutions: Tensor) -> Tensor:
    """[count] whether a solution is kept from training: by a checksum."""
    weights = torch.randint(1 << 20, solutions.shape[1:], generator=torch.Generator().manual_seed(0))
    return (solutions * weights).sum(-1) % 1009 % _HELD_OUT_ONE_IN == 0


def sudoku(
    count: int, box: tuple[int, int], givens: tuple[int, int], seed: int, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """(puzzles, solutions) [count, (R C)^2], to train on or held out. Some may come twice.

    box      (R, C), rows and columns of a box
    givens   the fewest and the most to draw, not to be had in equal numbers: few givens make few puzzles

    Errors: ValueError when no puzzle is found with as few givens.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[Tensor, Tensor]] = []
    while (found := sum(len(puzzles) for puzzles, _ in kept)) < count:
        if not found and len(kept) == _IN_VAIN:
            raise ValueError(f"sudoku: expected numbers of givens that leave one solution, got {givens}.")
        solutions = solved_grids(_DRAWN_TOGETHER, box, generator)
        solutions = solutions[is_held_out(solutions).eq(held_out)]
        rank = torch.rand(solutions.shape, generator=generator).argsort(1).argsort(1)
        number = torch.randint(givens[0], givens[1] + 1, (len(solutions), 1), generator=generator)
        puzzles = torch.where(rank < number, solutions, 0)
        unique = solved_by_singles(puzzles, box)
        kept.append((puzzles[unique], solutions[unique]))
    puzzles, solutions = (torch.cat(parts)[:count] for parts in zip(*kept, strict=True))
    return puzzles, solutions
