"""A run's folder: one run's at a time, nobody else's files touched, and a run resumed only as what it is."""

import json
import os
import platform
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from accelerate import PartialState
from torch.utils.data import Dataset

from hybrid.cli import main
from hybrid.data.sources import Sources
from hybrid.data.stream import TokenStream
from hybrid.saving import local_paths
from hybrid.saving.files import beside, remove_left_over
from hybrid.saving.local_paths import check_folder, is_in_a_folder_here, looks_local
from hybrid.training import checkpoints as run_state
from hybrid.training import contents, hidden_states, run_folder
from hybrid.training.hidden_states import HiddenStates
from hybrid.training.loop import train
from hybrid.training.phases import enter
from tests.hybrid.training.test_train import phase_1, settings_for
from tests.support import forked
from tests.support.tiny_text import (
    OTHER_TEXT,
    TEXT,
    Counting,
    character_tokenizer,
    save_base,
    tiny_base,
    tiny_hybrid,
)

ONE = PartialState()


def contents_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The lock


@contextmanager
def another_holds(folder, told):
    """The id of a process that holds `folder` within the block; then it is killed."""

    def act():
        with run_folder.held(folder, PartialState()):
            told.write_text("")
            time.sleep(100)

    process = forked.start(act)
    try:
        wait_for(told)
        yield process
    finally:
        os.kill(process, 9)
        forked.wait(process)


def wait_for(told):
    ends = time.monotonic() + 60
    while not told.exists():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["trm-hybrid", "train", "--steps", "9"])
    with another_holds(folder, tmp_path / "told") as process:
        by = rf"process {process} on {platform.node()}, since 20\S+ \(trm-hybrid train --steps 9\)"
        before = contents_of(folder)
        with pytest.raises(ValueError, match=f"{folder}, in use by another run: {by}"):
            train(phase_1(), Counting(), settings_for(folder))
        with pytest.raises(ValueError, match="in use by another run"):
            train(phase_1(), Counting(), settings_for(folder), resume=True)
        assert contents_of(folder) == before


def test_who_is_there_may_not_be_written_yet(tmp_path):
    folder = tmp_path / "run"
    with another_holds(folder, tmp_path / "told"):
        for half in (None, "", '{"pid": 1', "[]", "{}"):
            (folder / run_folder.HOLDER).unlink(missing_ok=True)
            if half is not None:
                (folder / run_folder.HOLDER).write_text(half)
            with pytest.raises(
                ValueError, match="in use by another run: its process has not yet written who it"
            ):
                train(phase_1(), Counting(), settings_for(folder))


def test_a_folder_that_somebody_has_begun_to_use_stays(tmp_path):
    """A run that wrote nothing takes back the folders that it made, but not what is used by now."""
    with run_folder.held(tmp_path / "a" / "b" / "c", ONE):
        (tmp_path / "a" / "other").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


def test_the_lock_dies_with_its_process(tmp_path):
    folder = tmp_path / "run"
    with another_holds(folder, tmp_path / "told"):
        pass
    assert (folder / run_folder.HOLDER).exists()
    train(phase_1(), Counting(), settings_for(folder, steps=2))
    assert not (folder / run_folder.HOLDER).exists()


def test_a_process_of_the_holder_does_not_hold(tmp_path):
    """A data worker that outlives its parent keeps nobody out."""
    folder, told = tmp_path / "run", tmp_path / "told"

    def outlive():  # it says so itself: what it inherited is given up as it begins, which may come later
        told.with_suffix(".part").write_text(str(os.getpid()))
        told.with_suffix(".part").rename(told)
        time.sleep(60)

    def hold():
        with run_folder.held(folder, PartialState()):
            forked.start(outlive)
            time.sleep(60)

    process = forked.start(hold)
    wait_for(told)
    try:
        os.kill(process, 9)
        forked.wait(process)
        with run_folder.held(folder, ONE):
            pass
    finally:
        os.kill(int(told.read_text()), 9)


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def acquire(self):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.FileLock, "acquire", acquire)
    with pytest.raises(
        ValueError, match=r"a file system with locks \(flock\), got .*Operation not supported"
    ):
        train(phase_1(), Counting(), settings_for(tmp_path / "run"))


# Whose files


def write_run_json(folder):
    (folder / "run.json").write_text('{"name": "my experiment"}')


def write_metrics(folder):
    (folder / "metrics.jsonl").write_text('{"loss": 1.0}\n')


def write_curve(folder):
    (folder / "curve.png").write_bytes(b"mine")


def write_checkpoint(folder, name="checkpoint-000010"):
    (folder / name).mkdir()
    (folder / name / "trainer_state.json").write_text("{}")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        write_run_json,
        write_metrics,
        write_curve,
        write_checkpoint,
        lambda folder: write_checkpoint(folder, "checkpoint-500"),
    ],
)
def test_a_folder_with_somebodys_files_is_refused_before_anything_is_touched(write, resume, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write(tmp_path)
    before = contents_of(tmp_path)
    with pytest.raises(ValueError, match="expected an output folder without a run|run.json"):
        train(phase_1(), Counting(), settings_for(tmp_path), resume=resume)
    after = contents_of(tmp_path)
    after.pop((tmp_path / run_folder.LOCK).relative_to(tmp_path))
    assert after == before


def test_files_of_other_names_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    train(phase_1(), Counting(), settings_for(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_that_saved_nothing_makes_room(tmp_path):
    class Stopped(Exception):
        pass

    def stop(step, loss):
        raise Stopped

    with pytest.raises(Stopped):
        train(phase_1(), Counting(), settings_for(tmp_path), on_step=stop)
    first = run_folder.read_run(tmp_path)["id"]
    train(phase_1(), Counting(), settings_for(tmp_path, seed=1))
    assert run_folder.read_run(tmp_path)["id"] != first


def test_a_failed_run_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="at least one item"):
        train(phase_1(), Counting(0), settings_for(tmp_path / "a" / "b"))
    assert not (tmp_path / "a").exists()
    (tmp_path / "was there").mkdir()
    with pytest.raises(ValueError, match="at least one item"):
        train(phase_1(), Counting(0), settings_for(tmp_path / "was there"))
    assert (tmp_path / "was there").is_dir()


# What is there may be anything

JSON = ["[]", "5", "null", '"text"', '{"a": ', "[" * 10**5, "", "{}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(phase_1(), Counting(), settings_for(folder), {"new": Counting(5)})
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(folder, model=None, data=None, held_out=None, **changes):
    model = phase_1() if model is None else model
    held_out = {"new": Counting(5)} if held_out is None else held_out
    return train(model, data or Counting(), settings_for(folder, **changes), held_out, resume=True)


@pytest.mark.parametrize("content", JSON)
def test_a_run_json_that_is_something_else(content, folder):
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json"):
        resume(folder)
    with pytest.raises(ValueError, match="run.json"):
        run_state.latest(folder)


def test_a_run_of_an_earlier_version(folder):
    run = json.loads((folder / "run.json").read_text())
    for name in ("format", "id", "base"):
        del run[name]
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="an earlier version, which does not: resume it with that version"):
        resume(folder)


@pytest.mark.parametrize(
    "line", ["[]", "5", "{}", '{"step": "1"}', '{"step": null}', "[" * 10**5, "{", "\xff"]
)
def test_metrics_without_a_step(line, folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n", encoding="latin-1")
    before = contents_of(folder)
    with pytest.raises(
        ValueError, match=r'metrics.jsonl of a run, each line a JSON object with a "step", got in'
    ):
        resume(folder)
    assert {name: content for name, content in contents_of(folder).items() if name.name != ".lock"} == {
        name: content for name, content in before.items() if name.name != ".lock"
    }


@pytest.mark.parametrize("content", JSON)
def test_a_key_json_that_is_something_else(content, tmp_path):
    (tmp_path / "key.json").write_text(content)
    model = tiny_hybrid()
    enter(model, 1)
    cache = HiddenStates(tmp_path, model, Counting())
    with pytest.raises(ValueError, match="HiddenStates: expected .*key.json"):
        cache.open(ONE, print)


def test_left_overs_of_processes_that_have_ended(tmp_path):
    ended = forked.start(lambda: None)
    forked.wait(ended)
    mine = beside(tmp_path / "key.json")
    old = mine.with_name(mine.name.replace(str(os.getpid()), str(ended)))
    other = mine.with_name(mine.name.replace(platform.node(), "another"))
    notes = old.with_name(old.name.replace("key.json", "notes.txt"))
    for path in (mine, old, other, notes):
        path.write_text("")
    remove_left_over(tmp_path, hidden_states._WRITTEN)
    assert set(tmp_path.iterdir()) == {mine, other, notes}


# What differs


def other_weights():
    model = phase_1()
    with torch.no_grad():
        model.llm_model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    return model


def other_eps():
    base = tiny_base(dropout=0.2, rms_norm_eps=1e-3)
    model = tiny_hybrid(base)
    enter(model, 1)
    return model


def other_dtype():
    model = tiny_hybrid(tiny_base(dropout=0.2).bfloat16())
    model.trm_parameters()
    enter(model, 1)
    for p in model.trm_parameters():
        p.data = p.data.float()
    return model


class Other(Dataset):
    """As Counting(5), but for its last token."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        item = Counting(5)[index]
        return {name: torch.cat([t[:-1], t[-1:] + 1]) for name, t in item.items()}


def test_a_run_from_before_the_rate_rose_by_itself(tmp_path):
    """The message has the option that goes on with it."""
    train(phase_1(), Counting(), settings_for(tmp_path, warmup_steps=0))
    with pytest.raises(ValueError, match=r"warmup_steps 0 as it began \(--warmup-steps 0\), got None"):
        train(phase_1(), Counting(), settings_for(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": other_weights}, r"expected base.weights \w+ as it began, got"),
        ({"model": other_eps}, r"expected base.config.rms_norm_eps 1e-06 as it began, got 0.001"),
        ({"model": other_dtype}, r"expected base.dtype float32 as it began, got bfloat16"),
        ({"held_out": {}}, r"expected held_out.new.items 5 as it began, got none"),
        (
            {"held_out": {"new": Counting(5), "known": Counting(5)}},
            "held_out.known.items none as it began, got 5",
        ),
        ({"held_out": {"new": Other()}}, r"held_out.new.sha256 of a sample"),
        ({"learning_rate": 1.0}, r"another run can begin from its weights"),
    ],
)
def test_what_differs_is_named(changes, message, folder):
    if "model" in changes:
        changes = changes | {"model": changes["model"]()}
    before = contents_of(folder)
    with pytest.raises(ValueError, match=message):
        resume(folder, **changes)
    assert contents_of(folder) == before


def test_a_newer_transformers_may_know_more_of_a_config(folder):
    run = json.loads((folder / "run.json").read_text())
    run["base"]["config"] |= {"gone": 1}
    del run["base"]["config"]["attention_bias"]
    (folder / "run.json").write_text(json.dumps(run))
    resume(folder)


def stream(folder, name="text.txt", text=TEXT, with_end=True):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return TokenStream(Sources([str(folder / name)]), character_tokenizer(with_end), 16)


def test_the_same_text_elsewhere_is_the_same_and_another_of_its_size_is_not(tmp_path):
    settings = settings_for(tmp_path / "run", steps=2)
    train(phase_1(), stream(tmp_path / "a"), settings)
    train(phase_1(), stream(tmp_path / "b", "moved.txt"), settings, resume=True)
    for other, what in (
        (stream(tmp_path / "c", text=TEXT[:-2] + "!\n"), "data.sources.1.sha256"),
        (stream(tmp_path / "a", with_end=False), "data.tokenizer"),
        (stream(tmp_path / "d", text=OTHER_TEXT), "data.sources.1.bytes"),
    ):
        with pytest.raises(ValueError, match=f"expected {what} .* as it began, got"):
            train(phase_1(), other, settings, resume=True)


def test_large_texts_are_compared_by_blocks(tmp_path, monkeypatch):
    """Their sizes, and blocks that lie evenly in them; the first and the last bytes always."""
    monkeypatch.setattr(contents, "WHOLE_BYTES", 2**20)
    large, small = tmp_path / "large", tmp_path / "small"
    large.write_bytes(bytes(3 * 2**20))
    small.write_bytes(bytes(1000))
    (of_large, of_small) = contents.of_files([large, small])
    assert of_large["bytes"] == 3 * 2**20
    assert "sha256 of 15 blocks" in of_large
    assert "sha256 of 4 blocks" in of_small
    for place in (0, 3 * 2**20 - 1, (3 * 2**20 - 2**16) * 7 // 14):
        content = bytearray(3 * 2**20)
        content[place] = 1
        large.write_bytes(content)
        assert contents.of_files([large, small])[0] != of_large
    large.write_bytes(bytes(3 * 2**20) + b"\0")
    assert contents.of_files([large, small])[0] != of_large


# Names that look local


@pytest.mark.parametrize("name", ["./nope", "../nope", "/x/y", "~/nope", "nope/", "a/b/c", "C:\\nope"])
def test_a_mistyped_folder_is_found_out_at_once(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", ask)
    monkeypatch.setattr("transformers.utils.hub.list_repo_templates", ask, raising=False)
    assert main(["generate", "--model", name, "--prompt", "a"]) == 2
    assert (
        f"expected a model of transformers at {name}, got none that can be loaded: there is no such folder"
        in (capsys.readouterr().err)
    )


def test_names_that_may_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any(map(looks_local, ("gpt2", "openai-community/gpt2", "Qwen/Qwen3-8B", "a_b/c.d-e")))
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(
        ValueError, match="expected a model at gpt2, got none .*: there is no config.json in it."
    ):
        check_folder("a model", "gpt2")
    (tmp_path / "gpt2" / "inside").mkdir()
    (tmp_path / "gpt2" / "inside" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no config.json in it; inside in it has one"):
        check_folder("a model", tmp_path / "gpt2")
    for name in ("checkpoint-9", "checkpoint-12"):
        (tmp_path / "trained" / name).mkdir(parents=True)
        (tmp_path / "trained" / name / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no config.json in it; checkpoint-12 in it has one"):
        check_folder("a model", tmp_path / "trained")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="it is no folder"):
        check_folder("a model", "./file")


def test_a_name_in_a_folder_here_is_not_asked_of_the_hub(tmp_path, monkeypatch, capsys):
    """Only a model that was fetched before keeps its name on the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    for command in ("generate --prompt a --model", "eval --data a.txt --model", "info --base"):
        assert main([*command.split(), "runs/frist"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "at runs/frist, got none that can be loaded: there is no such folder in runs" in error
    assert not is_in_a_folder_here("elsewhere/frist")
    assert not is_in_a_folder_here("runs")
    cached = tmp_path / "hub/models--runs--frist"
    (cached / "snapshots/0").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0")
    (cached / "snapshots/0/config.json").write_text("{}")
    asks = local_paths.try_to_load_from_cache
    monkeypatch.setattr(
        local_paths, "try_to_load_from_cache", lambda *a: asks(*a, cache_dir=tmp_path / "hub")
    )
    assert not is_in_a_folder_here("runs/frist")
    assert is_in_a_folder_here("runs/-frist-"), "no name of the hub at all"


def test_the_command_line_says_what_differs_at_the_start(tmp_path, capsys):
    """Also --known, which it would ask for after the last step."""
    base = save_base(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["train", "--base", base, "--data", tmp_path / "text.txt", "--output", tmp_path / "run"]
    words += ["--steps", 2, "--batch-size", 2, "--sequence-length", 16, "--injection-layers", 1]
    words += ["--trm-hidden-size", 16, "--trm-num-heads", 2, "--trm-intermediate-size", 24]
    words = [str(word) for word in words]
    assert main([*words, "--known", str(tmp_path / "text.txt")]) == 0
    capsys.readouterr()
    assert main([*words, "--resume"]) == 2
    assert "expected held_out.known.items" in capsys.readouterr().err
    assert main([*words, "--known", str(tmp_path / "text.txt"), "--resume", "--dtype", "bfloat16"]) == 2
    assert "expected base.dtype float32 as it began, got bfloat16" in capsys.readouterr().err
    assert main([*words, "--resume", "--known", str(tmp_path / "text.txt"), "--steps", "4"]) == 0
    assert "extended from 2 to 4 steps" in capsys.readouterr().out
