"""After a warm-up Triton finds the kernels of a TRM in its cache: a process that runs it compiles nothing."""

import os
import runpy
import subprocess
import sys

import pytest
import torch

from trm_kernels.export.launch_plan import Variant
from trm_kernels.export.warmup import launches_of, main, module_of
from trm_kernels.runtime.backend import interpreting
from trm_kernels.runtime.launch import record

if interpreting():
    pytest.skip("the interpreter does not compile", allow_module_level=True)

DECLARED = """
[tiny]
hidden_size = 32
num_heads = 2
num_layers = 1
intermediate_size = 32
num_recursion_steps = 1
causal = false
"""

# a process that launches, up to where a GPU is needed, and counts what Triton found and what it compiled
RUN = """
import sys
from pathlib import Path
import torch, triton
from trm_kernels.runtime.launch import record
from trm_kernels.export.native import read_variants
from trm_kernels.export.warmup import compile_as_launched, module_of

hits = []
triton.knobs.compilation.listener = lambda cache_hit, **more: hits.append(cache_hit)
(variant,) = read_variants(Path(sys.argv[1]))
for B, T in ((3, 33), (1, 64)):
    with torch.no_grad(), record("sm90") as launches:
        module_of(variant)(torch.empty(B, T, 32, dtype=torch.bfloat16, device="meta"))
    compile_as_launched(launches, "sm90")
print(hits.count(True), hits.count(False))
"""


def found_and_compiled(variants, cache):
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", RUN, str(variants)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, compiled = done.stdout.split()
    return int(found), int(compiled)


@pytest.fixture
def variants(tmp_path):
    path = tmp_path / "variants.toml"
    path.write_text(DECLARED)
    return path


def test_a_later_process_compiles_nothing(variants, tmp_path, capsys, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setattr(sys, "argv", ["warmup", "--variants", str(variants), "--arch", "90"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("trm_kernels.warmup", run_name="__main__")
    assert "tiny: " in capsys.readouterr().out
    found, compiled = found_and_compiled(variants, cache)
    assert found > 5 and compiled == 0


def test_training_is_warmed_up_too():
    variant = Variant("tiny", 32, 2, num_layers=1, intermediate_size=32, num_recursion_steps=1)

    def names(is_training):
        return {call.kernel.fn.__name__ for call in launches_of(variant, "sm90", is_training)}

    assert "_norm_add_bwd_kernel" in names(True) - names(False)
    assert {"_decode_attention_fwd_kernel", "_decode_attention_merge_kernel"} <= names(False)


def test_the_module_of_a_variant_takes_no_memory():
    module = module_of(Variant("level4", 8192, 64, num_recursion_steps=1))
    assert {p.device.type for p in module.parameters()} == {"meta"}
    with torch.no_grad(), record("sm90") as launches:
        module(torch.empty(1, 8, 8192, dtype=torch.bfloat16, device="meta"))
    assert launches


def test_what_cannot_be_warmed_up_is_refused(variants, capsys):
    with pytest.raises(SystemExit):
        main(["--variants", str(variants), "--arch", "90", "--name", "nobody"])
    assert "expected names among ['tiny'], got ['nobody']" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="expected --arch"):
            main(["--variants", str(variants)])
