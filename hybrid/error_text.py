"""What our errors say in one line: what a package's own error said, and which name was probably meant."""

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """What `error` says first, without its full stop; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def nearest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `word` is probably a slip of; they share at least `cutoff`, in 0..1."""
    return next(iter(difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff)), None)


def did_you_mean(near: str | None) -> str:
    """How a sentence ends that refused a name: with the nearest one, or without."""
    return f"; did you mean {near!r}?" if near else "."
