"""What the base makes of a task's texts, computed once a task and kept in a folder."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from evidence_real.arms import LAST
from evidence_real.tasks import TASKS, Task
from hybrid.demo.real import base as real_base
from hybrid.demo.real.questions import AskedText, Questions, encode
from hybrid.demo.real.states import hidden_states
from hybrid.demo.texts import split_sources
from hybrid.saving.files import replace_file

LAYERS = (LAST - 1, LAST)
GAMES = 4000  # to train on
HELD_OUT = 128  # beyond the training's length, for accuracy by place
CLOSINGS = 100  # held-out texts for each question at the end
_FIRST = 10_000  # of what is held out: those before were looked at while settings were chosen
_ROW = {"kept": 64, "help texts": 128, "Python sources": 128}  # tokens
_ROWS = {"kept": 384, "help texts": 16, "Python sources": 16}

Part = dict[str, Tensor]  # "ids", "asked", and "h29", "h30", or what comes out of another layer


def after(part: Part, layer: int = 0) -> Tensor:
    """What comes out of a layer; 0: of the last."""
    return part[f"h{layer or LAYERS[-1]}"]


def asked_at_the_end(task: Task, closing: str) -> list[AskedText]:
    """The held-out texts of a question at the end: the same for each, but for its words."""
    return [task.text(_FIRST + HELD_OUT + i, True, None, closing) for i in range(CLOSINGS)]


def parts_of(task: Task, count: int = GAMES) -> dict[str, list[Any]]:
    """All texts of a task, by what they are for."""
    found = {
        "train": [task.text(i, False, None, None) for i in range(count)],
        "longer": [task.text(_FIRST + i, True, task.longer, task.closings[0]) for i in range(HELD_OUT)],
    }
    for number, closing in enumerate(task.closings):
        found[f"closing {number}"] = asked_at_the_end(task, closing)
    return found


class Parts(dict[str, Part]):
    """Parts by name, each made by `make` when it is first asked for."""

    def __init__(self, make: Callable[[str], Part]) -> None:
        self._make = make

    def __missing__(self, name: str) -> Part:
        self[name] = self._make(name)
        return self[name]


class Cache:
    """Hidden states in `folder`; the base is loaded when some are missing.

    Errors: ValueError as base.folder_of.
    """

    def __init__(self, folder: Path, base_folder: Path) -> None:
        self.folder, self.base_folder = folder, base_folder
        self.tokenizer = real_base.load_tokenizer(base_folder)
        self._base: Any = None
        self._task: tuple[tuple[str, int], Parts] | None = None

    def task(self, name: str, layer: int = 0) -> Parts:
        """The parts of a task, as part() gives them; those of the last one stay in memory."""
        if self._task is None or self._task[0] != (name, layer):
            texts = parts_of(TASKS[name])
            made = Parts(lambda part: self.part(f"{name}-{part}", encode(self.tokenizer, texts[part]), layer))
            self._task = ((name, layer), made)
        return self._task[1]

    @cached_property
    def texts(self) -> Parts:
        """Rows of ordinary text, each token asked for: some that may be kept, and two kinds held out."""
        from pydoc_data.topics import topics

        prose = "\n".join(topics[name] for name in sorted(topics))
        cut = len(prose) * 9 // 10
        sources = "\n".join(Path(file).read_text("utf-8") for file in split_sources(500_000, 60_000)[1])
        of = {"kept": prose[:cut], "help texts": prose[cut:], "Python sources": sources}
        return Parts(lambda name: self.part(name, self._rows(name, of[name])))

    def _rows(self, name: str, text: str) -> Questions:
        length = _ROW[name] + 1
        tokens = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        rows = tokens[: len(tokens) // length * length].view(-1, length)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: _ROWS[name]]
        return Questions(rows[chosen, :-1].contiguous(), rows[chosen, 1:].contiguous())

    def part(self, name: str, questions: Questions, layer: int = 0) -> Part:
        """Questions, and what comes out of LAYERS for them; of `layer` alone, where it is none of these."""
        layers = LAYERS if layer in (0, *LAYERS) else (layer,)
        if layers != LAYERS:
            name = f"{name}-{layer}"
        digest = hashlib.sha256(questions.ids.numpy().tobytes() + questions.asked.numpy().tobytes())
        path = self.folder / f"{name.replace(' ', '-')}-{digest.hexdigest()[:12]}.safetensors"
        if not path.exists():
            if self._base is None:
                self._base = real_base.load(self.base_folder, torch.bfloat16)
            states = hidden_states(self._base, questions.ids, layers, questions.lengths())
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, save({f"h{layer}": h for layer, h in states.items()}))
        return {"ids": questions.ids, "asked": questions.asked, **load_file(path)}
