"""A cache of a frozen base's hidden states: the same losses, fewer layers, never those of something else."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybrid.cli import main
from hybrid.data.sources import Sources
from hybrid.data.stream import TokenStream
from hybrid.model.injection_points import decoder_layers
from hybrid.training import contents, hidden_states
from hybrid.training.batches import LengthCurriculum
from hybrid.training.loop import train
from hybrid.training.lower_layers import LowerLayers
from hybrid.training.phases import enter
from tests.hybrid.cli.test_cli import options, refused
from tests.hybrid.data.test_stream import TEXTS
from tests.hybrid.training.test_train import Stopped, assert_equal, lines_of, settings_for, stop_after
from tests.support import ranks, tiny
from tests.support.tiny_text import FIELDS, Counting, character_tokenizer, save_base, tiny_base, tiny_hybrid

CHECKS = 4  # forwards before the first step: two for documents that stay apart, two for the cache
STEPS, BATCH = 18, 3  # more than two passes
BYTES = 16 * 32 * 4  # of a row: tokens, width, float32


def write_text(folder):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS[:13]))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def stream(text, length=16, tokenizer=None, **options):
    few = {"shuffled_rows": 16, "held_out": 2} | options
    return TokenStream(Sources([str(text)]), tokenizer or character_tokenizer(), length, **few)


def model(base=None, dropout_above=0.3, **changes):
    """A hybrid after the first of two layers, in phase 1; the second has dropout."""
    hybrid = tiny_hybrid(base, **changes)
    hybrid.llm_model.model.layers[1].self_attn.attention_dropout = dropout_above
    enter(hybrid, 1)
    return hybrid


def run(hybrid, data, folder, cache=None, resume=False, on_step=None, **changes):
    changes = {"steps": STEPS, "cache_hidden_states": cache} | changes
    data = stream(data) if isinstance(data, Path) else data
    return train(hybrid, data, settings_for(folder, **changes), resume=resume, on_step=on_step)


class Calls:
    """How often the base's first layer computes."""

    def __init__(self, hybrid):
        self.number = 0
        hybrid.llm_model.model.layers[0].self_attn.register_forward_hook(self._count)

    def _count(self, *_):
        self.number += 1


def rows_of(cache):
    """name -> tensor, as bytes"""
    return {path.name: load_file(path)["hidden_states"].numpy().tobytes() for path in cache.glob("row-*")}


class Ran:
    """A run that is over: its folder, model, losses, how often the first layer computed, what was said."""

    def __init__(self, text, folder, cache=None):
        self.folder, self.model, self.losses, self.cache = folder, model(), {}, cache
        self.calls = Calls(self.model)
        run(self.model, text, folder, cache, on_step=self.losses.__setitem__)


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """The training without a cache."""
    return Ran(text, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def filled(text, tmp_path_factory):
    """The training that filled a cache."""
    folder = tmp_path_factory.mktemp("filled")
    return Ran(text, folder / "run", folder / "cache")


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of that cache."""
    return shutil.copytree(filled.cache, tmp_path / "cache")


# Without the layers below


def without_dropout(base):
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return base


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((family, False) for family in tiny.FAMILIES), ("llama", True), ("falcon", True)],
)
def test_a_step_without_the_layers_below_is_the_same_step(family, checkpointing):
    """Loss and gradients bit for bit, and the operations of the layers below are gone."""
    hybrid = tiny.tiny_hybrid(family, injection_layers=[2, 3])
    without_dropout(hybrid.llm_model)
    enter(hybrid, 1)
    if checkpointing:
        hybrid.gradient_checkpointing_enable({"use_reentrant": False})
    hybrid.train()
    layers = LowerLayers(hybrid)
    assert layers.check().shape == (2, 16, tiny.WIDTH)

    def step():
        hybrid.zero_grad()
        with FlopCounterMode(display=False) as flops:
            loss = hybrid(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        grads = {name: p.grad.clone() for name, p in hybrid.named_parameters() if p.grad is not None}
        return loss, grads, flops.get_total_flops()

    tokens = tiny.tokens()
    with layers.recorded() as found:
        loss, grads, flops = step()
    with layers.left_out(found[0]):
        loss_without, grads_without, flops_without = step()
    assert torch.equal(loss, loss_without)
    assert grads.keys() == grads_without.keys() != set()
    assert all(torch.equal(grads[name], grads_without[name]) for name in grads)

    base = hybrid.llm_model
    with FlopCounterMode(display=False) as counter, torch.no_grad(), hybrid.disable_injection():
        base(input_ids=tokens, use_cache=False)
    names = [name for name, m in base.named_modules() for layer in decoder_layers(base)[:2] if m is layer]
    below = sum(sum(counter.get_flop_counts()[f"{type(base).__name__}.{name}"].values()) for name in names)
    assert below > 0
    if checkpointing:  # transformers 5.17 computes the last of them again in backward
        assert flops - flops_without in (below, below * 3 // 2)
    else:
        assert flops - flops_without == below


# A training


def test_the_layers_below_compute_each_row_once(text, plain, filled):
    """Over more than two passes: the same losses, bit for bit."""
    rows = stream(text).count_rows() - 2
    assert 2 * rows < STEPS * BATCH
    assert filled.losses == plain.losses
    assert len(plain.losses) == STEPS
    assert_equal(filled.model, plain.model)
    assert filled.calls.number == CHECKS + -(-rows // BATCH)
    found = rows_of(filled.cache)
    assert len(found) == rows
    assert {len(content) for content in found.values()} == {BYTES}


def test_the_disk_is_spoken_of_first(text, tmp_path, capsys, monkeypatch):
    def stop(*_):
        assert not (tmp_path / "deep").exists()
        raise Stopped

    monkeypatch.setattr(hidden_states.run_folder, "make_folder", stop)
    rows = stream(text).count_rows() - 2
    folder = tmp_path / "deep" / "cache"
    states = hidden_states.HiddenStates(folder, model(), stream(text))
    with pytest.raises(Stopped):
        states.open(hidden_states.PartialState(), print)
    said = capsys.readouterr().out
    assert f"hidden states after layer 1 in {folder}: {rows} rows x 16 tokens x 32 x 4 bytes = " in said
    assert re.search(rf" = {rows * BYTES:,} bytes; 0 rows are there, [\d,]+ bytes are free\n", said)


def test_another_training_finds_them_there(text, filled, cache, tmp_path, capsys):
    """Of another block, at another rate, in another order, with checkpointing and nothing held out."""
    few = {"learning_rate": 1e-3, "seed": 1}
    other, alone = model(trm_hidden_size=24), model(trm_hidden_size=24)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    calls = Calls(other)
    run(other, stream(text, seed=1, held_out=0), tmp_path / "a", cache, **few)
    before, after = rows_of(filled.cache), rows_of(cache)
    assert f"; {len(before)} rows are there" in capsys.readouterr().out
    assert 1 <= calls.number - CHECKS <= 2, "for the two rows that were held out"
    assert len(after) == len(before) + 2
    assert after.items() >= before.items()
    run(alone, stream(text, seed=1, held_out=0), tmp_path / "b", **few)
    assert_equal(other, alone)


@pytest.mark.parametrize("stopped", [5, 13])
def test_a_resumed_training_goes_on_with_them(stopped, text, plain, tmp_path):
    """Stopped in the first pass, without a checkpoint, and in the second."""
    with pytest.raises(Stopped):
        run(model(), text, tmp_path / "a", tmp_path / "cache", on_step=stop_after(stopped))
    resumed = model()
    calls = Calls(resumed)
    run(resumed, text, tmp_path / "a", tmp_path / "cache", resume=True)
    assert_equal(resumed, plain.model)
    assert lines_of(tmp_path / "a") == lines_of(plain.folder)
    steps_of_pass = -(-(stream(text).count_rows() - 2) // BATCH)
    assert calls.number == CHECKS + max(0, steps_of_pass - stopped)


def test_a_training_may_begin_with_a_cache_and_go_on_without(text, plain, cache, tmp_path):
    with pytest.raises(Stopped):
        run(model(), text, tmp_path / "a", cache, on_step=stop_after(13))
    resumed = model()
    run(resumed, text, tmp_path / "a", resume=True)
    assert_equal(resumed, plain.model)


def test_a_data_set_of_items(tmp_path):
    straight, hybrid = model(), model()
    run(straight, Counting(15), tmp_path / "a", steps=12)
    calls = Calls(hybrid)
    run(hybrid, Counting(15), tmp_path / "b", tmp_path / "cache", steps=12)
    assert calls.number == 2 + 5
    assert_equal(hybrid, straight)
    assert len(rows_of(tmp_path / "cache")) == 15


def test_what_is_kept_has_hidden_states_too(text, tmp_path):
    hybrids = [model(), model()]
    for hybrid, name, cache in zip(hybrids, "ab", (None, tmp_path / "cache"), strict=True):
        settings = settings_for(tmp_path / name, steps=24, keep_ratio=1 / 3, cache_hidden_states=cache)
        train(hybrid, stream(text), settings, keep=stream(text, held_out=0, separate=False))
    assert_equal(*hybrids)
    rows = stream(text).count_rows()
    assert len(rows_of(tmp_path / "cache")) == rows - 2
    assert len(rows_of(tmp_path / "cache" / "keep")) == rows


# Rows of several lengths


class OfManyLengths(Counting):
    """Items of 5 to 12 tokens, the last three of which count."""

    def __getitem__(self, index):
        item = {name: t[: 12 - index % 8] for name, t in super().__getitem__(index).items()}
        item["labels"] = torch.cat([torch.full_like(item["labels"][:-3], -100), item["labels"][-3:]])
        return item


def labelled(folder):
    """A file of rows with labels: prompts and completions, no two lengths alike."""
    rows = [
        {"prompt": f"{TEXTS[0][:n]} and", "completion": " " + "one two"[: 1 + n % 7]} for n in range(1, 9)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("points", [[1], [1, 2], [2]])
@pytest.mark.parametrize("of_stream", [False, True])
def test_rows_with_labels(of_stream, points, tmp_path):
    """Also where the only point is after the last layer. A row's values in a batch depend on what pads it, in
    the last bits: losses are the same to 1e-6."""
    losses, calls = [{}, {}], None
    for losses_of, cache in zip(losses, (None, tmp_path / "cache"), strict=True):
        hybrid = model(without_dropout(tiny_base()), 0.0, injection_layers=points)
        data = stream(labelled(tmp_path), length=40, held_out=0) if of_stream else OfManyLengths(8)
        calls = Calls(hybrid)
        run(hybrid, data, tmp_path / str(cache is None), cache, on_step=losses_of.__setitem__)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # opening takes two, and 8 rows in batches of 3 are three batches; 18 steps are seven passes
    assert calls.number == 2 + 3
    lengths = {len(load_file(path)["hidden_states"]) for path in (tmp_path / "cache").glob("row-*")}
    assert len(lengths) == 8, "what pads a row is not kept"


def test_the_disk_they_take_is_that_of_their_own_lengths(tmp_path, capsys):
    run(model(), OfManyLengths(8), tmp_path / "run", tmp_path / "cache", steps=1)
    tokens = sum(range(5, 13))
    assert f"8 rows x about {round(tokens / 8)} tokens x 32 x 4 bytes" in capsys.readouterr().out
    run(model(), OfManyLengths(8), tmp_path / "again", tmp_path / "cache", steps=1)
    assert f"8 rows x about {round(tokens / 8)} tokens x 32 x 4 bytes" in capsys.readouterr().out


def test_a_row_is_read_again_whatever_pads_it(tmp_path):
    """Filled one row at a time, where nothing is padded; then three at a time."""
    run(model(), OfManyLengths(8), tmp_path / "one", tmp_path / "cache", steps=8, batch_size=1)
    hybrid = model()
    calls = Calls(hybrid)
    run(hybrid, OfManyLengths(8), tmp_path / "three", tmp_path / "cache", steps=8)
    assert calls.number == 2


# In another precision


def test_kept_in_bfloat16(text, plain, tmp_path):
    """Half the bytes; the first pass sees what the others see, and another precision is refused."""
    settings = {"cache_dtype": "bfloat16"}
    losses = {}
    run(model(), text, tmp_path / "a", tmp_path / "cache", on_step=losses.__setitem__, **settings)
    kept = [load_file(path)["hidden_states"] for path in (tmp_path / "cache").glob("row-*")]
    assert {h.dtype for h in kept} == {torch.bfloat16}
    assert losses != plain.losses
    assert losses == pytest.approx(plain.losses, rel=2e-2)  # bfloat16 keeps 8 bits

    again = {}
    run(model(), text, tmp_path / "b", tmp_path / "cache", on_step=again.__setitem__, **settings)
    assert again == losses
    with pytest.raises(ValueError, match="kept as was bfloat16, is none"):
        run(model(), text, tmp_path / "c", tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_dtype": "bfloat16"}, "cache_dtype expected cache_hidden_states, got 'bfloat16' alone"),
        ({"cache_hidden_states": "c", "cache_dtype": "int8"}, "None, float32, bfloat16, got 'int8'"),
    ],
)
def test_settings_of_the_precision(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        settings_for(tmp_path, **changes)


# Files that are damaged, or not there any more


def test_a_damaged_row_is_computed_again(text, plain, filled, cache, tmp_path):
    names = sorted(rows_of(cache))
    whole = {name: (cache / name).read_bytes() for name in names}

    def flipped(content, at):
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    inputs = whole[names[3]].index(b'"inputs"') + 12
    contents = [b"", whole[names[1]][:-1], flipped(whole[names[2]], -5), flipped(whole[names[3]], inputs)]
    contents += [whole[names[0]], b"\xff" * 500]  # of another row; no safetensors
    for name, content in zip(names, contents, strict=False):
        (cache / name).write_bytes(content)
    (cache / names[6]).unlink()
    again = model()
    with pytest.warns(UserWarning, match="its hidden states are computed again") as warned:
        run(again, text, tmp_path / "a", cache)
    told = [str(w.message).partition(" is damaged")[0] for w in warned if "damaged" in str(w.message)]
    assert sorted(told) == [str(cache / name) for name in names[:6]]
    assert_equal(again, plain.model)
    assert rows_of(cache) == rows_of(filled.cache)


def test_a_row_cut_short_in_writing_is_not_there(text, plain, tmp_path, monkeypatch):
    replace, rows = os.replace, []

    def dies(source, target):
        if "row-" in target.name:
            rows.append(target)
        if len(rows) == 8:
            raise Stopped
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("hybrid.saving.files.os.replace", dies)
        run(model(), text, tmp_path / "a", tmp_path / "cache")
    assert len(rows_of(tmp_path / "cache")) == 7, "all but the one that was being written"
    resumed = model()
    run(resumed, text, tmp_path / "a", tmp_path / "cache", resume=True)
    assert_equal(resumed, plain.model)


# Of something else


def other_weights(base):
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.add_(1e-3)
    return base


def other_config(base):
    base.config.rms_norm_eps = 1e-3
    return base


def other_tokenizer():
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["and"])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lambda: model(other_weights(tiny_base())), stream, r"base, .* base.weights was \w+, is"),
        (lambda: model(other_config(tiny_base())), stream, r"base, .* base.config was \w+, is"),
        (lambda: model(tiny_base().double()), stream, r"base, .* base.[\w ]+ was"),
        (lambda: model(injection_layers=[2], dropout_above=0.0), stream, r"layer, .*: layer was 1, is 2\."),
        (model, lambda text: stream(text, 12), r"data, .*: data.tokens was 16, is 12\."),
        (model, lambda text: stream(text, separate=False), r"data, .* data.separate was True, is False"),
        (
            model,
            lambda text: stream(text, tokenizer=other_tokenizer()),
            r"data, .* data.tokenizer was \w+, is",
        ),
        (model, lambda text: Counting(20), r"data, .* data.field was text, is none"),
    ],
)
def test_hidden_states_of_something_else_are_refused(make, data, message, text, filled, tmp_path):
    before = rows_of(filled.cache)
    with pytest.raises(ValueError, match=rf"expected in \S+cache those of this {message}") as refusal:
        run(make(), data(text), tmp_path, filled.cache)
    assert str(refusal.value).endswith("Name another folder, or delete this one.")
    assert rows_of(filled.cache) == before


def test_a_text_that_changed_is_refused(tmp_path, monkeypatch):
    """Also where what is compared of a large one is the same, as soon as a row of it is asked for."""
    text = write_text(tmp_path)
    content = text.read_text()
    run(model(), text, tmp_path / "a", tmp_path / "cache", steps=2, save_every=None)
    with monkeypatch.context() as patch:
        before = contents.of_files([text])
        text.write_text(content.replace("and so", "or not"))
        patch.setattr("hybrid.data.sources.of_files", lambda paths: before)
        with pytest.raises(ValueError, match=r"those of this data, got .* the tokens of row \d+ differ"):
            run(model(), text, tmp_path / "b", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"of this data, .* data.sources.1.sha256 was \w+, is \w+\."):
        run(model(), text, tmp_path / "c", tmp_path / "cache")
    text.write_text(content + '{"text": "and one more"}\n')
    with pytest.raises(ValueError, match=r"of this data, .* data.sources.1.bytes was \d+, is \d+\."):
        run(model(), text, tmp_path / "d", tmp_path / "cache")


def test_a_folder_without_a_whole_key_is_refused(text, cache, tmp_path):
    (cache / "key.json").write_text('{"base"')
    with pytest.raises(ValueError, match=r"expected a whole \S+key.json, got a damaged one"):
        run(model(), text, tmp_path / "a", cache)
    (cache / "key.json").unlink()
    with pytest.raises(ValueError, match=r"expected key.json in \S+, got rows without it"):
        run(model(), text, tmp_path / "b", cache)


# What cannot be cached


def test_what_does_not_fit_is_not_begun(text, filled, tmp_path, monkeypatch):
    needed = (stream(text).count_rows() - 2) * (BYTES + 8192)
    usage = shutil.disk_usage(tmp_path)

    def opened(folder, free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        states = hidden_states.HiddenStates(folder, model(), stream(text))
        states.open(hidden_states.PartialState(), print)

    with pytest.raises(ValueError, match=rf"expected {needed:,} free bytes on the disk of \S+, got"):
        opened(tmp_path / "cache", needed - 1)
    assert not (tmp_path / "cache").exists()
    opened(tmp_path / "cache", needed)
    opened(filled.cache, 0)  # all of it is there


def in_phase_2():
    hybrid = model()
    enter(hybrid, 2)
    return hybrid


def with_checkpoints_that_differentiate():
    hybrid = model()
    hybrid.gradient_checkpointing_enable({"use_reentrant": True})
    return hybrid


def with_a_way_around():
    """A base whose last layer takes something from the first that is not the hidden state."""
    hybrid = model()
    first, last = hybrid.llm_model.model.layers
    kept = []
    first.self_attn.register_forward_hook(lambda _, args, output: kept.append(output[0]))
    last.mlp.register_forward_hook(lambda _, args, output: output + (kept.pop() if kept else 0))
    return hybrid


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (in_phase_2, r"of which nothing learns \(phase 1\), got 21 tensors that do, the first is llm_model"),
        (lambda: model(injection_layers=[0, 2]), "first injection point of at least 1, got 0"),
        (
            lambda: model(tiny_base(dropout=1e-6), 0.0),
            "no dropout up to layer 1, got a LlamaForCausalLM that draws",
        ),
        (with_checkpoints_that_differentiate, "gradient checkpointing with use_reentrant=False, got True"),
        (with_a_way_around, "layers after 1 that take nothing but the hidden state from those before"),
        (tiny_base, "expected a HybridModel, got LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_cached(make, message, text, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(make(), text, tmp_path / "a", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_length_curriculum_is_refused(text, tmp_path):
    changes = {"length_curriculum": LengthCurriculum(4, 16, 5)}
    with pytest.raises(ValueError, match="expected cache_hidden_states or a length_curriculum, got both"):
        run(model(), text, tmp_path / "run", tmp_path / "cache", **changes)


# The command


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def command(base, text, output, *more):
    words = ["train", "--base", base, "--data", text, "--output", output, "--steps", 25, "--batch-size", 4]
    words += ["--sequence-length", 16, "--learning-rate", 1e-2, "--log-every", 1, *options(FIELDS), *more]
    return [str(word) for word in words]


def test_the_command(base, text, tmp_path, capsys):
    cache = ["--cache-hidden-states", tmp_path / "cache"]
    assert main(command(base, text, tmp_path / "a")) == 0
    assert main(command(base, text, tmp_path / "b", *cache, "--data-workers", 1)) == 0
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    assert re.search(
        r"^hidden states after layer 1 in \S+: \d+ rows x 16 tokens", capsys.readouterr().out, re.M
    )
    message = refused(capsys, *command(base, text, tmp_path / "c", *cache, "--phase", 2))
    assert "expected phase 1 with --cache-hidden-states, got 2" in message
    message = refused(capsys, *command(base, text, tmp_path / "d", *cache, "--injection-layers", 2))
    assert "those of this layer" in message


def train_on_two(text, folder):
    for shard in (False, True):
        losses, calls = [[], []], []
        for number, cache in enumerate((None, folder / f"cache-{shard}")):
            hybrid = model()
            calls.append(Calls(hybrid))
            run(
                hybrid,
                text,
                folder / f"{shard}-{number}",
                cache,
                batch_size=2,
                shard=shard,
                save_every=None,
                steps=14,
                on_step=lambda _, loss, of=losses[number]: of.append(loss),
            )
        if losses[0]:  # the main process
            fewer = calls[0].number - calls[1].number
            print(json.dumps([shard, len(losses[0]), losses[0] == losses[1], fewer]), flush=True)


def test_two_processes(text, tmp_path):
    """Each with a copy of the model, then each with a part of it (FSDP2), over two passes."""
    ended = ranks.run(lambda: train_on_two(text, tmp_path))
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = stream(text).count_rows() - 2
    fewer = 14 - -(-rows // 4) - 2  # than without a cache, of which opening takes two
    said = [line for line in ended.stdout.splitlines() if line.startswith("[")]
    assert [json.loads(line) for line in said] == [[False, 14, True, fewer], [True, 14, True, fewer]]
    for shard in (False, True):
        assert len(rows_of(tmp_path / f"cache-{shard}")) == rows
