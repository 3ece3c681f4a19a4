"""`import hybrid` makes transformers' Auto classes know a hybrid, without importing transformers itself.

Registering takes the class, which takes transformers and PyTorch: seconds, for `trm-hybrid --help` as well.
So it is done now where transformers is there already; else when transformers, or a module of this package
that needs it, is imported, by whomever. Trainer, which takes as long again, is told when it is imported.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# modules of this package that need none of it, with what is inside them; of `training` only these
_LIGHT = (
    "cli",
    "error_text",
    "extras",
    "lazy",
    "options",
    "quiet",
    "registration",
    "training.settings",
    "__main__",
)
_FACES = ("training",)  # the package itself, without what is inside
_TRAINER = "transformers.trainer"
_SERVER = "transformers.cli.serving.model_manager"


def register_with_transformers() -> None:
    """Import hybrid.model.hybrid_model, which registers, now or as soon as transformers is imported."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch(_needs_transformers, _register))


def _register() -> None:
    module = importlib.import_module("hybrid.model.hybrid_model")
    _name_in_transformers(module.HybridModel)
    if _TRAINER in sys.modules:
        _tell_trainer()
    else:
        sys.meta_path.insert(0, _Watch(_TRAINER.__eq__, _tell_trainer))


def _name_in_transformers(model_class: type) -> None:
    """`transformers serve` looks for the architecture of a config in transformers itself.

    While it is imported transformers puts a second module object into the place of the first: the server may
    have either.
    """
    now = sys.modules["transformers"]
    server = sys.modules.get(_SERVER)
    for transformers in (now, getattr(server, "transformers", now)):
        setattr(transformers, model_class.__name__, model_class)


def _tell_trainer() -> None:
    importlib.import_module("hybrid.training.trainer_callback").add_to_every_trainer()


def _needs_transformers(name: str) -> bool:
    package, _, inside = name.partition(".")
    is_light = inside in _FACES or any(f"{inside}.".startswith(f"{light}.") for light in _LIGHT)
    return name == "transformers" or (package == "hybrid" and not is_light)


class _Watch(importlib.abc.MetaPathFinder):
    """Sees the first import after which it is time: the others find it, and it is loaded as they say."""

    def __init__(self, is_time: Callable[[str], bool], then: Callable[[], None]) -> None:
        self._is_time, self.then = is_time, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self._is_time(name):
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _AndThen(spec.loader, self)
        return spec

    def loads(self) -> None:
        """It was time: who only asked whether there is such a module has loaded none."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _AndThen(importlib.abc.Loader):
    """Another loader, and something after it: before, what it loads would be there in half."""

    def __init__(self, loader: importlib.abc.Loader, watch: _Watch) -> None:
        self._loader, self._watch = loader, watch

    def __getattr__(self, name: str) -> Any:  # `python -m` asks for the code
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "importlib gives every module one"
        module.__spec__.loader = module.__loader__ = self._loader
        self._watch.loads()
        self._loader.exec_module(module)
        self._watch.then()
