"""Packages that only some of what is here needs: extras of setup.py, imported when they are asked for."""

from importlib.util import find_spec


def installed(package: str, who: str) -> None:
    """See that an extra of this name is there; `who` asks for it.

    Errors: ValueError that says how to install it.
    """
    if find_spec(package) is None:
        raise ValueError(
            f"{who}: expected the package {package} (pip install 'trm-hybrid[{package}]'), "
            "got no such package."
        )
