# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.scripts.loading import script_module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return script_module("timing")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_cpu_time_is_for_one_thread_only(script: ModuleType, threads):
    threads(1)
    assert (script.clock_of("cpu"), script.clock_name("cpu")) == (time.process_time, "CPU time")
    threads(2)
    assert (script.clock_of("cpu"), script.clock_name("cpu")) == (time.perf_counter, "wall time")
    threads(1)
    assert script.clock_name("cuda") == "wall time"


def test_the_machine_is_told_by_name(script: ModuleType, tmp_path: Path, threads):
    threads(1)
    facts = script.machine()
    assert facts["processor"] == facts["cpu"] != ""
    assert (facts["device"], facts["threads"], facts["torch"]) == ("cpu", 1, torch.__version__)
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0.1
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: Some Processor 9000 \nprocessor\t: 1\nmodel name\t: Another\n")
    assert script.cpu_name(listed) == "Some Processor 9000"
    # not every system lists its processors, nor every processor by this name
    listed.write_text("Processor\t: ARMv8\n")
    assert script.cpu_name(listed) == script.cpu_name(tmp_path / "none") != ""
