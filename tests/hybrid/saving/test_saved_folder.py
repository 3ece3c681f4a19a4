"""A save over an older one, killed at each of its file operations: the folder is the old or the new one."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hybrid import HybridModel
from hybrid.saving import saved_folder
from tests.support import forked
from tests.support.tiny import awaken, tiny_base, tiny_config, tokens

OPERATIONS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
)
KILLED = 77


def count_operations(folder: Path, kill_at: int | None, found: list[str]) -> None:
    """Note every operation on files in `folder`; end the process instead of the one of number `kill_at`."""

    def hook(event: str, arguments: tuple) -> None:
        if event not in OPERATIONS or not arguments or not str(arguments[0]).startswith(str(folder)):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if len(found) == kill_at:
            os._exit(KILLED)
        found.append(f"{event} {Path(str(arguments[0])).name}")

    sys.addaudithook(hook)


def made(folder, seed, **save):
    """A hybrid of a base in a folder; it and what it is saved with."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder)
    hybrid = awaken(HybridModel(llm_model=base, config=tiny_config(num_recursion_steps=seed))).eval()
    hybrid.generation_config.max_new_tokens = seed
    return hybrid, save


# what is there before, and what is saved over it
WAYS = {
    "TRM over TRM": ({}, {}),
    "whole over TRM": ({}, {"save_base": True, "max_shard_size": "90KB"}),
    "TRM over whole": ({"save_base": True, "max_shard_size": "90KB"}, {}),
    "shards over fewer shards": ({"max_shard_size": "40KB"}, {"max_shard_size": "20KB"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_every_file_operation(way, tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    old, of_old = made(tmp_path / "base", 1, **WAYS[way][0])
    new, of_new = made(tmp_path / "base", 2, **WAYS[way][1])
    answers = {h.config.num_recursion_steps: h(tokens()).logits for h in (old, new)}
    old.save_pretrained(tmp_path / "old", **of_old)
    written = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def fresh() -> Path:
        folder = tmp_path / f"hybrid-{len(seen)}"
        folder.mkdir()
        for name, content in written.items():
            (folder / name).write_bytes(content)
        return folder

    def save(folder: Path, kill_at: int) -> None:
        count_operations(folder, kill_at, [])
        new.save_pretrained(folder, **of_new)

    seen: list[int] = []
    while True:
        folder = fresh()
        code = forked.run(lambda f=folder: save(f, len(seen)))
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        steps = loaded.config.num_recursion_steps
        assert torch.equal(loaded(tokens()).logits, answers[steps]), f"{way}: mixed at {len(seen)}"
        assert loaded.generation_config.max_new_tokens == steps
        assert AutoConfig.from_pretrained(folder).num_recursion_steps == steps
        if code == 0:
            break
        assert code == KILLED
        old.save_pretrained(folder, **of_old)  # after it, nothing is left of the one that was killed
        assert {path.name for path in folder.iterdir()} == set(written), f"{way}: left over at {len(seen)}"
        seen.append(steps)
    assert seen[0] == 1 and seen[-1] == 2 and sorted(seen) == seen, (
        "the old one, and from some point on the new"
    )
    assert len(seen) > 8


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(tmp_path):
    """Cut where the weights still have to follow the config, and never finished."""
    (tmp_path / "config.json").write_text("new")
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / "tokenizer.json").write_text("kept")
    ready = tmp_path / ".saved-elsewhere-1-save-x"
    ready.mkdir()
    (ready / "names-of-this-save.json").write_text(
        json.dumps(["config.json", "model-00001-of-00001.safetensors"])
    )
    (ready / "model-00001-of-00001.safetensors").write_text("new")
    before = sorted(tmp_path.rglob("*"))
    with saved_folder.as_saved(tmp_path) as place:
        found = {path.name: path.read_text() for path in Path(place).iterdir()}
    assert found == {
        "config.json": "new",
        "tokenizer.json": "kept",
        "model-00001-of-00001.safetensors": "new",
    }
    assert sorted(tmp_path.rglob("*")) == before


def test_what_other_processes_are_writing_is_left_alone(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    hybrid, _ = made(tmp_path / "base", 1)
    hybrid.save_pretrained(tmp_path / "hybrid")
    elsewhere = tmp_path / "hybrid" / ".saving-another.machine-1-save-x"
    here = saved_folder.beside(tmp_path / "hybrid" / "save-y")  # of this process, which lives
    for folder in (elsewhere, here):
        folder.mkdir()
        (folder / "file").write_text("")
    hybrid.save_pretrained(tmp_path / "hybrid")
    assert (elsewhere / "file").exists() and (here / "file").exists()


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    tiny_base().save_pretrained(tmp_path / "base")
    hybrid, _ = made(tmp_path / "base", 1)
    hybrid.save_pretrained(tmp_path / "hybrid")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hybrid").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        hybrid.save_pretrained(tmp_path / "hybrid")
    assert {path.name: path.read_bytes() for path in (tmp_path / "hybrid").iterdir()} == before
