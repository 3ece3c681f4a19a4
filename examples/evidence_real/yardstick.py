"""What a model would answer at the end of a game if it followed some moves, and guessed in longer games."""

from evidence_real.cached import asked_at_the_end
from evidence_real.measures import GENERATED
from evidence_real.results import Lines
from evidence_real.tasks import TASKS
from hybrid.demo.report import table

_GAMES = ("words", "permutations of five", "sentences")
_FOLLOWED = (0, 3, 4, 5, 6)


def right_answers(cups: int, lengths: list[int], followed: int) -> float:
    """The share that is right on average; lengths: moves of each game."""
    return sum(1.0 if length <= followed else 1 / cups for length in lengths) / len(lengths)


def short_games(_: Lines) -> str:
    """The table; no run is needed for it."""
    rows = []
    for name in _GAMES:
        texts = asked_at_the_end(TASKS[name], TASKS[name].closings[0])
        cups = len({text.answers[-1] for text in texts})
        lengths = [len(text.pieces) - 2 for text in texts]  # but for the beginning and the question
        for measure, count in (("at the end", len(texts)), ("generate", GENERATED)):
            shares = (right_answers(cups, lengths[:count], followed) for followed in _FOLLOWED)
            rows.append([name, measure, *(f"{share:.3f}" for share in shares)])
    return table(["", "", *(f"follows {followed}" for followed in _FOLLOWED)], *rows)
