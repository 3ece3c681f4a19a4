"""A piece of code in a Python that has imported neither hybrid nor transformers, and what it printed.

One such Python, started at the first call, has imported what both need (torch most of all) and forks for each
piece: a start and these imports take longer than most pieces do.
"""

import atexit
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
# torch, and what transformers and peft import where they find it
SHARED = (
    "torch",
    "torch._inductor",
    "torch.distributed.tensor",
    "accelerate",
    "pandas",
    "PIL.Image",
    "datasets",
)
FOUND = ("torchao", "bitsandbytes", "networkx")
OURS = ("transformers", "hybrid", "trm_kernels", "peft")  # not even by way of the shared

_SERVER = f"""
import importlib, importlib.util, json, os, sys, tempfile
for name in {SHARED} + tuple(filter(importlib.util.find_spec, {FOUND})):
    importlib.import_module(name)
from tests.support import forked
assert not any(name.split(".")[0] in {OURS} for name in sys.modules)

def act():
    os.dup2(out.fileno(), 1)
    exec(json.loads(line), {{"__name__": "__main__"}})

for line in sys.stdin:
    with tempfile.TemporaryFile() as out:
        code = forked.run(act)
        out.seek(0)
        print(json.dumps([code, out.read().decode()]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    server = subprocess.Popen([sys.executable, "-c", _SERVER], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server


def python(code: str) -> str:
    """What `code` wrote to stdout; it must not fail."""
    server = _server()
    assert server.stdin and server.stdout
    print(json.dumps(code), file=server.stdin, flush=True)
    ended, out = json.loads(server.stdout.readline())
    assert ended == 0, f"exit code {ended}, stderr above"
    return out
