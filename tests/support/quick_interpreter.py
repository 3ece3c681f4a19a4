"""Triton's interpreter, quicker: what it finds out at every call is found out once. Results stay the same.

As it comes, each call of a function that a kernel calls swaps the functions of `triton.language` again, which
takes longer than most of these functions do. Each tensor has a type, a shape and a table of types made for
it, though a kernel knows a few dozen of them. And of each sum of whole numbers it is computed whether it
overflows, for an assertion that is made in debug mode alone.
"""

from dataclasses import replace
from functools import cache
from inspect import getmembers

import triton.language as tl
from triton.language.core import block_type, dtype
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

_launch, _swap, _type_of = GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype
_make_block, _make_tensor = block_type.__init__, tl.tensor.__init__
_equal_types, _equal_blocks = dtype.__eq__, block_type.__eq__
_broadcast = TritonSemantic.broadcast_impl_value
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


@cache
def _builtins(package) -> list[tuple[str, object]]:
    """What the interpreter swaps in a module or class, each by its name."""
    return [(name, member) for name, member in getmembers(package) if tl.core.is_builtin(member)]


def _swap_known(package, builder, scope) -> None:
    for name, member in _builtins(package):
        if getattr(package, name) is member:  # not while it is swapped
            interpreter._patch_attr(package, name, member, builder, scope)


def _type_by_name(kind, types={}):  # noqa: B006  kept between calls
    if kind.name not in types:
        types[kind.name] = _type_of(kind)
    return types[kind.name]


def _block_once(cls, element, shape):
    """One type for all blocks of a shape, kept with the type of their elements."""
    values = getattr(shape, "values", shape)
    key = tuple([getattr(size, "value", size) for size in values])
    blocks = element.__dict__.setdefault("_blocks", {})
    if key not in blocks:
        blocks[key] = object.__new__(cls)
    return blocks[key]


def _fill_block_once(self, element, shape) -> None:
    if "name" not in self.__dict__:
        _make_block(self, element, shape)


def _fill_tensor(self, handle, kind) -> None:
    """All tensors of a type have one shape and one number of elements."""
    known = kind.__dict__
    if "of_tensors" in known:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = known["of_tensors"]
    else:
        _make_tensor(self, handle, kind)
        known["of_tensors"] = self.shape, self.numel


def _is_same_type(self, other):
    return self is other or _equal_types(self, other)


def _is_same_block(self, other):
    return self is other or _equal_blocks(self, other)


def _broadcast_where_needed(self, left, right):
    """Blocks of one shape stay as they are."""
    a, b = left.type, right.type
    if a is b or (a.is_block() and b.is_block() and a.shape.values == b.shape.values):
        return left, right
    return _broadcast(self, left, right)


def quicken() -> None:
    """For this process, once."""
    interpreter._get_np_dtype = _type_by_name
    interpreter._patch_builtin = _swap_known
    interpreter._patch_lang = _swap_once
    GridExecutor.__call__ = _launch_and_forget
    block_type.__new__, block_type.__init__ = _block_once, _fill_block_once
    tl.tensor.__init__ = _fill_tensor
    tl.str_to_ty = cache(tl.str_to_ty)  # an argument's type by its name
    dtype.__eq__, block_type.__eq__ = _is_same_type, _is_same_block
    TritonSemantic.broadcast_impl_value = _broadcast_where_needed
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
