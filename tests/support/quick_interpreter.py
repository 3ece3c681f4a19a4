"""Triton's interpreter, quicker: what it finds out at every call is found out once. Results stay the same.

As it comes, each call of a function that a kernel calls swaps the functions of `triton.language` again, which
takes longer than most of these functions do; and a table of types is made for each tensor.
"""

from functools import cache

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

_launch, _swap, _type_of = GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype
_swapped: list[set[str]] = []  # of each launch under way, the modules whose functions are swapped


@cache
def _modules(function) -> set[str]:
    """Which of the modules of `triton.language` the interpreter would swap for `function`."""
    here = function.__globals__.values()
    return {module.__name__ for module in (tl, tl.core) if any(value is module for value in here)}


def _launch_and_forget(self, *args, **kwargs):
    _swapped.append(set())
    try:
        return _launch(self, *args, **kwargs)
    finally:
        _swapped.pop()


def _swap_once(function):
    modules = _modules(function)
    if modules and _swapped and modules <= _swapped[-1]:
        return None  # to undo is the launch's part; a call within it undoes nothing
    scope = _swap(function)
    if _swapped:
        _swapped[-1].update(modules)
    return scope


def _type_by_name(kind, types={}):  # noqa: B006  kept between calls
    if kind.name not in types:
        types[kind.name] = _type_of(kind)
    return types[kind.name]


def quicken() -> None:
    """For this process, once."""
    interpreter._get_np_dtype = _type_by_name
    GridExecutor.__call__ = _launch_and_forget
    interpreter._patch_lang = _swap_once
