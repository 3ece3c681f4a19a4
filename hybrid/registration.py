"""`import hybrid` makes transformers' Auto classes know a hybrid, without importing transformers itself.

Registering takes the class, which takes transformers and PyTorch: seconds, for `trm-hybrid --help` as well.
So it is done now where transformers is there already; else when transformers, or a module of this package
that needs it, is imported, by whomever.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# modules of this package that need none of it, with what is inside them; of `training` only these
_LIGHT = ("cli", "extras", "lazy", "options", "registration", "training.settings", "__main__")
_FACES = ("training",)  # the package itself, without what is inside


def register_with_transformers() -> None:
    """Import hybrid.model.hybrid_model, which registers, now or as soon as transformers is imported."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    importlib.import_module("hybrid.model.hybrid_model")


class _Watch(importlib.abc.MetaPathFinder):
    """Sees the first import after which it is time: the others find it, and it is loaded as they say."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, inside = name.partition(".")
        is_light = inside in _FACES or any(f"{inside}.".startswith(f"{light}.") for light in _LIGHT)
        if (package != "hybrid" or is_light) and name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Another loader, and after it the registration: before, what it loads would be there in half."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "importlib gives every module one"
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
