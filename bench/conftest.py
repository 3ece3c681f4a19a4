"""`pytest bench --card rtx4090`: the card whose batch sizes are used on a GPU."""

import pytest

from bench.peers.workloads import CARDS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--card", choices=CARDS, help="the card whose batch sizes are used; default: from the device's name"
    )
