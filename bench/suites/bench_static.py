"""What is exact and needs no GPU, next to what is on record: launches, bytes kept for backward, parameters.

The tables are printed. A figure that got worse fails, with the old and the new one.
"""

import shutil

import pytest

from bench import static
from bench.report.tables import number


@pytest.mark.parametrize("name", static.COUNTS)
def bench_static(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with_compiled = shutil.which("g++") is not None  # inductor's launches wait for a C++ compiler
    figures = static.COUNTS[name](with_compiled)
    with capsys.disabled():
        print(f"\n\n{figures['what']}: {', '.join(figures['columns'])}")
        for row, values in figures["rows"].items():
            print(f"    {row:<40}{'  '.join(f'{number(value):>16}' for value in values)}")
    found = static.check(name, static.load(name), figures)
    assert not found, "\n".join([*found, "If this is meant: `make static` writes the files anew."])
