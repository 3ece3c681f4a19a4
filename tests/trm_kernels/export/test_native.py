"""The library for C: without a GPU it starts what the plans say; with one it computes what Python does."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny import tiny_hybrid
from trm_kernels.export.compile import SHARED_LIMIT
from trm_kernels.export.launch_plan import (
    DTYPES,
    Address,
    CopyStep,
    Term,
    compiled,
    decode_keys,
    plan,
    row_limits,
    sizes_of,
)
from trm_kernels.export.native import main, read_variants, source_of_arch, weights_of
from trm_kernels.export.warmup import module_of
from trm_kernels.runtime.backend import backend, interpreting

ROOT = Path(__file__).parents[3]
GPU = f"sm{''.join(map(str, torch.cuda.get_device_capability()))}" if torch.cuda.is_available() else "none"
ARCH = GPU if GPU in SHARED_LIMIT else "sm90"
TINY = """
[tiny]
hidden_size = 64
num_heads = 4
num_key_value_heads = 2
num_layers = 1
intermediate_size = 144
num_recursion_steps = 2

[open_half]
hidden_size = 64
num_heads = 4
intermediate_size = 128
num_recursion_steps = 1
num_cycles = 2
causal = false
dtype = "float16"
"""

if interpreting():
    pytest.skip("the interpreter does not compile", allow_module_level=True)


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "variants.toml"
    path.write_text(TINY)
    return path


def cmake(*arguments, expected=0):
    found = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{Path('/usr/bin')}") or shutil.which(
        "cmake"
    )
    if not found or not shutil.which("cc"):
        pytest.skip("building needs CMake and a C compiler")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == expected, text
    return text


@pytest.fixture(scope="module")
def built(declared):
    """The folder of a library for one GPU."""
    folder = declared.parent / "build"
    chosen = f"-DTRM_ARCHS={ARCH[2:]}", f"-DTRM_VARIANTS={declared}"
    cmake("-B", folder, "-S", ROOT, f"-DPython3_EXECUTABLE={sys.executable}", *chosen)
    cmake("--build", folder)
    return folder


class Error(ctypes.Structure):
    _fields_ = [("status", ctypes.c_int), ("message", ctypes.c_char * 256)]


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens")),
        *((name, ctypes.c_void_p) for name in ("x", "y", "z", "y_out", "z_out", "cache")),
        *((name, ctypes.c_int64) for name in ("past", "capacity")),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def library(built):
    return ctypes.CDLL(str(built / "libtrm_kernels.so"))


def test_ctest_passes(built):
    assert "100% tests passed" in cmake("-E", "chdir", built, "ctest", "--output-on-failure")


WRITE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)


def listed(library, variant, call):
    """The lines of trm_list_launches."""
    lines, error = [], Error()
    write = WRITE(lambda _, line: lines.append(line.decode()))
    given = variant.name.encode(), int(ARCH[2:]), ctypes.byref(call), write, None, ctypes.byref(error)
    assert library.trm_list_launches(*given) == 0, error.message
    return lines


def float32(value):
    return ctypes.c_float(value).value


def line_of(step, sizes):
    """What the library should print of a step."""

    def text(kind, value):
        if isinstance(value, Address):
            return f"{value.buffer.role}{value.buffer.index}+{value.offset.at(sizes)}"
        return f"{kind}:{value.at(sizes)}" if isinstance(value, Term) else f"f32:{float32(value):.9g}"

    if isinstance(step, CopyStep):
        values = vars(step).values()
        return " ".join(["copy", *(text("i64", value) for value in values)])
    kernel, arguments = compiled(step, ARCH)
    grid = (str(axis.at(sizes)) for axis in step.grid)
    return " ".join([kernel.name, *grid, *(text(a.kind, a.value) for a in arguments)])


@pytest.mark.parametrize("name", ["tiny", "open_half"])
def test_the_library_starts_what_the_plans_say(library, declared, name):
    (variant,) = (v for v in read_variants(declared) if v.name == name)
    for call, numbers in {
        "forward": [(1, 7), (2, 128), (1, 257), (8, 256), (3, 683), (129, 256)],  # around 256 and 2048 rows
        "resume": [(3, 40)],
        "extend": [(2, 33, 5, 100)],
        "decode": [(2, 1, 255, 700), (300, 1, 0, 1)],
        "decode-long": [(2, 1, 256, 700), (300, 1, 1023, 1024)],
    }.items():
        if call not in variant.calls:
            continue
        for sizes in (sizes_of(*each) for each in numbers):
            asked = Call(batch=sizes.B, tokens=sizes.T, past=sizes.P, capacity=sizes.C)
            if call == "resume":
                asked.y = asked.z = 16
            elif call != "forward":
                asked.cache = 16
            limit = next(n for n in row_limits(variant, ARCH) if n >= sizes.B * sizes.T)
            wanted = [line_of(step, sizes) for step in plan(variant, call, ARCH, limit).steps]
            assert listed(library, variant, asked) == wanted


def test_numbers_after_the_point_are_passed_as_float32(declared):
    """Triton's own launchers for C declare them double, and half of each would reach the kernel."""
    variants = read_variants(declared)
    seen = set()
    for step in plan(variants[0], "decode-long", ARCH).steps:
        if not isinstance(step, CopyStep):
            kernel, arguments = compiled(step, ARCH)
            assert not {"f64", "b64"} & set(kernel.parameters)
            assert kernel.parameters.count("f32") == sum(a.kind == "f32" for a in arguments)
            seen |= {a.value for a in arguments if a.kind == "f32"}
    assert variants[0].eps in seen
    source = source_of_arch(variants[:1], ARCH)
    assert f"{{TRM_F32, 0, 0, 0, {float32(1e-5).hex()}f}}" in source
    assert "double" not in source
    assert "float number;" in (ROOT / "native/src/plan.h").read_text()


def test_a_file_of_other_weights_is_refused(library, declared, tmp_path):
    variant = read_variants(declared)[0]
    weights = {f"trm.{name}": torch.zeros(shape) for name, shape in weights_of(variant)}
    model, error = ctypes.c_void_p(), Error()

    def create(tensors, prefix=b"trm."):
        save_file(tensors, tmp_path / "model.safetensors")
        given = str(tmp_path / "model.safetensors").encode(), prefix, b"tiny", 0, ctypes.c_int64(64)
        status = library.trm_create(*given, ctypes.byref(model), ctypes.byref(error))
        return status, error.message.decode()

    first = "trm.layers.0.self_attn.qkv_proj.weight"
    assert create({k: t for k, t in weights.items() if k != first}) == (
        3,
        f"trm_create: no tensor {first} in the file",
    )
    assert create(weights | {first: torch.zeros(64, 128)})[0] == 3
    assert "expected trm.y_init in F32" in create(weights | {"trm.y_init": torch.zeros(64).long()})[1]
    assert create(weights, b"x" * 600)[0] == 1
    if not torch.cuda.is_available():
        assert create(weights)[0] in (6, 7)  # sound, and nothing to run it on
        assert not model.value


def test_the_trm_of_a_saved_hybrid_is_found(library, tmp_path):
    sizes = {"trm_hidden_size": 64, "trm_num_heads": 4, "trm_num_key_value_heads": 2, "trm_num_layers": 1}
    hybrid = tiny_hybrid(injection_layers=[2], trm_intermediate_size=144, **sizes)
    hybrid.save_pretrained(tmp_path)
    model, error, path = ctypes.c_void_p(), Error(), str(tmp_path / "model.safetensors").encode()

    def create(prefix):
        given = path, prefix, b"tiny", 0, ctypes.c_int64(64), ctypes.byref(model), ctypes.byref(error)
        return library.trm_create(*given)

    assert create(b"llm_model.model.layers.1.trm.recursion.") in (0, 6, 7), (
        error.message
    )  # found, whether or not it runs
    library.trm_destroy(model)
    assert create(b"llm_model.model.layers.2.trm.recursion.") == 3


def test_weights_are_named_and_ordered_as_the_module_has_them(declared):
    names = [name for name, _ in weights_of(read_variants(declared)[1])]
    assert names[:4] == [
        f"layers.0.{name}.weight"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    assert names[4].startswith("layers.1.") and names[8:] == ["y_init", "z_init"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one variant"),
        ("hidden_size = 3", "tables named"),
        ("[a-b]\nhidden_size = 64\nnum_heads = 4", "letters, digits"),
        ("[a]\nhidden_size = 64\nnum_heads = 4\nheads = 4", "heads"),
        ("[a]\nhidden_size = 72\nnum_heads = 4", "multiples of 16"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "variants.toml").write_text(text)
    with pytest.raises(SystemExit):
        main(["--variants", str(tmp_path / "variants.toml"), "--index", "90", "--out", str(tmp_path / "v.c")])
    assert message in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path):
    text = cmake("-B", tmp_path, "-S", ROOT, "-DPython3_EXECUTABLE=/nowhere/python", expected=1)
    assert "Python 3.11 or later is needed" in text
    alone = tmp_path / "alone"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", alone], check=True)
    text = cmake("-B", tmp_path / "b", "-S", ROOT, f"-DPython3_EXECUTABLE={alone / 'bin/python'}", expected=1)
    assert "cannot import PyTorch and Triton" in " ".join(text.split())


needs_gpu = pytest.mark.skipif(GPU != ARCH, reason="needs a CUDA device that the library can be built for")


class Native:
    """A module's twin in the library."""

    def __init__(self, library, variant, module, folder):
        self.library, self.variant, self.error = library, variant, Error()
        save_file({k: t.cpu() for k, t in module.state_dict().items()}, folder / "model.safetensors")
        self.model = ctypes.c_void_p()
        path = str(folder / "model.safetensors").encode()
        given = path, b"", variant.name.encode(), 0, ctypes.c_int64(1000)
        self.check(library.trm_create(*given, ctypes.byref(self.model), ctypes.byref(self.error)))

    def check(self, status):
        assert status == 0, self.error.message

    def make_cache(self, B, C):
        v = self.variant
        shape = 2, v.evaluations, B, C, v.num_key_value_heads, v.head_width
        return torch.full(shape, torch.nan, dtype=DTYPES[v.dtype], device="cuda")

    def __call__(self, x, y=None, z=None, cache=None, past=0):
        outs = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        call = Call(x.shape[0], x.shape[1], x.data_ptr(), y_out=outs[0].data_ptr(), z_out=outs[1].data_ptr())
        call.stream = torch.cuda.current_stream().cuda_stream
        if y is not None:
            call.y, call.z = y.data_ptr(), z.data_ptr()
        if cache is not None:
            call.cache, call.past, call.capacity = cache.data_ptr(), past, cache.shape[3]
        needed, error = ctypes.c_size_t(), ctypes.byref(self.error)
        asked = self.model, ctypes.byref(call), ctypes.byref(needed), error
        self.check(self.library.trm_workspace_bytes(*asked))
        workspace = torch.full((needed.value,), 255, dtype=torch.uint8, device="cuda")  # NaN
        call.workspace, call.workspace_bytes = workspace.data_ptr(), needed.value
        self.check(self.library.trm_forward(self.model, ctypes.byref(call), error))
        torch.cuda.synchronize()
        return outs


@pytest.fixture
def twins(library, declared, tmp_path, request):
    """(the library's model, the Python module, the module in float64)"""
    (variant,) = (v for v in read_variants(declared) if v.name == request.param)
    module, exact = (
        module_of(variant, "cuda", dtype).requires_grad_(False) for dtype in (None, torch.float64)
    )
    exact.load_state_dict(module.state_dict())
    native = Native(library, variant, module, tmp_path)
    yield native, module, exact
    library.trm_destroy(native.model)


def expect_as_right(got, reference, exact):
    """The ratio rule of ops/test_ops.py: against float64, at most 1.1 times the reference's error."""
    for ours, theirs, right in zip(got, reference, exact, strict=True):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (ours, theirs))
        assert error <= 1.1 * allowed + 1e-3


@needs_gpu
@pytest.mark.parametrize("twins", ["tiny", "open_half"], indirect=True)
def test_a_forward_is_as_right_as_the_reference(twins):
    native, module, exact = twins
    for B, T in ((1, 1), (2, 37), (3, 300)):
        x, y, z = torch.randn(3, B, T, 64, device="cuda", dtype=module.y_init.dtype)
        with backend("reference"):
            references = module(x), module(x, y, z)
            rights = exact(x.double()), exact(x.double(), y.double(), z.double())
        expect_as_right(native(x), references[0], rights[0])
        expect_as_right(native(x, y, z), references[1], rights[1])


@needs_gpu
@pytest.mark.parametrize("twins", ["tiny"], indirect=True)
def test_decoding_is_as_right_as_the_reference(twins):
    native, module, exact = twins
    x = torch.randn(2, 300, 64, device="cuda", dtype=module.y_init.dtype)
    with backend("reference"):
        reference, right = module(x), exact(x.double())
    cache, past, parts = native.make_cache(2, 310), 0, []
    for tokens in (200, 54, 1, 1, 1, 1, 42):
        parts.append(native(x[:, past : past + tokens].contiguous(), cache=cache, past=past))
        past += tokens
    got = [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
    expect_as_right(got, reference, right)
    assert decode_keys(native.variant, ARCH) == 256  # both ways to decode were taken
