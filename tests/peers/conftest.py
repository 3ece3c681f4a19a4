"""Which versions of which projects are tested against, in the head of the report."""

from importlib.metadata import version


def pytest_report_header():
    return "peers: " + ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
