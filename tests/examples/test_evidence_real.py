"""The evidence on a real base, with a tiny one: every arm runs, a run that is there stays, tables say all."""

import statistics
from dataclasses import replace

import pytest
import torch
from evidence_real import ablations, arms, cached, command, measures, tables, tasks, yardstick
from evidence_real.beginnings import SharedBeginnings
from evidence_real.results import Lines, Run, rewritten

from hybrid.demo.real import base as real_base
from hybrid.demo.real import training
from hybrid.demo.real.questions import NOTHING, encode
from hybrid.demo.real.training import Known, Model, TrainingPlan
from tests.support.tiny_words import word_base, word_tokenizer


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A base of two layers, few games, two steps; the last layer is the second."""
    word_base().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    for module in (arms, cached):
        monkeypatch.setattr(module, "LAST", 2)
    monkeypatch.setattr(cached, "LAYERS", (1, 2))
    for name, count in {"GAMES": 8, "HELD_OUT": 4, "CLOSINGS": 3}.items():
        monkeypatch.setattr(cached, name, count)
    monkeypatch.setattr(cached, "_ROWS", dict.fromkeys(cached._ROWS, 4))
    monkeypatch.setattr(measures, "N", (1, 2))
    monkeypatch.setattr(tables, "N", (1, 2))
    monkeypatch.setattr(real_base, "folder_of", lambda folder: folder)
    few = {
        name: replace(arm, plan=replace(arm.plan, steps=min(2, arm.plan.steps), batch_size=4))
        for name, arm in arms.ARMS.items()
    }
    monkeypatch.setattr(command, "ARMS", few)
    monkeypatch.setattr(cached, "split_sources", lambda *_: ([], [__file__]))
    monkeypatch.setattr(command, "PUBLISHED", tmp_path / "none.jsonl")
    threads = torch.get_num_threads()
    yield ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--tasks", "words"]
    torch.set_num_threads(threads)


# one of each way to learn
KINDS = (
    "frozen base",
    "n random, text kept",
    "untied, same FLOPs",
    "n = 1, fillers",
    "LoRA on the last layer, text kept",
    "LoRA on all layers, 400 steps",
    "LoRA on all layers, 1,500 steps",
)


@pytest.mark.slow
def test_an_arm_of_every_kind_runs_and_is_not_run_again(tiny, tmp_path, capsys, monkeypatch):
    given = [*tiny, "--seeds", "0", "--arms", *KINDS]
    assert command.main(given) == 0
    assert f"{len(KINDS)} runs to make" in capsys.readouterr().out
    path = tmp_path / "out" / command.RESULTS
    lines = Lines(path)
    for arm in KINDS:
        result = lines.of("words", arm)[0]
        assert len(result["by_moves"]) == len(result["by_moves_among_answers"]) == 24
        pairs = zip(result["by_moves"], result["by_moves_among_answers"], strict=True)
        assert all(of_all <= of_answers for of_all, of_answers in pairs)
        assert len(result["closing"]) == len(result["generate"]) == 4
        assert ("by_n" in result) == (arms.ARMS[arm].learns == "recursion")
        assert result["trained_parameters"] > 0 or arm == "frozen base"
    losses = [lines.of("words", arm)[0]["help texts"] for arm in KINDS]
    assert len(set(losses)) == len(KINDS), "each has learned something, and something else"

    before = path.read_bytes()
    command.main(given)
    assert "0 runs to make" in capsys.readouterr().out and path.read_bytes() == before

    page = tmp_path / "page.md"
    page.write_text(
        "<!-- table: words -->\nold\n<!-- end -->\n<!-- table: sentences-by-n -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(command, "DOCUMENT", page)
    assert command.main([*given, "--publish"]) == 0
    assert (tmp_path / "page" / command.RESULTS).read_bytes() == before
    assert "old" not in page.read_text() and " - - - -" in page.read_text(), "seeds that are missing are seen"
    lacking = [arm for arm in arms.ARMS if arm not in KINDS]
    assert (tmp_path / "page" / command.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert f"\nNot run: {'; '.join(lacking)}.\n" in page.read_text()
    assert "sentences-by-n -->\nNothing was run.\n" in page.read_text()


def test_published_runs_can_be_made_again(tiny, tmp_path, capsys, monkeypatch):
    published = Lines(tmp_path / "published.jsonl")
    run = Run("words", "frozen base", 0)
    published.add(run, command.settings(run), {"closing": [0.5]})
    monkeypatch.setattr(command, "PUBLISHED", published.path)
    given = [*tiny, "--seeds", "0", "--arms", run.arm]
    assert command.main(given) == 0 and "0 runs to make" in capsys.readouterr().out
    given[given.index("--out") + 1] = str(tmp_path / "again")
    assert command.main([*given, "--afresh"]) == 0 and "1 runs to make" in capsys.readouterr().out
    made = Lines(tmp_path / "again" / command.RESULTS).of("words", run.arm)
    assert made[0]["by_moves"] and Lines(published.path).of("words", run.arm) == {0: {"closing": [0.5]}}
    states = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "again" / "states").iterdir()}
    assert "words-longer" in states and not states & {"words-train", "kept"}, "what nothing learns from"
    for more, message in ((["--afresh"], "a new --out with --afresh"), (["--publish"], "got both")):
        given[given.index("--out") + 1] = str(tmp_path / ("again" if more == ["--afresh"] else "new"))
        with pytest.raises(SystemExit):
            command.main([*given, "--afresh", *more])
        assert message in capsys.readouterr().err


def test_a_missing_package_is_said_before_the_first_run(tiny, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    given = [*tiny[:4], "--tasks", "words", "letter counting", "--arms", "frozen base"]
    with pytest.raises(SystemExit):
        command.main(given)
    printed = capsys.readouterr()
    assert "expected reasoning-gym (pip install reasoning-gym==0.1.25)" in printed.err and not printed.out


def test_a_run_of_other_settings_is_made_again(tmp_path):
    lines, run = Lines(tmp_path / "new" / "results.jsonl"), Run("words", "n = 1", 3)
    lines.add(run, {"n": (1, 2)}, {"closing": [0.5]})
    lines.add(run, {"n": (1, 3)}, {"closing": [0.75]})
    again = Lines(lines.path)
    assert again.find(run, {"n": (1, 3)}) == {"closing": [0.75]} and again.find(run, {"n": (1, 2)}) is None
    assert again.of("words", "n = 1") == {3: {"closing": [0.75]}}
    assert Lines(tmp_path / "other.jsonl", begin_with=lines.path).runs == again.runs
    with lines.path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="expected a run in line 3"):
        Lines(lines.path)


def test_arms_have_the_sizes_that_they_are_named_for():
    """Of the real base's shapes, on no memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(num_hidden_layers=30, vocab_size=64, **sizes)

    def parameters(name):
        with torch.device("meta"):
            model = arms.model_of(arms.ARMS[name], LlamaForCausalLM(config).requires_grad_(False), 0)
        return sum(p.numel() for p in model.trained().values())

    recursion = parameters("n = 8")
    assert recursion == parameters("n = 1") == 122_496
    for name in (
        "LoRA on the last layer",
        "LoRA on all layers, 400 steps",
        "LoRA on all layers, 1,500 steps",
    ):
        assert parameters(name) == pytest.approx(recursion, rel=0.07)
    assert parameters("untied, same FLOPs") > 3 * recursion


def test_permutations_of_five_are_all_of_them():
    moves = [tuple(map("ABCDE".index, to)) for to in tasks.S5.moves.values()]
    found, new = set(), {tuple(range(5))}
    while new:
        found |= new
        new = {tuple(move[place] for place in one) for one in new for move in moves} - found
    assert len(found) == 120


def test_fillers_stand_between_a_move_and_its_answer():
    tokenizer = word_tokenizer()
    plain, filled = tasks.TASKS["words"], tasks.TASKS["words, fillers"]
    one, other = (
        encode(tokenizer, [task.text(0, True, 3, ". Now it is under cup")]) for task in (plain, filled)
    )
    assert one.asked[one.asked != NOTHING].equal(other.asked[other.asked != NOTHING])
    first = (other.asked[0] != NOTHING).nonzero()[0]
    assert tokenizer.decode(other.ids[0, : first + 1]).endswith(" - - -")
    assert not any("-" in closing for closing in filled.closings), "a tokenizer may join it to a filler"


def test_letter_counting_is_held_out_by_the_first_word():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: it is no extra")
    first = {
        held_out: {
            tasks.letter_counting(i, held_out, None, None).prompt.split('text: "')[1].split()[0]
            for i in range(60)
        }
        for held_out in (False, True)
    }
    assert not first[True] & first[False]
    assert {len(tasks.letter_counting(i, True, 20, " =").answers[0]) for i in range(30)} == {1}


@pytest.mark.parametrize("shown", [(command, tables), (ablations, ablations)], ids=["evidence", "ablations"])
def test_the_documents_tables_are_those_of_its_results(shown):
    of_page, of_tables = shown
    text = of_page.DOCUMENT.read_text(encoding="utf-8")
    assert rewritten(of_page.DOCUMENT, Lines(of_page.PUBLISHED), of_tables.TABLES) == text
    for name in of_tables.TABLES:
        assert f"<!-- table: {name} -->" in text


def test_runs_that_were_made_again_gave_what_is_published():
    """All figures but the seconds; accuracy among the answers was not measured of the earliest runs."""
    published = Lines(command.PUBLISHED).runs
    again = Lines(command.PUBLISHED.with_name("made-again.jsonl")).runs
    assert len(again) == 3
    for run, line in again.items():
        earlier = published[run]
        assert line["settings"] == earlier["settings"]
        same = earlier["result"].keys() - {"cpu_seconds"}
        assert {"closing", "generate", "by_moves", "loss"} <= same
        assert {name: line["result"][name] for name in same} == {
            name: earlier["result"][name] for name in same
        }


def test_bfloat16_is_for_training_alone():
    """What is measured of LoRA on all layers is float32's, and so are its weights."""
    in_bfloat16 = arms.model_of(arms.ARMS["LoRA on all layers, 1,500 steps"], word_base(), 0)
    in_float32 = arms.model_of(arms.ARMS["LoRA on all layers, 400 steps"], word_base(), 0)
    ids = torch.arange(12)[None]

    def states(model, training):
        model.whole.train(training)
        with torch.no_grad():
            return model.last_states(ids, None)[1]

    assert torch.equal(states(in_bfloat16, False), states(in_float32, False))
    narrow, wide = states(in_bfloat16, True), states(in_float32, True)
    assert not torch.equal(narrow, wide)
    assert torch.allclose(narrow, wide, atol=0.1)  # states are about 1; bfloat16 rounds each product by 2^-9
    assert narrow.dtype == torch.float32
    assert {p.dtype for p in in_bfloat16.whole.parameters()} == {torch.float32}


def test_levers_run_once_and_their_table_shows_every_seed(tiny, tmp_path, capsys, monkeypatch):
    few = TrainingPlan(steps=2, batch_size=4)
    levers = {
        "as it is": ablations.Lever({"num_recursion_steps": 1}, few),
        "a gate": ablations.Lever({"blending_strategy": "gated"}, few, gate=-3.0),
        "two points": ablations.Lever({"injection_layers": [1, 2]}, few),
        "below": ablations.Lever({"injection_layers": [1]}, few, narrow=True),
    }
    page = tmp_path / "page.md"
    page.write_text("<!-- table: ablations -->\n<!-- end -->\n")
    published = tmp_path / "page" / "ablations.jsonl"
    monkeypatch.setattr(cached, "LAYERS", (2,))  # so that layer 1 is one of which nothing is kept yet
    changed = {"LEVERS": levers, "GAMES": 4, "N": (1, 2), "DOCUMENT": page, "PUBLISHED": published}
    for name, value in changed.items():
        monkeypatch.setattr(ablations, name, value)
    given = [*tiny[:4], "--seeds", "1"]
    assert ablations.main([*given, "--publish"]) == 0
    assert capsys.readouterr().out.count("seed 1: ") == 4
    path = tmp_path / "out" / "ablations.jsonl"
    result = Lines(path).of("words", "two points")[1]
    assert [len(moves) for moves in result["by_n"].values()] == [24, 24] and result["steps"] == 2
    made = path.read_bytes()
    assert published.read_bytes() == made
    assert ablations.main(given) == 0 and path.read_bytes() == made, "what is there is not run again"
    rows = page.read_text().splitlines()[3:7]
    assert [row.split("|")[1].strip() for row in rows] == list(levers)
    for row, found in zip(rows, Lines(path).runs.values(), strict=True):
        first = statistics.mean(found["result"]["by_n"]["2"][:16])
        assert f" {first:.3f} | - {first:.3f} - - - |" in row, "the mean over the seeds, and each of them"


def test_states_of_any_layer_are_kept_in_a_file_of_their_own(tiny, tmp_path):
    texts = [tasks.TASKS["words"].text(i, False, None, None) for i in range(4)]
    cache = cached.Cache(tmp_path / "states", tmp_path / "base")
    questions = encode(cache.tokenizer, texts)
    both = cache.part("some", questions)
    assert both.keys() >= {"h1", "h2"} and len(list(cache.folder.iterdir())) == 1
    (known,) = cache.folder.iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached, "LAYERS", (2,))
        first = cache.part("some", questions, 1)
    assert torch.equal(first["h1"], both["h1"]) and "h2" not in first
    assert known.exists() and len(list(cache.folder.iterdir())) == 2


def test_a_lever_changes_what_it_says():
    def trained(name):
        base = word_base()
        lever = ablations.LEVERS[name]
        at = {"injection_layers": [2]}
        return ablations.model_of(replace(lever, settings=at | lever.settings), base, 0).trained()

    gated = trained("a gate that opens from .05")
    (bias,) = (parameter for name, parameter in gated.items() if name.endswith("gate_bias"))
    assert torch.sigmoid(bias).item() == pytest.approx(0.047, abs=1e-3)
    narrow = ablations.LEVERS["as it is, in bfloat16"]
    narrow = replace(narrow, settings={"injection_layers": [2]})
    assert ablations.model_of(narrow, word_base(), 0).trained_in == torch.bfloat16
    usual, zero = trained("as it is"), trained("y and z from zero")
    assert {name.rpartition(".")[2] for name in usual.keys() - zero.keys()} == {"y_init", "z_init"}


def test_shared_beginnings_are_computed_once_and_change_nothing():
    """In float32, without autocast: the loss of a step and its gradients are those of the padded batch."""
    questions = encode(word_tokenizer(), [tasks.TASKS["words"].text(i, False, None, None) for i in range(16)])
    known = Known(questions, 0, torch.empty(16, 0))
    found = []
    for kind in (Model, SharedBeginnings):
        padded = arms.model_of(arms.ARMS["LoRA on all layers, 400 steps"], word_base(), 0)
        for parameter in padded.trained().values():  # B begins at 0: A would get no gradient
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
        model = padded if kind is Model else SharedBeginnings(padded.whole, padded.base, torch.float32)
        rows = []
        padded.base.model.register_forward_pre_hook(
            lambda _, __, inputs, rows=rows: rows.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        loss = training._Loss(model, known, TrainingPlan(batch_size=8), None, torch.Generator())(0)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.trained().values()], rows[-1]))
    (padded_loss, padded_grads, padded_tokens), (loss, grads, tokens) = found
    assert tokens < padded_tokens * 0.7
    torch.testing.assert_close(loss, padded_loss)
    assert any(g.abs().max() > 1e-3 for g in grads)
    for g, wanted in zip(grads, padded_grads, strict=True):
        torch.testing.assert_close(g, wanted, rtol=1e-4, atol=1e-6)


def test_moves_are_followed_up_to_the_first_that_is_answered_less_well(tmp_path):
    shares = {0: [1.0, 0.9, 0.89], 2: [1.0, 1.0, 1.0], 3: [0.5, 1.0, 1.0]}
    lines = Lines(tmp_path / "results.jsonl")
    for seed, by_moves in shares.items():
        result = {"by_moves": by_moves + [1.0] * 21, "closing": [0.5, 1.0, 0.25], "cpu_seconds": 10.4}
        lines.add(Run("words", "n = 1", seed), {}, result)
    assert "2 - 24 0 -" in tables.each_seed(lines, "words")
    assert "0.75 - 0.75 0.75 -" in tables.each_seed(lines, "words")
    assert "10 - 10 10 -" in tables.each_seed(lines, "words")


def test_who_follows_some_moves_is_right_in_games_that_have_no_more(tmp_path):
    lengths = [1, 4, 5, 16]
    assert yardstick.right_answers(cups=4, lengths=lengths, followed=0) == 0.25
    assert yardstick.right_answers(cups=4, lengths=lengths, followed=4) == (1 + 1 + 0.25 + 0.25) / 4
    assert yardstick.right_answers(cups=4, lengths=lengths, followed=16) == 1
    shown = yardstick.short_games(Lines(tmp_path / "none"))
    words = next(line for line in shown.splitlines() if "words" in line)
    # 9 of the 100 held-out games have at most four moves
    assert words.split("|")[5].strip() == f"{(9 + 91 / 3) / 100:.3f}"
