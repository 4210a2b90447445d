# SPDX-License-Identifier: Apache-2.0
"""Fixtures that all tests share."""

import os

# Before PyTorch is imported, here and in every process that a test starts: the networks are tiny, and several tests run
# at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# MONAI imports MLflow wherever it is installed, and MLflow reports on its use.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import random
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have most slow tests: at the end of a parallel run nobody waits for one of them."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # a stable order


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real cases that MONAI_CGGM_TEST_DATA names; without it the test is skipped."""
    named = os.environ.get("MONAI_CGGM_TEST_DATA")
    folder = Path(named) if named else REPOSITORY / "../shared/data"
    folder = folder.resolve()
    if not folder.is_dir():
        where = f"{folder} is not a folder" if named else "MONAI_CGGM_TEST_DATA is not set"
        pytest.skip(f"needs real cases: {where}")
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches beyond this machine fails at once, instead of passing only where there is a network."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
            raise OSError(f"tests use no network, but one connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
