"""The demonstration: its game, its language model, and one quick run from beginning to end."""

import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid import HybridModel, PresetConfigs
from hybrid.cli import main
from hybrid.data.blocks import TokenBlocks
from hybrid.demo import report
from hybrid.demo.base import encode, make_base, make_tokenizer
from hybrid.demo.pretraining import Pretraining
from hybrid.demo.run import _Demo, run
from hybrid.demo.shell_game import ShellGame, accuracy_by_swaps, answers, is_held_out
from hybrid.demo.texts import english_prose, split_sources
from hybrid.info import count, count_trained
from hybrid.training import phases
from hybrid.training.loop import train
from hybrid.training.processes import seed_everything
from hybrid.training.settings import TrainSettings

BEGINNING = 7  # the first cup and six swaps


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its exit code and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    return SimpleNamespace(code=run(folder, seed=3, quick=True), folder=folder)


def items_of(data):
    return (data[i] for i in range(len(data)))


def text_of(item, name="input_ids"):
    return "".join(chr(token) for token in item[name].tolist() if token >= 0)


def play(game):
    """Where the ball is after every swap, with three things in a row that change places."""
    cups = ["ball" if str(i) == game[0] else "nothing" for i in range(3)]
    seen = []
    for letter in game[1:]:
        left, right = {"a": (0, 1), "b": (0, 2), "c": (1, 2)}[letter]
        cups[left], cups[right] = cups[right], cups[left]
        seen.append(str(cups.index("ball")))
    return "".join(seen)


class Says:
    """A model that knows one answer to every beginning of a game."""

    device = torch.device("cpu")

    def __init__(self, answer):
        self.answer = answer

    def eval(self):
        return self

    def __call__(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 128)
        for row, ids in enumerate(input_ids.tolist()):
            text = "".join(map(chr, ids))
            for at in range(1, len(text) - 1):
                logits[row, at, ord(self.answer(text[: at + 1]))] = 1
        return SimpleNamespace(logits=logits)


# The game


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("num_swaps", [1, 4, 16])
def test_games_follow_the_rules(num_swaps, held_out):
    games = ShellGame(60, num_swaps, seed=5, held_out=held_out)
    for item in (games[i] for i in range(len(games))):
        text = text_of(item)
        assert re.fullmatch(rf"[012][abc]{{{num_swaps}}}[012]", text)
        truth = play(text[:-1])
        assert text[-1] == truth[-1]
        # the label of token t + 1 is what is asked for after token t: nothing after the first cup alone
        assert item["labels"].tolist() == [-100, -100, *map(ord, truth)]


def test_a_game_is_a_function_of_its_seed_and_number():
    games, again, others = ShellGame(50, 16, seed=1), ShellGame(99, 16, seed=1), ShellGame(50, 16, seed=2)
    assert [games.game(i) for i in range(50)] == [again.game(i) for i in reversed(range(50))][::-1]
    assert len({games.game(i) for i in range(50)} | {others.game(i) for i in range(50)}) == 100
    with pytest.raises(IndexError, match="expected a game in 0..49, got 50"):
        games[50]


def test_held_out_games_never_occur_in_training():
    trained = {text_of(item)[:BEGINNING] for item in items_of(ShellGame(3000, 16, seed=0))}
    held_out = {text_of(item)[:BEGINNING] for item in items_of(ShellGame(500, 16, seed=0, held_out=True))}
    assert not trained & held_out
    share = [is_held_out(int(first), "".join(swaps)) for first in "012" for swaps in product("abc", repeat=6)]
    assert sum(share) / len(share) == pytest.approx(0.1, abs=0.02)


def test_accuracy_counts_right_answers_by_number_of_swaps():
    games = ShellGame(300, 5, seed=7)
    truths = [play(text_of(item)[:-1]) for item in items_of(games)]
    assert accuracy_by_swaps(Says(lambda game: play(game)[-1]), games) == [1.0] * 5
    always = accuracy_by_swaps(Says(lambda game: "0"), games)
    assert always == pytest.approx([sum(t[i] == "0" for t in truths) / 300 for i in range(5)])
    late = accuracy_by_swaps(Says(lambda game: play(game)[-1] if len(game) > 3 else "x"), games)
    assert late == [0.0, 0.0, 1.0, 1.0, 1.0]


# The language model and what it learns from


def test_tokenizer_gives_one_token_a_character(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = "  def f(x):\n\treturn 'a' , \"b\" . \r\n" + "".join(map(chr, range(1, 128))) + "x ? y"
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = one(text)["input_ids"]
        assert ids == [ord(character) for character in text] == encode(text).tolist()
        assert one.decode(ids) == text
        assert one("é日!")["input_ids"] == encode("é日!").tolist() == [63, 63, 33]


def test_parameter_counts():
    base = make_base()
    assert count(base) == 105_792
    assert count_trained(HybridModel(llm_model=base, config=PresetConfigs.tiny()).freeze_base()) == 56_960


def test_pretraining_shows_the_format_of_the_game_and_not_its_answers():
    prose = TokenBlocks(torch.arange(128).repeat(1000), 64)
    items = list(items_of(Pretraining(prose, ShellGame(400, 16, seed=0), seed=0)))
    assert {len(item[name]) for item in items for name in item} == {64}
    counting, games, text = items[::4], items[1::4], items[2::4] + items[3::4]
    assert len(text) == len(prose) and all(torch.equal(item["input_ids"], item["labels"]) for item in text)

    for item in counting:
        assert (item["input_ids"] - 48).diff().remainder(3).unique().numel() == 1
        assert item["labels"][:2].eq(-100).all() and torch.equal(item["labels"][2:], item["input_ids"][2:])

    right = said = 0
    for item in games:
        game, answers = text_of(item)[:17], text_of(item, "labels")
        assert item["labels"][:2].eq(-100).all() and item["labels"][18:].eq(-100).all()
        assert not item["input_ids"][18:].any() and set(answers) <= set("012")
        right += sum(a == b for a, b in zip(play(game), answers, strict=True))
        said += len(answers)
    assert right / said == pytest.approx(1 / 3, abs=0.02)


def test_texts_keep_training_and_held_out_apart():
    to_train_on, held_out = split_sources(500_000, 20_000)
    assert to_train_on and held_out and not set(to_train_on) & set(held_out)
    assert split_sources(500_000, 20_000) == (to_train_on, held_out)
    prose, held_out_prose = english_prose(64)
    assert len(prose) == pytest.approx(9 * len(held_out_prose), rel=0.05)
    rows = [{text_of(item) for item in items_of(texts)} for texts in (prose, held_out_prose)]
    shared = rows[0] & rows[1]
    assert not any(c.isalpha() for text in shared for c in text), "the lines of tables may be the same"


# One run


def test_quick_run_leaves_report_pictures_and_models(quick):
    assert quick.code == 0
    for name in (report.BY_SWAPS, report.BY_STEPS):
        assert (quick.folder / name).read_bytes().startswith(b"\x89PNG")
    page = (quick.folder / report.REPORT).read_text()
    headings = re.findall(r"^## (.+)", page, re.MULTILINE)
    assert headings == [
        "Compared bit by bit",
        "Following the ball",
        "Real text",
        "What this shows, and what not",
        "Files",
    ]
    assert "105,792 parameters" in page and "56,960 parameters" in page and "A quick run" in page
    assert page.count("- equal: ") == 10 and "NOT EQUAL" not in page
    assert len(re.findall(r"\d+\.\d+%", page.split("From earlier trials\n")[0])) > 30
    assert not re.search(r"\bnan\b|\binf\b", page)
    for folder in ("base", "game", "text"):
        assert (quick.folder / folder / "model.safetensors").is_file()
        assert (quick.folder / "training" / folder / "metrics.jsonl").is_file()


@pytest.mark.slow
def test_a_second_run_replaces_the_first_with_the_same_figures(quick):
    page = (quick.folder / report.REPORT).read_text()
    (quick.folder / report.REPORT).write_text("old")
    threads = torch.get_num_threads()
    assert run(quick.folder, seed=3, quick=True) == 0
    assert (quick.folder / report.REPORT).read_text() == page
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_the_reference_gives_the_same_as_the_default(quick, tmp_path, capsys):
    """As long as the default is the reference: where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("the default trains on the GPU here")
    assert main(["demo", "--quick", "--seed", "3", "--backend", "reference", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("backend: reference (asked for)\n")
    assert (tmp_path / report.REPORT).read_text() == (quick.folder / report.REPORT).read_text()
    for folder in ("base", "game", "text"):
        files = [path / folder / "model.safetensors" for path in (tmp_path, quick.folder)]
        assert files[0].read_bytes() == files[1].read_bytes(), folder


def test_saved_hybrid_is_its_base_but_for_the_injection(quick):
    base = AutoModelForCausalLM.from_pretrained(quick.folder / "base")
    hybrid = AutoModelForCausalLM.from_pretrained(quick.folder / "game")
    ids = encode("the quick brown fox")[None]
    with torch.no_grad():
        assert not torch.equal(hybrid(input_ids=ids).logits, base(input_ids=ids).logits)
        with hybrid.disable_injection():
            assert torch.equal(hybrid(input_ids=ids).logits, base(input_ids=ids).logits)
    assert len(answers(hybrid, 2, "abcab")) == 5


def test_a_difference_is_found_and_shown(tmp_path, capsys):
    demo = _Demo(tmp_path, seed=0, quick=True)
    base, other = make_base(), make_base()
    demo.check("a model and itself", base, base)
    demo.check("two models", base, other)
    assert list(demo.checks.values()) == [True, True, False, False]
    assert "NOT EQUAL: two models: logits" in capsys.readouterr().out


def test_output_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid.demo.run.make_base", lambda: pytest.fail("a model was made"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="demo: expected an output folder that can be written to"):
        run(tmp_path / "file" / "below")


def test_training_the_block_alone_beats_the_frozen_base(quick, tmp_path):
    """A few seconds of the demonstration's part 1: chance is 1/3, and after three swaps it is far above."""
    seed_everything(0)
    base = AutoModelForCausalLM.from_pretrained(quick.folder / "base")
    held_out = ShellGame(256, 6, seed=99, held_out=True)
    before = accuracy_by_swaps(base, held_out)[:3]
    config = PresetConfigs.tiny()
    config.num_recursion_steps = 4
    hybrid = HybridModel(llm_model=base, config=config)
    phases.enter(hybrid, 1)
    settings = TrainSettings(tmp_path, steps=400, batch_size=32, learning_rate=2e-3, warmup_steps=50)
    train(hybrid, ShellGame(400 * 32, 6, seed=0), settings)
    after = accuracy_by_swaps(hybrid, held_out)[:3]
    assert report.mean(before) < 0.45
    assert report.mean(after) > 0.7
