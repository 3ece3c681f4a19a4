"""What lets a saved hybrid be loaded where nobody has imported `hybrid`: by trust_remote_code=True.

config.json names the classes (auto_map) in a file beside it, which imports them from the installed package.
"""

from pathlib import Path

_MODULE = "modeling_trm_hybrid"
AUTO_MAP = {"AutoConfig": f"{_MODULE}.HybridConfig", "AutoModelForCausalLM": f"{_MODULE}.HybridModel"}
_CONTENT = """\
try:
    from hybrid import HybridConfig, HybridModel  # noqa: F401
except ImportError as error:
    raise ImportError("This model needs the package trm-hybrid: pip install trm-hybrid") from error
"""


def write_modeling_file(folder: Path) -> None:
    """The file that AUTO_MAP names."""
    (folder / f"{_MODULE}.py").write_text(_CONTENT, encoding="utf-8")
