"""The shell game in words as rows with answers, for `trm-hybrid train` and `eval`. See docs/learn-a-game.md.

    python examples/game_rows.py --most 8 build/game

train.jsonl     games, each asked about after every move and at the end; as many others, at the end alone
held-out.jsonl  games whose beginning none of these has, asked about at the end
"""

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hybrid.demo.real.game import WORDS
from hybrid.demo.real.questions import AskedText


def at_the_end(game: AskedText) -> AskedText:
    """The same text; only the last question counts."""
    return replace(game, answers=(*[None] * (len(game.answers) - 1), game.answers[-1]))


def write(path: Path, games: Iterable[AskedText]) -> None:
    """A line a game: its parts, and what is answered after each."""
    rows = ({"text": game.pieces, "answers": game.answers} for game in games)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=16, help="moves in the longest game (default: 16)")
    parser.add_argument("--games", type=int, default=2000, help="of each kind, to train on (default: 2,000)")
    parser.add_argument("--held-out", type=int, default=100, help="games that are held out (default: 100)")
    chosen = parser.parse_args()
    game = replace(WORDS, most=chosen.most)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    often = [game.text(index, held_out=False) for index in range(chosen.games)]
    once = [at_the_end(game.text(chosen.games + index, held_out=False)) for index in range(chosen.games)]
    write(chosen.folder / "train.jsonl", often + once)
    held_out = [at_the_end(game.text(index, held_out=True)) for index in range(chosen.held_out)]
    write(chosen.folder / "held-out.jsonl", held_out)


if __name__ == "__main__":
    main()
