"""What the installed transformers calls a cache, `past_key_values` or `cache`: nothing else here knows it."""

import inspect
import warnings
from collections.abc import Callable, Container
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from transformers import GenerationMixin
from transformers.generation.continuous_batching.cache import PagedAttentionCache

P = ParamSpec("P")
R = TypeVar("R")
_NAMES = ("cache", "past_key_values")  # the newer one first
_OF_PAGED = "cache"  # continuous batching's own cache has this name on every transformers


def _name_in_force() -> str | None:
    taken = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in _NAMES if name in taken), None)


CACHE_NAME = _name_in_force() or _NAMES[0]
"""The name in the arguments of models and of what makes masks, in generate's, and in outputs."""


def check_cache_name() -> None:
    """Errors: ValueError for a transformers that calls a cache by a name that is not known here."""
    if _name_in_force() is None:
        raise ValueError(
            f"HybridModel: expected a transformers that calls a cache {' or '.join(_NAMES)}, got "
            f"{transformers.__version__}, which calls it otherwise (pip install 'transformers<5.25')."
        )


def is_argument_of(names: Container[str]) -> bool:
    """Whether a function whose arguments have these names takes a cache."""
    return any(name in names for name in _NAMES)


def as_argument(cache: Any) -> dict[str, Any]:
    """`cache` as transformers' models and functions take it, among their keyword arguments.

    What is no cache at all, such as tuples of older versions, goes by the name in force: there models refuse
    it, and by another name nobody would read it.
    """
    return {_OF_PAGED if isinstance(cache, PagedAttentionCache) else CACHE_NAME: cache}


def takes_cache(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which is given its `past_key_values` by either name, and shows the one in force.

    generate and trainers read from a signature what a model takes. A name that transformers has given up is
    taken with a FutureWarning, as its own models take it.

    Errors: ValueError for two caches.
    """

    @wraps(function)
    def by_either_name(*args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
        caches = [cache for cache in given.values() if cache is not None]
        if len(caches) > 1:
            raise ValueError(f"HybridModel: expected one cache, got one as {' and one as '.join(given)}.")
        if given:
            kwargs["past_key_values"] = caches[0] if caches else None
        if given.keys() & given_up and not torch.compiler.is_compiling():
            what = f"`{_NAMES[1]}` is deprecated in this transformers. Use `{CACHE_NAME}` instead."
            warnings.warn(what, FutureWarning, stacklevel=4)  # whoever called the module
        return function(*args, **kwargs)

    given_up = set(_NAMES[_NAMES.index(CACHE_NAME) + 1 :])
    shown = inspect.signature(function)
    parameters = [p.replace(name=CACHE_NAME) if p.name in _NAMES else p for p in shown.parameters.values()]
    by_either_name.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
    return by_either_name
