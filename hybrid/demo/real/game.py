"""Shell games on paper: a ball is under one of a few cups, each move moves cups about, where is the ball?

    The ball is under cup A. Swap these cups: left outer right. Now it is under cup C
                                              ^---- the left two, the outer two, the right two

It is asked for after every move, and at the end. A tenth of all beginnings (the first cup and six moves) is
never trained on; held-out games begin with one of these. Of games of less than six moves none are held out.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid.demo.real.questions import AskedText

_BEGINNING = 6  # moves that say whether a game is held out
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Game:
    """One kind of game.

    cups         "ABC": their names
    begin        how a text begins, with {cup} for the first
    moves        how a move is written -> where it takes the ball from each of the cups, in their order
    most         moves in a game that is trained on; half of these have so many, the others fewer
    closings     the questions at the end
    new_closing  one that is never trained on
    """

    name: str
    cups: str
    begin: str
    moves: Mapping[str, str]
    most: int
    closings: tuple[str, ...]
    new_closing: str

    def follow(self, cup: str, moves: Sequence[str]) -> list[str]:
        """The cup that the ball is under after each move."""
        cups = []
        for move in moves:
            cup = self.moves[move][self.cups.index(cup)]
            cups.append(cup)
        return cups

    @staticmethod
    def is_held_out(cup: str, moves: Sequence[str]) -> bool:
        """Whether a game is one of those that training never sees: by a checksum of its beginning."""
        beginning = cup + "".join(moves[:_BEGINNING])
        return zlib.crc32(beginning.encode()) % _HELD_OUT_ONE_IN == 0

    def text(
        self, index: int, held_out: bool, length: int | None = None, closing: str | None = None
    ) -> AskedText:
        """Game `index`, a function of the arguments alone.

        length    moves; None: drawn, as in training
        closing   the question at the end; None: one of `closings`
        """
        draw = random.Random(f"{self.name}:{held_out}:{index}")
        longest = max(self.most, length or 0)
        while True:
            cup, moves = draw.choice(self.cups), draw.choices(list(self.moves), k=longest)
            if self.is_held_out(cup, moves) == held_out:
                break
        drawn = self.most if draw.random() < 0.5 else draw.randint(1, self.most - 1)
        moves = moves[: length or drawn]
        asked = draw.choice(self.closings) if closing is None else closing
        cups = [f" {after}" for after in self.follow(cup, moves)]
        return AskedText((self.begin.format(cup=cup), *moves, asked), (None, *cups, cups[-1]))


WORDS = Game(
    name="words",
    cups="ABC",
    begin="The ball is under cup {cup}. Swap these cups:",
    moves={" left": "BAC", " right": "ACB", " outer": "CBA"},
    most=16,
    closings=(
        ". Now it is under cup",
        ". Where is the ball? Under cup",
        ". In the end the ball is under cup",
    ),
    new_closing=". At last one finds it under cup",
)
