"""report.md: what a real language model answered before and after, and what became of its prose."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hybrid.demo.real.game import Game
from hybrid.demo.report import table

if TYPE_CHECKING:
    from hybrid.demo.real.learn import Learned
else:
    Learned = object

REPORT = "report.md"
_SHOWN = 2  # games for each question at the end
_NAMES = {"nothing": "frozen base", "recursion": "hybrid", "LoRA": "LoRA"}


def report(found: Mapping[str, Learned], game: Game, seed: int, quick: bool) -> str:
    """The page, from what each way to learn came to."""
    parts = [
        f"# A real language model follows a ball\n\nSmolLM2-135M-Instruct, frozen; seed {seed}. "
        f"{len(game.cups)} cups, {game.most} swaps, a word each; chance is one in {len(game.cups)}. "
        "Games of six swaps and more are held out by their beginning; nearly all shorter ones are trained "
        "on. An answer is what `generate` goes on with.",
    ]
    if quick:
        parts.append("**A quick run: the same path with few steps. Its figures say nothing.**")
    parts += [_answers(found, game), _examples(found), _steps(found), _prose(found), _checks(found)]
    return "\n\n".join(parts) + "\n"


def _answers(found: Mapping[str, Learned], game: Game) -> str:
    rows = []
    for name, one in found.items():
        shares = [_share(answers) for answers in one.said.values()]
        budget = (
            [f"{one.parameters:,}", f"{one.steps:,}", f"{one.seconds:.0f}"] if one.steps else ["", "", ""]
        )
        rows.append([_NAMES[name], *budget, *shares])
    questions = [f"`{closing.strip(' .')}`" for closing in game.closings]
    new = f"`{game.new_closing.strip(' .')}`, never trained on"
    return table(["right answers", "parameters", "steps", "CPU seconds", *questions, new], *rows)


def _share(answers: list[tuple[str, str, str]]) -> str:
    return f"{sum(right == said for _, right, said in answers)} of {len(answers)}"


def _examples(found: Mapping[str, Learned]) -> str:
    lines = []
    said = {name: one.said for name, one in found.items()}
    first = next(iter(said.values()))
    for closing, answers in first.items():
        for index in range(min(_SHOWN, len(answers))):
            text, right, _ = answers[index]
            others = ", ".join(f"{_NAMES[name]}: {one[closing][index][2]}" for name, one in said.items())
            lines.append(f"    {text} ...\n        right: {right}; {others}")
    return "\n".join(lines)


def _steps(found: Mapping[str, Learned]) -> str:
    by_n = found["recursion"].by_n
    shares = [f"{share:.0%}" for share in by_n.values()]
    return table(["recursion steps at inference", *by_n], ["right answers of the hybrid", *shares])


def _prose(found: Mapping[str, Learned]) -> str:
    names = list(next(iter(found.values())).losses)
    rows = [
        [_NAMES[name], *(f"{one.losses[text]:.3f}" for text in names), one.goes_on.replace("\n", " ")]
        for name, one in found.items()
    ]
    heads = [f"{text}, nats per token" for text in names]
    return "Ordinary text, held out; what was kept in training is of the kind of the first:\n\n" + table(
        ["", *heads, "goes on with"], *rows
    )


def _checks(found: Mapping[str, Learned]) -> str:
    lines = [f"- {'equal' if ok else 'NOT EQUAL'}: {what}" for what, ok in found["recursion"].checks.items()]
    return "Compared bit by bit:\n\n" + "\n".join(lines)
