"""A hybrid whose recursion begins shallow: in the loop, under transformers' Trainer, and what cannot be."""

import json

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hybrid import record_steps
from hybrid.training.depth import check_curriculum
from hybrid.training.loop import train
from hybrid.training.phases import enter
from hybrid.training.trainer_callback import DeepenRecursion
from tests.hybrid.training.test_train import Stopped, assert_equal, lines_of, settings_for, stop_after
from tests.support.tiny_text import Counting, tiny_base, tiny_hybrid
from trm_kernels import Depth, RecursionCurriculum

LAST = Depth(3, 2)
CURRICULUM = RecursionCurriculum(Depth(1, 1), LAST, 16)
# n and T of twenty steps
N = [1] * 8 + [2] * 8 + [3] * 4
CYCLES = [1] * 16 + [2] * 4


def hybrid(dropout=0.2, **changes):
    fields = {"recursion_sampling": "fixed", "num_cycles": 2} | changes
    model = tiny_hybrid(tiny_base(dropout=dropout), **fields)
    enter(model, 1)
    return model


def depths(record):
    """(n, T) of each forward that was recorded."""
    numbers = [(int(one.steps[0, 0]), int(one.evaluations[0, 0])) for one in record.forwards]
    return [(n, evaluations // (n + 1)) for n, evaluations in numbers]


def test_the_loop_goes_through_the_depths_and_measures_at_the_last(tmp_path):
    model = hybrid()
    settings = settings_for(tmp_path, recursion_curriculum=CURRICULUM)
    with record_steps() as record:
        train(model, Counting(), settings, {"new": Counting(3)})
    before, *steps, after = depths(record)
    assert steps == list(zip(N, CYCLES, strict=True)) and before == after == LAST
    ids = {name: t[None] for name, t in Counting()[0].items()}
    with record_steps() as record:
        model.train()(**ids)
    assert depths(record) == [LAST]


def test_a_step_at_a_depth_is_that_of_a_hybrid_with_this_config():
    batch = {name: t[None] for name, t in Counting()[0].items()}
    shallow = hybrid(dropout=0.0, num_recursion_steps=2, num_cycles=1, grad_cycles=1).train()
    deep = hybrid(dropout=0.0, num_recursion_steps=3, num_cycles=2, grad_cycles=2).train()
    deep.training_depth = Depth(2, 1)
    for model in (shallow, deep):
        model(**batch).loss.backward()
    ours, others = (dict(model.named_parameters()) for model in (deep, shallow))
    grads = {name for name, p in others.items() if p.grad is not None}
    assert grads and all(torch.equal(ours[name].grad, others[name].grad) for name in grads)
    # a call that says n is not asked about the curriculum; nor is one with a cache, or in eval mode
    full = hybrid(dropout=0.0, num_recursion_steps=3, num_cycles=2, grad_cycles=2).train()
    for mode, given in ((True, {"num_recursion_steps": 2}), (True, {"use_cache": True}), (False, {})):
        got, want = (model.train(mode)(**batch, **given).logits for model in (deep, full))
        assert torch.equal(got, want)


def test_a_run_resumes_exactly_and_without_a_curriculum_is_as_before(tmp_path):
    settings = {"recursion_curriculum": CURRICULUM}
    straight, resumed, plain, at_once = hybrid(), hybrid(), hybrid(), hybrid()
    train(straight, Counting(), settings_for(tmp_path / "a", **settings))
    with pytest.raises(Stopped):
        train(hybrid(), Counting(), settings_for(tmp_path / "b", **settings), on_step=stop_after(13))
    train(resumed, Counting(), settings_for(tmp_path / "b", **settings), resume=True)
    assert_equal(resumed, straight)
    assert lines_of(tmp_path / "b") == lines_of(tmp_path / "a")
    with pytest.raises(ValueError, match="expected recursion_curriculum.first .* as it began, got none"):
        train(hybrid(), Counting(), settings_for(tmp_path / "b"), resume=True)
    train(plain, Counting(), settings_for(tmp_path / "c"))
    # no step of this run is shallow but the first
    first = RecursionCurriculum(Depth(2, 2), LAST, 1)
    train(at_once, Counting(), settings_for(tmp_path / "d", recursion_curriculum=first))
    assert lines_of(tmp_path / "c") != lines_of(tmp_path / "a")
    assert lines_of(tmp_path / "c") != lines_of(tmp_path / "d")


def test_a_run_that_began_before_there_were_these_settings_goes_on(tmp_path):
    straight, resumed = hybrid(), hybrid()
    train(straight, Counting(), settings_for(tmp_path / "a"))
    with pytest.raises(Stopped):
        train(hybrid(), Counting(), settings_for(tmp_path / "b"), on_step=stop_after(13))
    path = tmp_path / "b" / "run.json"
    run = json.loads(path.read_text())
    del run["config"]["trm_cache"], run["recursion_curriculum"]
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="expected config.trm_cache all as it began, got last"):
        train(hybrid(trm_cache="last"), Counting(), settings_for(tmp_path / "b"), resume=True)
    train(resumed, Counting(), settings_for(tmp_path / "b"), resume=True)
    assert_equal(resumed, straight)


def trained(folder, resume=None, callbacks=None, steps=6):
    """(model, depths of its forwards) of a training by transformers' Trainer, with a checkpoint at step 3."""
    model = hybrid()
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=Counting(), callbacks=callbacks)
    with record_steps() as record:
        trainer.train(resume_from_checkpoint=resume)
    assert model.training_depth is None
    return model, depths(record)


def test_transformers_trainer_goes_through_the_depths_and_resumes(tmp_path):
    curriculum = RecursionCurriculum(Depth(1, 1), LAST, 4)
    model, seen = trained(tmp_path / "a", callbacks=[DeepenRecursion(curriculum)])
    assert seen == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 2), (3, 2)]
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    resumed, seen = trained(tmp_path / "b", checkpoint, [DeepenRecursion(curriculum)])
    assert seen == [(2, 1), (3, 2), (3, 2)]
    assert_equal(resumed, model)


def test_a_training_that_an_error_ended_leaves_no_depth_to_the_next(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise Stopped

    model = hybrid()
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    stopped = Trainer(
        model, arguments, train_dataset=Counting(), callbacks=[DeepenRecursion(CURRICULUM), Stops]
    )
    with pytest.raises(Stopped):
        stopped.train()
    with record_steps() as record:
        Trainer(model, arguments, train_dataset=Counting()).train()
    assert depths(record) == [LAST]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_recursion_steps": 4}, "ends at the config's .* 4 and 2, got 3 and 2"),
        (
            {"recursion_sampling": "uniform"},
            "a recursion_curriculum or recursion_sampling='uniform', got both",
        ),
        ({"deep_supervision": True, "grad_cycles": 2}, "a first T of at least 2, .* got 1"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(hybrid(**changes), Counting(), settings_for(tmp_path, recursion_curriculum=CURRICULUM))
    with pytest.raises(ValueError, match=message):
        check_curriculum(CURRICULUM, hybrid(**changes).config)


def test_a_curriculum_wants_a_hybrid_and_fits_into_the_steps(tmp_path):
    base = tiny_base()
    with pytest.raises(ValueError, match="a recursion_curriculum expected a HybridModel, got Llama"):
        train(base, Counting(), settings_for(tmp_path, recursion_curriculum=CURRICULUM))
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(base, arguments, train_dataset=Counting(), callbacks=[DeepenRecursion(CURRICULUM)])
    with pytest.raises(ValueError, match="DeepenRecursion: expected a HybridModel inside, got Llama"):
        trainer.train()
    with pytest.raises(ValueError, match="a recursion_curriculum within 15 steps .* got 16"):
        settings_for(tmp_path, steps=15, recursion_curriculum=CURRICULUM)
