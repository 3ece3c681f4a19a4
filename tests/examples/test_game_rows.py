"""The example's rows are those that `trm-hybrid train` reads, and what is held out is not among them."""

import json

import game_rows
import pytest

from hybrid.data.labelled import LabelledText, labelled_row
from hybrid.demo.real.game import WORDS

GAMES = 40


@pytest.fixture
def rows(monkeypatch, tmp_path):
    folder = tmp_path / "game"
    monkeypatch.setattr("sys.argv", ["game_rows.py", str(folder), "--most", "8", "--games", str(GAMES)])
    game_rows.main()
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in folder.iterdir()
    }


def test_a_row_has_the_answer_after_each_part(rows):
    assert len(rows["train"]) == 2 * GAMES and len(rows["held-out"]) == 100
    for number, row in enumerate(rows["train"]):
        content, _ = labelled_row(row, "text")
        assert isinstance(content, LabelledText) and not content.closes
        first, *moves, asked = content.parts
        cups = [f" {cup}" for cup in WORDS.follow(first.split()[5][0], moves)]
        assert 1 <= len(moves) <= 8 and asked in WORDS.closings
        inner = cups if number < GAMES else [None] * len(cups)
        assert content.answers == [None, *inner, cups[-1]]


def test_what_is_held_out_is_not_trained_on(rows):
    def beginnings(name):
        texts = ("".join(row["text"]) for row in rows[name] if len(row["text"]) == 10)
        return {text[: text.index(".", 30)] for text in texts}  # 8 moves

    assert beginnings("train") and beginnings("held-out")
    assert not beginnings("train") & beginnings("held-out")
