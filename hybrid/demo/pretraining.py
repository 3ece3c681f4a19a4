"""What the demonstration's language model learns before it is frozen: prose, counting, the game's format.

The games' answers are random here: it learns that a cup is named after a swap, not which.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from hybrid.data.blocks import TokenBlocks
from hybrid.demo.base import END, encode
from hybrid.demo.shell_game import CUPS, ShellGame


class Pretraining(Dataset):
    """Half prose, a quarter counting, a quarter games with random answers; item i is a function of (seed, i).

    prose    rows {"input_ids": [T], "labels": [T]}; the other rows are made as long
    games    what the game looks like; short games are filled up, and what fills is not scored
    """

    def __init__(self, prose: TokenBlocks, games: ShellGame, seed: int) -> None:
        self.prose, self.games, self.seed = prose, games, seed
        self.row = len(prose[0]["input_ids"])

    def __len__(self) -> int:
        return 2 * len(self.prose)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, kind = divmod(index, 4)
        draw = random.Random(f"{self.seed}:{index}")
        if kind == 0:
            return self._counting(draw)
        if kind == 1:
            return self._game(self.games[number % len(self.games)], draw)
        return self.prose[2 * number + kind - 2]

    def _counting(self, draw: random.Random) -> dict[str, Tensor]:
        """0120120... or 0210210..., from any cup on; the first two digits cannot be known: not scored."""
        start, step = draw.randrange(CUPS), draw.choice((1, 2))
        ids = encode("".join(str((start + step * i) % CUPS) for i in range(self.row)))
        return {"input_ids": ids, "labels": torch.where(torch.arange(self.row) < 2, -100, ids)}

    def _game(self, game: dict[str, Tensor], draw: random.Random) -> dict[str, Tensor]:
        fill = (0, self.row - len(game["input_ids"]))
        answers = encode("".join(str(draw.randrange(CUPS)) for _ in game["labels"]))
        labels = torch.where(game["labels"] < 0, -100, answers)
        return {
            "input_ids": F.pad(game["input_ids"], fill, value=END),
            "labels": F.pad(labels, fill, value=-100),
        }
