"""Every kernel compiles for every GPU and keeps within its limits; every op starts the kernels it should."""

import importlib.util
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static import changes
from trm_kernels.export import check
from trm_kernels.export.check import calls_of, jobs, launches_of
from trm_kernels.export.compile import SHARED_LIMIT, Compiled, MainLoop, compile_for, judges, source_of
from trm_kernels.ops.add_rms_norm import _add_rms_norm_fwd_kernel
from trm_kernels.recursion.one_launch.grid_barrier import grid_barrier
from trm_kernels.recursion.recursion import trm_recursion
from trm_kernels.runtime import tuning
from trm_kernels.runtime.backend import interpreting
from trm_kernels.runtime.launch import Launch, record
from trm_kernels.testing.cases import CASES, layer_of

if interpreting():
    pytest.skip("the interpreter does not compile", allow_module_level=True)

RESOURCES = Path(__file__).parents[3] / "bench" / "results" / "static" / "resources.json"
ARCHS = ("sm80", "sm89", "sm90")
# compiled by day; where nothing is cached all dtypes for all GPUs take minutes
BY_DAY = {"sm80": (torch.bfloat16,), "sm89": (torch.bfloat16,), "sm90": (torch.bfloat16, torch.float32)}
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# every width and dtype with everything on, a minute an arch; those of three widths are compiled below as well
COMPILES_LONG = ("rope_attention-padded",)
# a product, and attention; the other kernels in TF32 are compiled by night
BY_DAY_IN_TF32 = ("linear_residual", "rope_attention_causal")


def each_on(*archs, by_night=(), by_day=None):
    """The cases on each of `archs`. Slow: on those `by_night`, all but `by_day` or those that take long."""

    def is_long(case):
        return case.name in COMPILES_LONG if by_day is None else case.name not in by_day

    return pytest.mark.parametrize(
        ("arch", "case"),
        [
            pytest.param(
                arch,
                case,
                marks=pytest.mark.slow if is_long(case) or arch in by_night else (),
                id=f"{arch}-{case.name}",
            )
            for arch in archs
            for case in CASES
        ],
    )


@cache
def resources():
    """As `make resources` wrote them down."""
    return json.loads(RESOURCES.read_text())


def on_record(arch, case):
    """[registers, stack, shared, fingerprint] of its kernels by label."""
    return resources()["kernels"][arch].get(case.name, {})


def same_as_on_record(job):
    """Whether the same Triton made what is on record of the same text, and the same code let it pass."""
    known, row = resources(), on_record(job.source.arch, job.case).get(job.label)
    made_by = (known["triton"], known["judges"])
    return (
        made_by == (triton.__version__, judges())
        and row is not None
        and row[0] <= job.case.max_registers
        and row[3] == job.source.fingerprint
    )


def within_limits(arch, case, found):
    """What `make resources` would write down; skips if another Triton made what is on record."""
    for job in found:
        assert not job.complaints, f"{job.label} on {arch} {' and '.join(job.complaints)}"
        assert job.kernel.registers > 0
        assert job.kernel.shared <= SHARED_LIMIT[arch]
    if (known := resources()["triton"]) != triton.__version__:
        pytest.skip(f"on record are the kernels of Triton {known}, this is {triton.__version__}")
    return check.resources(found)["kernels"].get(arch, {}).get(case.name, {})


@each_on(*ARCHS, by_night=ARCHS)
def test_kernels_keep_within_their_limits_and_to_what_is_on_record(arch, case):
    """A change of registers or shared memory shows in review: `make resources` writes the file anew."""
    used = within_limits(arch, case, list(jobs(arch, [case])))
    known = {label: row for label, row in on_record(arch, case).items() if "-tf32" not in label}
    found = changes(known, used, f"{case.name} on {arch}")
    # of each kernel registers [0], stack [1], shared memory [2], fingerprint [3]
    assert not found, "\n".join(found)


@each_on(*ARCHS, by_night=("sm80", "sm89"), by_day=BY_DAY_IN_TF32)
def test_kernels_in_tf32_keep_within_their_limits_and_to_what_is_on_record(arch, case):
    """What float32 takes where PyTorch may multiply in TF32."""
    used = within_limits(arch, case, list(jobs(arch, [case], tf32=True)))
    known = {label: row for label, row in on_record(arch, case).items() if "-tf32" in label}
    found = changes(known, used, f"{case.name} on {arch}")
    assert not found, "\n".join(found)


@each_on(*ARCHS)
def test_kernels_of_the_common_dtypes_keep_to_what_is_on_record(arch, case):
    """Those are compiled that changed: of one text Triton makes one kernel. By night all are compiled."""
    by_day = tuple(dtype for dtype in case.dtypes if dtype in BY_DAY[arch])
    found, known = list(jobs(arch, [replace(case, dtypes=by_day)])), on_record(arch, case)
    # a kernel that serves other dtypes too goes by the name of the first
    assert known.keys() & {job.label for job in found}
    used = within_limits(arch, case, [job for job in found if not same_as_on_record(job)])
    both = used.keys() & known.keys()
    changed = changes(
        {name: known[name][:3] for name in both}, {name: used[name][:3] for name in both}, case.name
    )
    assert not changed, "\n".join(changed)


def test_what_is_on_record_is_recognized():
    """Else all would be compiled by day, and a change would be compared with nothing."""
    case = next(case for case in CASES if case.name == "add_rms_norm")
    job, other = list(jobs("sm80", [replace(case, dtypes=(torch.bfloat16,))]))[:2]
    assert job.source.fingerprint != other.source.fingerprint
    assert same_as_on_record(job), "make resources"
    options = dict(job.source.options)
    more_warps = replace(job.source, options=tuple((options | {"num_warps": 8}).items()))
    assert not same_as_on_record(replace(job, source=more_warps))
    assert not same_as_on_record(replace(job, source=replace(job.source, arch="sm89")))
    assert not same_as_on_record(replace(job, case=replace(job.case, max_registers=8)))


def test_a_fingerprint_is_of_what_the_environment_says_too(monkeypatch):
    source = source_of(forward_launch(64), "sm90")
    want = source.fingerprint
    assert replace(source).fingerprint == want
    with monkeypatch.context() as other:
        other.setattr(triton.knobs.language, "default_fp_fusion", False)
        assert replace(source).fingerprint != want
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    assert replace(source).fingerprint != want


def test_a_fingerprint_is_of_the_names_by_which_strides_are_known(tmp_path):
    """They are no part of the text, and decide whether wide copies are wanted."""

    def planted(stride, comment):
        file = tmp_path / stride / "planted.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(PLANTED.format(stride=stride, comment=comment))
        spec = importlib.util.spec_from_file_location("planted", file)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        x = torch.empty(64, device="meta")
        return source_of(Launch(module.kernel, (1,), (x, 7), {"num_warps": 4}), "sm90").fingerprint

    assert planted("stride_m", "") == planted("stride_m", "# a line more\n") != planted("row_m", "")


PLANTED = """
import triton, triton.language as tl
{comment}
@triton.jit
def kernel(x_ptr, {stride}):
    tl.store(x_ptr + {stride}, 0.0)
"""


@pytest.mark.parametrize("part", ["check.py", "compile.py", "machine_code.py"])
def test_another_judge_is_known(monkeypatch, part):
    before, read = judges(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == part))
    assert judges() != before


def test_every_row_of_the_settings_table_is_compiled(monkeypatch):
    """By some case, at some shape: a row nobody launches with would be a row nobody checks."""
    looked_up, launched = set(), set()

    def watch(name, *op):
        find = getattr(tuning, name)

        def found(*args):
            looked_up.add(((*op, *args)[0], row := find(*args)))
            return row

        monkeypatch.setattr(tuning, name, found)

    for name in ("lookup", "gemm", "tile", "attention"):
        watch(name)
    watch("lookup_decode", "decode_attention")
    watch("one_launch", "one_launch")
    for case in CASES:
        for settings in (*ARCHS, "any"):
            looked_up.clear()
            for _, _, call in calls_of(case, settings):
                launched |= {
                    (op, settings, row)
                    for op, row in looked_up
                    if call.kernel.fn.__name__.lstrip("_").startswith(op) and takes(call, row)
                }
    others = {"decode_attention": tuning.DECODE, "one_launch": tuning.ONE_LAUNCH}
    for table in (tuning._TABLE, tuning._GEMMS, tuning._TILES, tuning.ATTENTION, others):
        for op, archs in table.items():
            for arch, rows in archs.items():
                takers = (arch,) if arch in ARCHS else ("any",)
                for row in rows if isinstance(rows, tuple) else (rows,):
                    assert any((op, taker, row) in launched for taker in takers), (
                        f"no case launches with {row} of {op} on {arch}"
                    )


def takes(call: Launch, row: object) -> bool:
    """Whether a launch was given the settings of a row."""
    given = {name: value for name, value in vars(row).items() if name in call.meta} if row else {}
    return bool(given) and all(call.meta[name] == value for name, value in given.items())


@EACH
def test_ops_start_the_kernels_they_should(case):
    inputs = [t.detach().to("meta") for t in case.inputs(case.shapes[0], torch.float32, 0)]
    with record("sm90") as launches:
        case.op(*inputs)
    assert len(launches) == case.launches
    assert len(launches_of(case, case.shapes[0], torch.float32, "sm90")) == case.launches_with_gradient


def forward_launch(rows: int, stride: int = 1008, **meta: int) -> Launch:
    x, rstd = torch.empty(rows, stride, device="meta"), torch.empty(rows, device="meta")
    sizes = {"D": 1000, "BLOCK_M": 1, "BLOCK_D": 1024, "num_warps": 4, "num_stages": 1} | meta
    return Launch(
        _add_rms_norm_fwd_kernel, (1,), (x, x, None, x, rstd, rows, stride, stride, 0, stride, 1e-5), sizes
    )


def test_a_spill_is_seen():
    kernel = compile_for(forward_launch(64, BLOCK_M=16, num_warps=1), "sm80")
    assert kernel.stack > 0
    assert any("on the stack" in text for text in kernel.complaints(255))


def test_registers_and_shared_memory_have_limits():
    kernel = compile_for(forward_launch(64), "sm90")
    assert kernel.complaints(255) == []
    assert kernel.complaints(8) == [f"takes {kernel.registers} registers of 8"]
    too_much = Compiled("k", "sm89", 32, 0, 100 * 1024, 4, (), b"")
    assert too_much.complaints(255) == ["takes 102400 bytes of shared memory of 101376"]


def test_a_slow_main_loop_is_seen():
    def complaints(*found):
        return Compiled("k", "sm90", 32, 0, 0, 4, (), b"", MainLoop(*found)).complaints(255)

    assert complaints("mma", 4, 8, True, True, 16) == [
        "multiplies by mma, not wgmma",
        "waits for a tile in its main loop instead of copying it ahead",
        "copies 4 bytes at a time in its main loop, not 16",
        "loads 8 bytes at a time in its main loop, not 16",
    ]
    assert complaints("wgmma", 0, 0, True, True, 16) == [
        "waits for a tile in its main loop instead of copying it ahead"
    ]
    assert complaints("mma", 0, 2, False, False, 0) == complaints("wgmma", 16, 0, True, True, 16) == []


def test_the_main_loop_is_read_from_the_assembler_text():
    """An H100 multiplies by wgmma; rows that are not aligned are not copied asynchronously."""
    (case,) = (case for case in CASES if case.name == "linear_swiglu")
    aligned, odd = (
        compile_for(launches_of(case, shape, torch.bfloat16, "sm90")[0], "sm90").main_loop
        for shape in ((256, 64, 64), (256, 33, 64))
    )
    assert str(aligned) == "wgmma, 16 B copied"
    assert aligned.wants_copies and aligned.wanted_width == 16
    assert str(odd) == "wgmma, 2 B loaded"
    assert not odd.wants_copies and odd.wanted_width == 0


@pytest.mark.parametrize(
    ("name", "K", "arch", "expected"),
    [
        # every product of a tile of 64 rows or more by wgmma; of keys and queries also those that RoPE turns,
        # and of the backward's numbers a row (4 bytes each) nothing is said
        ("rope_attention-padded", 64, "sm90", ["wgmma, 16 B copied"] * 3),
        ("rope_attention-padded", 128, "sm90", ["wgmma, 16 B copied"] * 3),
        ("rope_attention-padded", 128, "sm80", ["mma, 16 B copied"] * 3),
        # one tile has no loop to copy ahead in
        ("rope_attention-tile", 64, "sm90", ["wgmma, 16 B copied", "wgmma, 16 B loaded"]),
        # halves of 12 elements: their rows are not aligned, the angles' are
        (
            "rope_attention-padded",
            24,
            "sm90",
            ["wgmma, 16 B copied, 2 B loaded", "wgmma, 2 B loaded", "wgmma, 16 B copied, 2 B loaded"],
        ),
        # 16 rows, of which one to 16 are queries: mma's smallest tile, and none of wgmma's
        ("decode_attention-padded", 64, "sm90", ["mma, 16 B copied"]),
    ],
)
def test_the_main_loops_of_attention(name, K, arch, expected):
    (case,) = (case for case in CASES if case.name == name)
    shapes = [shape for shape in (*case.bench, *case.edges) if shape[-1] // HEADS.get(name, 1) == K]
    kernels = [compile_for(call, arch) for call in launches_of(case, shapes[0], torch.bfloat16, arch)]
    assert [str(kernel.main_loop) for kernel in kernels if kernel.main_loop] == expected
    assert not any(kernel.complaints(case.max_registers) for kernel in kernels)


HEADS = {"rope_attention-padded": 4 + 2 * 2, "rope_attention-tile": 2 + 2 * 2}


def test_arguments_are_typed_as_triton_types_them():
    """None, the number 1 and `tl.constexpr` are compiled in; a number beyond 2^31 is 64 bits wide."""
    plain = compile_for(forward_launch(64), "sm90").signature
    pointers = ["*fp32", "*fp32", "constexpr", "*fp32", "*fp32"]
    assert plain == (*pointers, *["i32"] * 5, "fp32", *["constexpr"] * 3)
    assert compile_for(forward_launch(1), "sm90").signature[5] == "constexpr"
    assert compile_for(forward_launch(64, stride=2**31), "sm90").signature[6] == "i64"


def test_the_command_prints_a_table_and_writes_the_kernels(monkeypatch, capsys, tmp_path):
    (case, *_) = CASES
    small = type(case)(**{**vars(case), "bench": ((64, 512),), "shapes": (), "dtypes": (torch.bfloat16,)})
    monkeypatch.setattr(check, "CASES", (small,))
    written = tmp_path / "static" / "resources.json"
    assert check.main(["--arch", "80", "90", "--out", str(tmp_path), "--write", str(written)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("_add_rms_norm_bwd_kernel") == 2
    assert "every kernel keeps within its limits" in printed

    label = "add_rms_norm_fwd_kernel-64x512-bfloat16"
    facts = json.loads((tmp_path / "sm90" / f"add_rms_norm.{label}.json").read_text())
    assert facts["name"] == "_add_rms_norm_fwd_kernel"
    assert facts["signature"][0] == "*bf16"
    assert (tmp_path / "sm90" / f"add_rms_norm.{label}.cubin").read_bytes()[:4] == b"\x7fELF"
    used = json.loads(written.read_text())["kernels"]["sm90"]["add_rms_norm"][label]
    fingerprint = source_of(launches_of(small, (64, 512), torch.bfloat16, "sm90")[0], "sm90").fingerprint
    assert used == [facts["registers"], facts["stack"], facts["shared"], fingerprint]

    monkeypatch.setattr(check, "CASES", (type(case)(**{**vars(small), "max_registers": 8}),))
    before = written.read_text()
    assert check.main(["--arch", "80", "--write", str(written)]) == 1
    assert written.read_text() == before, "what did not pass would not be judged again"
    assert "2 kernels outside their limits" in capsys.readouterr().out


def test_an_unknown_gpu_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(["--arch", "42"])
    assert stop.value.code == 2
    assert "invalid choice: 42" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHS)
def test_the_grid_barrier_looks_by_loads_that_acquire(arch):
    """And arrives by an atomic addition that acquires and releases; both for the whole GPU."""
    source = ASTSource(grid_barrier, {"counter_ptr": "*i32"}, {}, {})
    ptx = triton.compile(source, target=GPUTarget("cuda", int(arch[2:]), 32)).asm["ptx"]
    assert len(re.findall(r"\bld\.global\.gpu\.acquire\.", ptx)) == 2, "the first look, and those of the loop"
    assert len(re.findall(r"\batom\.global\.gpu\.acq_rel\.add\.", ptx)) == 1
    assert ptx.count("bar.sync") >= 2


@pytest.mark.parametrize("arch", ("sm89", "sm90"))
def test_one_launch_with_weights_in_fp8(arch):
    """No case of CASES: an A100 has no such type."""

    def recursion(*tensors):
        weights, scales = (layer_of(tensors[i : i + 4]) for i in (1, 5))
        sizes = {"num_heads": 16, "num_recursion_steps": 1, "causal": True}
        x = tensors[0]
        return trm_recursion(x, x, x, [weights], scales=[scales], regime="one_launch", **sizes)

    sizes = (3 * 2048, 2048), (2048, 2048), (2 * 5632, 2048), (2048, 5632)
    weights = [torch.empty(size, dtype=torch.float8_e4m3fn, device="meta") for size in sizes]
    scales = [torch.empty(size[0], device="meta") for size in sizes]
    with record(arch) as launches:
        recursion(torch.empty(1, 1, 2048, dtype=torch.bfloat16, device="meta"), *weights, *scales)
    kernel = compile_for(launches[0], arch)
    assert kernel.stack == 0 and kernel.shared <= SHARED_LIMIT[arch]
