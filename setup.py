"""Packaging of trm-hybrid. The versions it was tested with stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

setup(
    name="trm-hybrid",
    version="0.1.0",
    description="Recursive blocks inside frozen language models, and the Triton kernels that make them fast",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trm_kernels*", "hybrid*", "bench*"]),
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.17,<6",
        "accelerate",
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
            "peft",
            "datasets",
        ],
        "bench": ["pytest", "pytest-benchmark"],
        "data": ["datasets"],
        "flash": ["flash-attn"],
        "eval": ["lm-eval"],
    },
    entry_points={"console_scripts": ["trm-hybrid = hybrid.cli:main"]},
)
