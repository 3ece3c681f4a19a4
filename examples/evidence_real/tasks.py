"""What is to be learned: three games, and one task of reasoning-gym. See docs/evidence-real.md."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from hybrid.demo.real.game import WORDS, Game
from hybrid.demo.real.questions import AskedText

SENTENCES = Game(
    name="sentences",
    cups="ABC",
    begin="The ball is under cup {cup}.",
    moves={" A and B swap.": "BAC", " B and C swap.": "ACB", " A and C swap.": "CBA"},
    most=12,
    closings=(" Now it is under cup", " Where is the ball? Under cup", " In the end the ball is under cup"),
    new_closing=" At last one finds it under cup",
)
# permutations that generate all 120 of S5: a turn of all cups, and four swaps
S5 = replace(
    WORDS,
    name="permutations of five",
    cups="ABCDE",
    begin="The ball is under cup {cup}. Move these cups:",
    moves={
        " left": "BACDE",
        " right": "ABCED",
        " inner": "ADCBE",
        " outer": "EBCDA",
        " turn": "BCDEA",
    },
)
_FILLERS = " -" * 3  # no full stop: the tokenizer joins it to the one that begins the question
_COUNTS = (
    ' In the text it stands this often: "',
    ' The answer is "',
    ' So the number of times is "',
    ' Counted with care, one finds "',
)


@dataclass(frozen=True)
class Task:
    """Texts with questions.

    text         (index, held out, length or None, closing or None) -> a text; None: as in training
    most, longer the length of the longest text in training, and of those beyond it
    closings     those that are trained on, and last one that is not
    asks_often   whether something is asked before the end
    check        raises ValueError where a package that it needs is missing
    """

    name: str
    text: Callable[[int, bool, int | None, str | None], AskedText]
    most: int
    longer: int
    closings: tuple[str, ...]
    asks_often: bool = True
    check: Callable[[], None] = lambda: None


def _of(game: Game, longer: int) -> Task:
    return Task(game.name, game.text, game.most, longer, (*game.closings, game.new_closing))


def with_fillers(task: Task) -> Task:
    """Tokens that say nothing after each move; what is asked for after the move is asked for after these."""

    def text(index: int, held_out: bool, length: int | None, closing: str | None) -> AskedText:
        plain = task.text(index, held_out, length, closing)
        first, *moves, last = plain.pieces
        return replace(plain, pieces=(first, *(move + _FILLERS for move in moves), last))

    return replace(task, name=f"{task.name}, fillers", text=text)


def _check_reasoning_gym() -> None:
    if find_spec("reasoning_gym") is None:
        raise ValueError(
            "letter counting: expected reasoning-gym (pip install reasoning-gym==0.1.25), got none."
        )


@lru_cache(maxsize=2)
def _letter_counting(shortest: int, longest: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(
        "letter_counting", min_words=shortest, max_words=longest, size=10**9, seed=0
    )


def letter_counting(index: int, held_out: bool, length: int | None, closing: str | None) -> AskedText:
    """An item of reasoning-gym's letter_counting whose answer is one digit; held out by a span's first word.

    length   words; None: 5 to 15
    """
    items = _letter_counting(5, 15) if length is None else _letter_counting(length, length)
    place = index * 1000  # each index looks for its item in a stretch of its own
    while True:
        item = items[place]
        span = item["metadata"]["span"]
        if (zlib.crc32(span[0].encode()) % 10 == 0) == held_out and len(item["answer"]) == 1:
            break
        place += 1
    asked = _COUNTS[index % (len(_COUNTS) - 1)] if closing is None else closing
    return AskedText((item["question"] + asked,), (item["answer"],))


TASKS = {
    task.name: task
    for task in (
        _of(WORDS, longer=24),
        _of(S5, longer=24),
        _of(SENTENCES, longer=16),
        Task("letter counting", letter_counting, 15, 20, _COUNTS, False, _check_reasoning_gym),
    )
}
TASKS[f"{WORDS.name}, fillers"] = with_fillers(TASKS[WORDS.name])
