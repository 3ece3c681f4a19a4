"""RecursionCurriculum: which depth in which step, and that a TRM called at a depth is a TRM of that depth."""

import pytest
import torch

from trm_kernels import TRM, Depth, RecursionCurriculum


def test_the_depth_rises_evenly_and_stays():
    curriculum = RecursionCurriculum(Depth(1, 1), Depth(6, 3), 10)
    depths = [tuple(curriculum.at(step)) for step in range(12)]
    n = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    cycles = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert depths == list(zip(n, cycles, strict=True))
    only_n = RecursionCurriculum(Depth(2, 3), Depth(4, 3), 4)
    assert [tuple(only_n.at(step)) for step in (0, 1, 2, 3, 4, 10**9)] == [
        (2, 3),
        (2, 3),
        (3, 3),
        (3, 3),
        (4, 3),
        (4, 3),
    ]


@pytest.mark.parametrize(
    ("first", "last", "steps", "message"),
    [
        ((0, 1), (6, 3), 5, "counts of at least 1, got first 0x1, last 6x3, 5 steps"),
        ((1, 1), (6, 3), 0, "counts of at least 1, got first 1x1, last 6x3, 0 steps"),
        ((1.5, 1), (6, 3), 5, "counts of at least 1, got first 1.5x1"),
        ((1, True), (6, 3), 5, "counts of at least 1, got first 1xTrue"),
        ((7, 1), (6, 3), 5, "a first n and T of at most 6x3, got 7x1"),
        ((1, 4), (6, 3), 5, "a first n and T of at most 6x3, got 1x4"),
        ((6, 3), (6, 3), 5, "below 6x3, got the same: it would have no effect"),
    ],
)
def test_numbers_that_make_no_curriculum_are_an_error(first, last, steps, message):
    with pytest.raises(ValueError, match=message):
        RecursionCurriculum(Depth(*first), Depth(*last), steps)


def test_plain_pairs_are_depths_and_other_lengths_and_negative_steps_are_errors():
    curriculum = RecursionCurriculum((1, 2), (6, 3), 5)
    assert (curriculum.first.num_cycles, curriculum.last) == (2, Depth(6, 3))
    with pytest.raises(ValueError, match="got first 1, last 6"):
        RecursionCurriculum((1,), (6,), 5)
    with pytest.raises(ValueError, match="a step of at least 0, got -1"):
        curriculum.at(-1)


def test_a_curriculum_is_typed_as_first_and_steps():
    last = Depth(6, 3)
    assert RecursionCurriculum.from_text("2x1:500", last) == RecursionCurriculum(Depth(2, 1), last, 500)
    assert RecursionCurriculum.from_text("2:500", last) == RecursionCurriculum(Depth(2, 3), last, 500)
    for text in ("", "2", "2x1", "2x:5", ":5", "2x1:", "-2:5", "2:5.0", "2 :5", "²:5", "1:" + "9" * 5000):
        with pytest.raises(ValueError, match="expected FIRST:STEPS"):
            RecursionCurriculum.from_text(text, last)
    with pytest.raises(ValueError, match="got the same"):
        RecursionCurriculum.from_text("6:5", last)


def small(n, cycles, grad_cycles):
    torch.manual_seed(0)
    return TRM(16, 2, num_recursion_steps=n, num_cycles=cycles, grad_cycles=grad_cycles)


def outputs_and_gradients(trm, x, **depth):
    y, z = trm(x, **depth)
    (y.square().sum() + z.sum()).backward()
    return [y, z, *(p.grad for p in trm.parameters() if p.grad is not None)]


@pytest.mark.parametrize("grad_cycles", [1, 2, None])
@pytest.mark.parametrize("depth", [Depth(1, 1), Depth(2, 2), Depth(4, 3)])
def test_a_call_at_a_depth_is_a_trm_of_that_depth(depth, grad_cycles):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    fewer = None if grad_cycles is None else min(grad_cycles, depth.num_cycles)
    expected = outputs_and_gradients(small(*depth, fewer), x)
    deep = small(4, 3, grad_cycles)
    got = outputs_and_gradients(deep, x, **depth._asdict())
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))
    assert (deep.num_recursion_steps, deep.num_cycles, deep.grad_cycles) == (4, 3, grad_cycles)
    steps = [y for y, _ in small(4, 3, grad_cycles).supervision_steps(x, 2, **depth._asdict())]
    assert torch.equal(steps[0], expected[0])
    *_, (last, _) = small(4, 3, grad_cycles).each_cycle(x, **depth._asdict())
    torch.testing.assert_close(last, expected[0])


def test_no_cycles_are_an_error():
    with pytest.raises(ValueError, match="num_cycles of at least 1, got 4 and 0"):
        small(4, 3, 1)(torch.zeros(1, 2, 16), num_cycles=0)
