"""The shell game, as text: a ball is under one of three cups, cups are swapped, where is the ball?

    2baccb1     it begins under cup 2; five swaps; it is under cup 1 in the end
    ^----- a letter a swap: `a` swaps cups 0 and 1, `b` 0 and 2, `c` 1 and 2

A model answers after every swap, so it has to carry the ball's place along: state tracking. A tenth of
all beginnings (the first cup and six swaps) is never trained on; held-out games begin with one of these.
"""

import random
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hybrid.demo.base import LanguageModel, encode
from hybrid.model.halting import Halting, TokenHalting, record_steps
from hybrid.model.hybrid_model import HybridModel

CUPS = 3
SWAPS = {"a": (0, 1), "b": (0, 2), "c": (1, 2)}
_BEGINNING = 6  # swaps that say whether a game is held out
_HELD_OUT_ONE_IN = 10
_EVALUATED_TOGETHER = 256  # games in one forward


def follow(ball: int, swaps: str) -> list[int]:
    """The cup that the ball is under after each swap, starting under cup `ball`."""
    cups = []
    for left, right in (SWAPS[letter] for letter in swaps):
        if ball in (left, right):
            ball = left + right - ball
        cups.append(ball)
    return cups


def is_held_out(ball: int, swaps: str) -> bool:
    """Whether a game is one of those that training never sees: by a checksum of its beginning."""
    return zlib.crc32(f"{ball}{swaps[:_BEGINNING]}".encode()) % _HELD_OUT_ONE_IN == 0


class ShellGame(Dataset):
    """`count` games of `num_swaps` swaps; game i is a function of (seed, i).

    input_ids   [num_swaps + 2]: the first cup, the swaps, the last cup
    labels      [num_swaps + 2]: beside the token after a swap, the cup that the ball is under now
    held_out    games whose beginning is never trained on, or all others
    """

    def __init__(self, count: int, num_swaps: int, seed: int, held_out: bool = False) -> None:
        self.count, self.num_swaps, self.seed, self.held_out = count, num_swaps, seed, held_out

    def __len__(self) -> int:
        return self.count

    def game(self, index: int) -> tuple[int, str]:
        """(the first cup, the swaps)"""
        if not 0 <= index < self.count:
            raise IndexError(f"ShellGame: expected a game in 0..{self.count - 1}, got {index}.")
        draw = random.Random(f"{self.seed}:{index}")
        while True:
            ball, swaps = draw.randrange(CUPS), "".join(draw.choices(list(SWAPS), k=self.num_swaps))
            if is_held_out(ball, swaps) == self.held_out:
                return ball, swaps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ball, swaps = self.game(index)
        cups = "".join(map(str, follow(ball, swaps)))
        # a model shifts labels by one: what is asked for after token t stands beside token t + 1
        return {
            "input_ids": encode(f"{ball}{swaps}{cups[-1]}"),
            "labels": torch.cat((torch.tensor([-100, -100]), encode(cups))),
        }


@torch.no_grad()
def accuracy_by_swaps(
    model: LanguageModel,
    games: ShellGame,
    num_recursion_steps: int | None = None,
    halting: Halting | TokenHalting | None = None,
) -> list[float]:
    """The share of right answers after 1, 2, ... swaps; an answer is the likeliest of all tokens.

    num_recursion_steps   a hybrid's n; None takes its config's
    halting               when a hybrid's tokens stop before n; None: as the model says, by itself never
    """
    given = {"num_recursion_steps": num_recursion_steps, "halting": halting}
    given = {name: value for name, value in given.items() if value is not None}
    model.eval()
    right = torch.zeros(games.num_swaps)
    for batch in DataLoader(games, batch_size=_EVALUATED_TOGETHER):
        logits = model(
            input_ids=batch["input_ids"].to(model.device), use_cache=False, **given
        ).logits  # [B, T, V]
        right += (logits[:, 1:-1].argmax(-1).cpu() == batch["labels"][:, 2:]).sum(0)
    return (right / len(games)).tolist()


@dataclass(frozen=True)
class AdaptiveResult:
    """What a hybrid reached under a rule of halting, each a list: after 1, 2, ... swaps.

    accuracy      the share of right answers
    steps         recursion steps, on average
    evaluations   of the block, on average, answers that were only compared included; n + 1 with a fixed n
    """

    accuracy: list[float]
    steps: list[float]
    evaluations: list[float]


def adaptive_by_swaps(
    model: HybridModel,
    games: ShellGame,
    halting: Halting | TokenHalting | None,
    num_recursion_steps: int | None = None,
) -> AdaptiveResult:
    """Accuracy beside recursion steps. The arguments are accuracy_by_swaps's; None for halting: a fixed n."""
    with record_steps() as record:
        accuracy = accuracy_by_swaps(model, games, num_recursion_steps, halting)
    after_swaps = slice(1, -1)  # the first cup is no swap, and the last is not asked for
    steps = torch.cat([f.steps for f in record.forwards])[:, after_swaps].mean(dim=0)
    evaluations = torch.cat([f.evaluations for f in record.forwards])[:, after_swaps].mean(dim=0)
    return AdaptiveResult(accuracy, steps.tolist(), evaluations.tolist())


@torch.no_grad()
def answers(model: LanguageModel, ball: int, swaps: str) -> str:
    """What `model` generates after each swap of one game, a character a swap."""
    game = encode(f"{ball}{swaps}").to(model.device)[None]
    said = ""
    for seen in range(2, game.shape[1] + 1):
        begun = game[:, :seen]
        ids = model.generate(begun, attention_mask=torch.ones_like(begun), max_new_tokens=1, do_sample=False)
        said += chr(int(ids[0, -1]))
    return said.translate(dict.fromkeys(range(32), "?"))
