"""What an error of a package says, in one line, to be told in one of ours."""


def first_line(error: BaseException) -> str:
    """What `error` says first, without its full stop; the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
