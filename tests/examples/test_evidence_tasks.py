"""The other tasks of the evidence: answers are right, held out is held out, every arm runs."""

from collections import Counter, deque
from dataclasses import replace

import pytest
import torch
from evidence import reachability, shell_game, sudoku6
from sudoku import is_held_out

from hybrid.training.evaluate import IGNORED
from trm_kernels import TRM

COUNT = 400


def edges_to(target, source, edges):
    """The fewest edges from source to target, or None: breadth first."""
    far, waiting = {source: 0}, deque([source])
    while waiting:
        node = waiting.popleft()
        for start, end in edges:
            if start == node and end not in far:
                far[end] = far[node] + 1
                waiting.append(end)
    return far.get(target)


@pytest.fixture(scope="module")
def graphs():
    return reachability.graphs(COUNT, seed=0, held_out=False)


def test_an_answer_says_whether_there_is_a_path_in_the_text(graphs):
    texts = reachability.Texts.of(graphs)
    assert texts.input_ids.shape == texts.labels.shape == (COUNT, 20)
    for ids, labels, depths in zip(*(t.tolist() for t in (*texts, graphs.depth)), strict=True):
        text = "".join(map(chr, ids))
        source, *pairs = text[:-1].split(",")
        assert len(pairs) == reachability.EDGES and len(set("".join(pairs))) == reachability.NODES
        # what is asked for after token t stands beside token t + 1, and a pair ends 3 tokens after the last
        answers = labels[4::3]
        assert all(labels[i] == IGNORED for i in range(len(labels)) if i % 3 != 1 or i < 4)
        assert text[-1] == chr(answers[-1])
        for seen, (pair, answer, depth) in enumerate(zip(pairs, answers, depths, strict=True), start=1):
            far = edges_to(pair[1], source, pairs[:seen])
            assert chr(answer) == ("n" if far is None else "y")
            if far is not None:
                assert depth == far
            else:  # as far from the other root, which no edge leads to
                (root,) = {start for start, _ in pairs} - {end for _, end in pairs} - {source}
                assert depth == edges_to(pair[1], root, pairs[:seen])


def test_a_guess_is_right_half_of_the_time_at_every_difficulty():
    some = reachability.graphs(4 * COUNT, seed=1, held_out=False)
    assert (some.reached.sum(1) == reachability.EDGES // 2).all()
    for depth in (1, 2, 3):
        answers = some.reached[some.depth == depth].float()
        assert len(answers) > COUNT and float(answers.mean()) == pytest.approx(0.5, abs=0.06)
    assert int(some.depth.max()) == 3
    # nor does a letter or the place in the text say more
    for place in range(reachability.EDGES):
        assert float(some.reached[:, place].float().mean()) == pytest.approx(0.5, abs=0.06)
    letters = Counter(some.edges[..., 1][some.reached].tolist())
    assert max(letters.values()) < 1.25 * min(letters.values())


def test_no_graph_is_in_both_parts_whatever_the_order_of_its_edges(graphs):
    held_out = reachability.graphs(COUNT, seed=0, held_out=True)
    seen = [
        {
            (source, frozenset(map(tuple, edges)))
            for source, edges in zip(some.source.tolist(), some.edges.tolist(), strict=True)
        }
        for some in (graphs, held_out)
    ]
    assert not seen[0] & seen[1] and min(map(len, seen)) > COUNT // 2
    assert reachability.is_held_out(held_out).all() and not reachability.is_held_out(graphs).any()
    turned = graphs._replace(edges=graphs.edges.flip(1))
    assert not reachability.is_held_out(turned).any()
    drawn = reachability._grown(4000, torch.Generator().manual_seed(2))
    assert float(reachability.is_held_out(drawn).float().mean()) == pytest.approx(1 / 8, abs=0.03)


def test_an_answer_is_scored_where_it_is_asked_for(graphs):
    texts = reachability.Texts.of(graphs)

    class Oracle:
        """Says y wherever the label beside the next token says so, but for the third answer: always y."""

        def eval(self):
            return self

        def __call__(self, input_ids, use_cache):
            said = torch.where(texts.labels[:, 1:] == IGNORED, 0, texts.labels[:, 1:])
            said[:, 9] = ord("y")
            self.logits = torch.nn.functional.one_hot(torch.nn.functional.pad(said, (0, 1)), 128).float()
            return self

    right, depth = reachability._answers(Oracle(), graphs)
    assert torch.equal(depth, graphs.depth)
    assert torch.equal(right[:, 2], graphs.reached[:, 2]) and right[:, [0, 1, 3, 4, 5]].all()


def test_puzzles_of_6x6_are_kept_apart_and_sorted_by_givens():
    parts = [sudoku6._puzzles(300, sudoku6.Settings().givens, seed=3, held_out=h) for h in (False, True)]
    assert is_held_out(parts[1][1]).all() and not is_held_out(parts[0][1]).any()
    bins = sudoku6.by_givens(*parts[1])
    assert sum(len(puzzles) for puzzles, _ in bins.values()) == 300
    for name, (puzzles, solutions) in bins.items():
        low, high = (int(word) for word in name.split() if word.isdigit())
        given = (puzzles > 0).sum(-1)
        assert len(puzzles) and low <= given.min() and given.max() <= high
        assert torch.equal(puzzles[puzzles > 0], solutions[puzzles > 0])


def test_untied_layers_with_equal_weights_are_a_recursion_of_one_step():
    torch.manual_seed(0)
    untied = sudoku6.UntiedLayers(16, seq_len=5)
    tied = TRM(16, 1, 1, num_recursion_steps=1, mlp_t=True, seq_len=5)
    for layer in untied.layers:
        layer.load_state_dict(tied.layers[0].state_dict())
    x, y, z = torch.randn(3, 2, 5, 16)
    for got, expected in zip(untied(x, y, z), tied(x, y, z), strict=True):
        torch.testing.assert_close(got, expected)


TINY = {
    reachability: {"steps": 20, "batch_size": 2, "base_steps": 1, "graphs": 32},
    sudoku6: {"steps": 20, "batch_size": 2, "puzzles": 50, "held_out": 30, "width": 16},
}


@pytest.mark.parametrize("task", TINY, ids=lambda task: task.__name__)
def test_every_arm_runs_and_repeats(task, monkeypatch):
    tiny = {name: replace(arm, **TINY[task]) for name, arm in task._ARMS.items()}
    monkeypatch.setattr(task, "_ARMS", tiny)
    shell_game.pretrained_base.cache_clear()
    results = {}
    for arm in task.ARMS:
        assert task.settings(arm, quick=True)["steps"] == 2 and task.settings(arm, quick=False)["steps"] == 20
        results[arm] = task.run(0, arm, quick=True)
        assert len(results[arm]["by_difficulty"]) == 3 and 0 <= results[arm]["accuracy"] <= 1
    parameters = {result["trained_parameters"] for result in results.values()}
    assert max(parameters) < 1.05 * min(parameters)
    again = task.run(0, task.ARMS[0], quick=True)
    first = results[task.ARMS[0]]
    assert all(again[name] == first[name] for name in ("accuracy", "by_difficulty"))
    shell_game.pretrained_base.cache_clear()
