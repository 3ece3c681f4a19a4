"""The benchmark itself: floors by hand, wrong answers, resuming, the dry run of the GPU script, reports."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import gpu
from bench.__main__ import main
from bench.measure import roofline, timing
from bench.measure import run as measuring
from bench.measure.counting import Counting
from bench.measure.roofline import Kernel, Reached, floors, kernels_of, layer_forward
from bench.measure.run import Budget, Judge, measure
from bench.measure.store import TRIES, Store, read
from bench.measure.timing import ratios, spread
from bench.peers import solvers as peers
from bench.peers.eager import PAPER, Recursion, recursion
from bench.peers.workloads import CARDS, WORKLOADS, card_of
from bench.report import figures as report
from trm_kernels.ops.attention.rope import Angles
from trm_kernels.runtime.backend import interpreting

pytestmark = pytest.mark.skipif(interpreting(), reason="no kernel runs here, which needs no interpreter")

W = {workload.name: workload for workload in WORKLOADS}
BRIEF = Budget(seconds=0.01, limit=60.0, rounds=5)


# Floors


def test_floors_of_two_kernels_by_hand():
    """10 operations and 4 bytes, then 2 and 8, at 1 a second each: 10 + 8, and max(12, 12)."""
    card = Reached(1.0, 1.0)
    assert floors([Kernel("a", 10, 4), Kernel("b", 2, 8)], card) == (12.0, 18.0)
    assert floors([Kernel("a", 10, 4, "attention")], replace(card, attention=0.5))[1] == 20.0


def test_operations_of_w1_by_hand():
    """A token and evaluation: 2 (4 d^2 + 3 d F), and 4 S d of attention; backward twice, and 2.5 times."""
    d, F, S, M = 512, 1536, 97, 768 * 97
    products, attention = 2 * (4 * d * d + 3 * d * F), 4 * S * d
    evaluations, with_gradient = 3 * 7 * 2, 7 * 2
    want = M * (evaluations * (products + attention) + with_gradient * (2 * products + 2.5 * attention))
    for way in roofline.WAYS:
        assert sum(k.flops for k in kernels_of(W["W1"], 768, way)) == pytest.approx(want)


def test_bytes_of_an_evaluation_by_hand():
    """With M = S = 1, X = 2 d, J = 2 F: what each of our six kernels reads and writes."""
    n = Recursion(D=8, H=1, F=12, num_layers=1, num_recursion_steps=1)
    X, J = 16, 24
    moved = [k.bytes for k in layer_forward(n, 1, 1, "ours", is_kept=True)]
    weights = [0, 2 * 24 * 8, 0, 2 * 64, 2 * 24 * 8, 2 * 12 * 8]
    tensors = [3 * X, 4 * X, 4 * X, 3 * X, X + 3 * J, J + 2 * X]
    assert moved == [a + b for a, b in zip(tensors, weights, strict=True)]


def test_decoding_reads_every_weight_at_every_evaluation():
    """206 MB of matrices for 10 evaluations and the keys and values of 2048 tokens, at two points."""
    inner = [k for k in kernels_of(W["W4-1"], 1, "ours") if k.name in ("products", "attention")]
    d, F = 2048, 5632
    assert sum(k.bytes for k in inner) == 2 * 10 * (2 * (4 * d * d + 3 * d * F) + 4 * d * 2048)


def test_eagers_passes_are_counted_right():
    """The list of eager's kernels against what PyTorch really reads and writes in an evaluation."""

    class Moved(Counting):
        def __init__(self):
            super().__init__()
            self.moved = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            before = self.computing().total()
            out = super().__torch_dispatch__(op, types, args, kwargs)
            if self.computing().total() > before:
                tensors = *args, *(args[0] if isinstance(args[0], list) else ()), out
                self.moved += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            return out

    def moved(n):
        numbers = Recursion(64, 4, 192, 2, n)
        problem_tokens = 256
        x = torch.zeros(1, problem_tokens, 64, dtype=torch.bfloat16)
        angles = Angles(*(torch.zeros(1, problem_tokens, 8) for _ in range(2)))
        weights = W["W1"].make_tiny(1, "cpu").blocks[0].weights
        shapes = [(192, 64), (64, 64), (384, 64), (64, 192)]
        weights = [
            type(w)(
                *(
                    type(part)(*(torch.zeros(s, dtype=torch.bfloat16) for s in of))
                    for part, of in zip(w, (shapes[:2], shapes[2:]), strict=True)
                )
            )
            for w in weights
        ]
        with Moved() as counted, torch.no_grad():
            recursion(x, x, x, weights, angles, numbers, parts=PAPER)
        return counted.moved

    listed = 2 * sum(k.bytes for k in layer_forward(Recursion(64, 4, 192, 2, 1), 256, 256, "eager", False))
    assert moved(2) - moved(1) == pytest.approx(listed, rel=0.15)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_a_floor_is_lower_the_more_is_fused(workload):
    for name, card in roofline.CARDS.items():
        found = [roofline.floor_ms(workload, workload.batch[name], way, card) for way in roofline.WAYS]
        assert all(0 < ideal <= 1.0001 * serial for ideal, serial in found)
        assert found[0][1] >= found[1][1] >= found[2][1]


def test_cards_are_known_by_their_names():
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce RTX 4090": "rtx4090"}
    assert {name: card_of(name) for name in names} == names
    assert card_of("NVIDIA T4") == "rtx4090", "an unknown one gets the smallest batches"
    assert all(set(workload.batch) == set(CARDS) == set(roofline.CARDS) for workload in WORKLOADS)


# Timing


def test_spread_and_ratios():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"ms": 3.0, "p20": 2.0, "p80": 5.0, "runs": 5}
    assert ratios([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])["ratio"] == 2.0


def test_runs_take_turns():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = timing.Timer("cpu").interleaved(runs, seconds=0.0)
    assert [len(times) for times in found.values()] == [5, 5]
    assert order[4:] == list("abbaabbaab")


# Right or wrong, and on disk


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.name)
def test_eager_is_right_at_every_workload(workload):
    problem = workload.make_tiny(2, "cpu")
    answer = problem.step(peers.eager())()
    assert len(answer) == (1 if problem.dout is None else 2 + sum(len(b.tensors()) for b in problem.blocks))
    assert Judge(problem).complaints(answer)[1] == []


def slips(step):
    """Answers that are wrong in one tensor each."""
    for i in range(len(step())):
        answer = step()
        answer[i] = answer[i].detach() * 1.2
        yield answer
    answer = step()
    answer[0] = torch.full_like(answer[0], float("nan"))
    yield answer


@pytest.mark.parametrize("name", ["W1", "W4-1", "W5"])
def test_every_wrong_tensor_is_seen(name):
    problem = W[name].make_tiny(2, "cpu")
    judge = Judge(problem)
    for answer in slips(problem.step(peers.eager())):
        assert judge.complaints(answer)[1]


def tiny(store, *names):
    measure(W["W6-1"], store, "cpu", 1, names, BRIEF, is_tiny=True)


def test_a_wrong_peer_is_not_timed_and_says_so(tmp_path, monkeypatch):
    def wrong():
        right = peers.eager()
        return replace(right, recursion=lambda *args: tuple(1.1 * t for t in right.recursion(*args)))

    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    store = Store(tmp_path / "results.json", "W6-1")
    tiny(store, "wrong", "eager", "Liger-Kernel", "eager, CUDA graph")
    records = Store(store.path, "W6-1").records
    assert records["wrong"]["state"] == "wrong" and "warm" not in records["wrong"]
    assert "error of the result" in records["wrong"]["why"]
    assert records["eager"]["state"] == "ok" and records["eager"]["warm"]["runs"] == 5
    assert records["eager, CUDA graph"]["why"].startswith("RuntimeError: a CUDA graph needs a CUDA device")
    assert records["Liger-Kernel"] == {"state": "absent", "why": "liger_kernel is not installed"}
    text = report.short_table(store.path)
    assert "W6-1 wrong: wrong: error of the result" in text and "W6-1 warm, ms" in text


def test_a_peer_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    def slow():
        while True:
            pass

    monkeypatch.setitem(peers.PEERS, "slow", slow)
    store = Store(tmp_path / "results.json", "W6-1")
    measure(W["W6-1"], store, "cpu", 1, ("slow", "eager"), Budget(0.01, 0.5, 5), is_tiny=True)
    assert store.records["slow"]["why"] == "TimeoutError: took more than 0 s"
    assert store.records["eager"]["state"] == "ok"


def test_a_broken_device_ends_the_process_but_keeps_the_record(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(peers.PEERS, "broken", broken)
    store = Store(tmp_path / "results.json", "W6-1")
    with pytest.raises(SystemExit) as stop:
        tiny(store, "broken", "eager")
    assert stop.value.code == measuring.BROKEN_DEVICE
    tiny(again := Store(store.path, "W6-1"), "broken", "eager")
    assert [record["state"] for record in again.records.values()] == ["failed", "ok"]


def test_a_run_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    store = Store(tmp_path / "results.json", "W6-1")
    tiny(store, "eager")
    store.start("TRM paper's eager")  # and then the time limit came
    before = Store(store.path, "W6-1").records["eager"]
    tiny(again := Store(store.path, "W6-1"), "eager", "TRM paper's eager")
    assert again.records["eager"] == before
    assert again.records["TRM paper's eager"]["state"] == "ok"
    for _ in range(TRIES):
        again.start("one that never ends")
    assert again.is_done("one that never ends")
    monkeypatch.setattr(measuring, "_measure_one", None)  # nothing is left to measure
    tiny(again, "eager", "TRM paper's eager", "one that never ends")


@pytest.mark.slow  # a minute: every workload is called once
def test_the_script_of_a_gpu_run_runs_dry(tmp_path, capsys):
    """All but the device: one stage as a process with its limit, others as such a process runs them."""
    dry = ["--dry-run", "--out", str(tmp_path)]
    for stage in ("environment", "sanitizer", "first calls", "micro"):
        assert gpu.main([*dry, "--stage", stage]) == 0
    assert gpu.main([*dry, "--only", "W6-1"]) == 0, (tmp_path / "log.txt").read_text()
    printed = capsys.readouterr().out.rstrip()
    assert "--- W6-1: finished, " in printed
    assert "compute-sanitizer is not on the PATH" in printed or "memcheck: ok" in printed
    assert printed.splitlines()[-1].startswith("W6-1 ours: failed: RuntimeError: backend: 'triton'")
    stages = read(tmp_path / gpu.RESULTS)
    ceilings = stages["environment"]["records"]["ceilings"]
    assert ceilings["bytes_per_s"] > 0 and ceilings["flops_per_s"] > 0
    assert len(stages["first calls"]["records"]) == len(WORKLOADS)
    assert {record["state"] for record in stages["first calls"]["records"].values()} == {"ok"}
    rows = stages["micro"]["records"]["accumulate"]["rows"]
    assert {row["way"] for row in rows} >= {"bfloat16, addmm", "float32, mm and add"}
    text = report.write([tmp_path], tmp_path / "report")
    assert "## W6-1, CPU, dry run" in text and "Floor" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [gpu.LOG, "report", gpu.RESULTS], (
        "two files to fetch"
    )


def test_a_second_call_goes_on_from_a_copy_of_the_first(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    dry = ["--dry-run", "--stage", "W6-1", "--out"]
    assert gpu.main([*dry, str(first)]) == 0
    before = read(first / gpu.RESULTS)
    before["W6-1"]["records"].pop("eager")  # and then the time limit came
    second.mkdir()
    (second / gpu.RESULTS).write_text(json.dumps({"stages": before}))
    assert gpu.main([*dry, str(second)]) == 0
    after = read(second / gpu.RESULTS)["W6-1"]["records"]
    assert after.pop("eager")["state"] == "ok"
    assert after == before["W6-1"]["records"], "what was known was measured again"


@pytest.mark.parametrize("kind", ["W3", "W4-1"])
def test_the_whole_model_runs_dry(kind, tmp_path):
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--stage", f"{kind}, whole model"]) == 0
    records = Store(tmp_path / gpu.RESULTS, f"{kind}, whole model").records
    assert records["base alone"]["state"] == records["eager"]["state"] == "ok"
    assert records["ours"]["why"].startswith("RuntimeError: backend: 'triton' cannot run here")
    found = report.read([tmp_path])
    assert {m.workload for m in found} == {f"{kind[:2]}, whole model, batch 2"}


def test_a_stage_ends_with_its_time(tmp_path):
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu._run(sleeps, 0.5, tmp_path / "log.txt") is None
    assert gpu._run([sys.executable, "-c", "raise SystemExit(7)"], 30.0, tmp_path / "log.txt") == 7


def test_correctness_runs_the_tests(tmp_path):
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--stage", "correctness"]) == 0
    (record,) = Store(tmp_path / gpu.RESULTS, "correctness").records.values()
    assert record["state"] == "ok" and "passed" in record["summary"]


def test_the_script_says_that_it_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", "nowhere"]) == 2
    assert "expected a CUDA device" in capsys.readouterr().out


def test_the_stages_fit_the_budget():
    """The first pass over all workloads; what comes later takes what is left, or another call."""
    later = (", the rest", ", whole model")
    first = sum(stage.minutes for stage in gpu.STAGES if not stage.name.endswith(later))
    assert first <= gpu.MINUTES + 1
    assert sum(stage.quick_minutes for stage in gpu.STAGES) <= gpu.QUICK_MINUTES + 0.1


# Reports


def made_up(device="NVIDIA H200", scale=1.0):
    def times(ms):
        pair = {"ratio": ms / 60, "p20": ms / 61, "p80": ms / 59, "runs": 50}
        return {"ms": ms * scale, "p20": ms * scale * 0.99, "p80": ms * scale * 1.01, "ours_faster": pair}

    ok = {"state": "ok", "peak_bytes": 2_000_000_000, "first_call_s": 12.5}
    w1 = {
        "facts": {"workload": "W1", "batch": 768, "device": device},
        "records": {
            "ours": {**ok, "warm": times(60.0)},
            "eager": {**ok, "warm": times(180.0)},
            "torch.compile": {**ok, "warm": times(90.0)},
            "Liger-Kernel": {"state": "absent", "why": "liger_kernel is not installed"},
        },
    }
    return {"stages": {"W1": w1}}


def test_report_of_made_up_results(tmp_path, capsys):
    ceilings = {"state": "ok", "bytes_per_s": 4.3e12, "flops_per_s": 8e14, "flops_by_shape": {}}
    environment = {"facts": {"device": "NVIDIA H200"}, "records": {"ceilings": ceilings}}
    run = made_up()
    (tmp_path / "W1.json").write_text(json.dumps(run))
    run["stages"]["environment"] = environment
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "results.json").write_text(json.dumps(run))
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "whole"), "--out", str(out / "folder")]) == 0
    assert "Floor, of the ceilings measured in the same run" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "W1.json"), "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "## W1, NVIDIA H200" in text and "predicted for h200" in text
    assert "| eager | warm | 180 | 178-182 | 3.00 (2.95-3.05) | 32% | 2.00 | 12.5 |" in text
    assert "| Liger-Kernel | absent: liger_kernel is not installed |" in text
    for image in ("memory-by-policy.png", "throughput-nvidia-h200-W1.png"):
        assert (out / image).read_bytes()[:4] == b"\x89PNG"
        assert f"({image})" in text


def test_report_of_pytests_file(tmp_path):
    benchmark = {
        "name": "bench_op[a]",
        "group": "add_rms_norm (4, 8) forward",
        "params": {"peer": "eager"},
        "stats": {"median": 0.002, "q1": 0.001, "q3": 0.003},
        "extra_info": {"device": "CPU"},
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"benchmarks": [benchmark]}))
    (found,) = report.read([path])
    assert (found.device, found.workload, found.peer) == ("CPU", "add_rms_norm (4, 8) forward", "eager")
    assert (found.ms, found.p20, found.p80) == (2.0, 1.0, 3.0)


def test_what_holds_no_results_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="expected results of bench.gpu or of pytest bench, got .*a.json"):
        report.read([tmp_path / "a.json"])


def test_compare_marks_noise(tmp_path, capsys):
    for name, scale in (("a", 1.0), ("same", 1.01), ("slower", 1.5)):
        (tmp_path / f"{name}.json").write_text(json.dumps(made_up(scale=scale)))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "same.json")]) == 0
    assert capsys.readouterr().out.count("within noise") == 3
    main(["compare", str(tmp_path / "a.json"), str(tmp_path / "slower.json")])
    assert "| W1, ours, warm | 60.0 | 90.0 | 0.67 (0.65-0.68) | SLOWER |" in capsys.readouterr().out
    assert report.compare([], []) == "The two have nothing in common."


def test_only_measured_cards_have_columns(tmp_path, monkeypatch):
    from bench.report import tables

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.measured() == "No card has been measured yet."
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "W1.json").write_text(json.dumps(made_up()))
    header, _, w1, w2, *_ = tables.measured().splitlines()
    assert header.count("NVIDIA H200") == 3 and "4090" not in header
    assert w1 == "| W1 | 60.0 | 3.00 | 1.50 |"
    assert w2 == "| W2 |  |  |  |"
