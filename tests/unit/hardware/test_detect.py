"""
Who reads the cards, and what is said of those who cannot.
"""

from __future__ import annotations

import pynvml
import pytest

from common.errors import BadSetting
from common.settings import WorkerSettings
from tests.factories import GIB, make_machine
from worker.hardware.detect import open_reader
from worker.hardware.gpu import Machine, MachineReader
from worker.hardware.stub import parse_cards


class Reads:
    """A reader of one fixed machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def read(self) -> Machine:
        """Read it."""
        return self.machine


def sees_a_card() -> MachineReader:
    return Reads(make_machine(24))


def sees_nothing() -> MachineReader:
    return Reads(make_machine())


def no_library() -> MachineReader:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def no_program() -> MachineReader:
    raise FileNotFoundError(2, "No such file or directory", "nvidia-smi")


def test_nvml_comes_first() -> None:
    """
    Where NVML shows a card, nvidia-smi is not even started.
    """
    found = open_reader(WorkerSettings(), open_nvml=sees_a_card, open_nvidia_smi=no_program)

    assert found.reader.read().kind == "gpu"
    assert found.passed_over == ()


@pytest.mark.parametrize("nvml", [no_library, sees_nothing])
def test_nvidia_smi_stands_in_for_nvml(nvml: type) -> None:
    """
    NVML is not there or shows nothing: nvidia-smi is asked, and the reason is kept.
    """
    found = open_reader(WorkerSettings(), open_nvml=nvml, open_nvidia_smi=sees_a_card)

    assert found.reader.read().kind == "gpu"
    (reason,) = found.passed_over
    assert reason.startswith("NVML: ")


def test_without_either_this_is_a_cpu_machine() -> None:
    """
    Nothing is missing for a CPU machine; both reasons are kept for the log.
    """
    found = open_reader(WorkerSettings(), open_nvml=no_library, open_nvidia_smi=no_program)
    machine = found.reader.read()

    assert (machine.kind, machine.source) == ("cpu", "none")
    assert machine.ram_total_bytes > 0
    assert [reason.partition(":")[0] for reason in found.passed_over] == ["NVML", "nvidia-smi"]


def test_cpu_looks_for_no_card() -> None:
    """
    WORKER_HARDWARE=cpu hides the cards that are there.
    """
    found = open_reader(WorkerSettings(hardware="cpu"), open_nvml=sees_a_card)

    assert found.reader.read().gpus == ()


def test_stub_cards_come_from_the_setting() -> None:
    """
    Sizes in GiB, in order, idle and empty.
    """
    machine = open_reader(WorkerSettings(hardware="stub", stub_gpus="24, 7.5")).reader.read()

    assert machine.source == "stub"
    assert [(gpu.index, gpu.free_bytes) for gpu in machine.gpus] == [(0, 24 * GIB), (1, int(7.5 * GIB))]


@pytest.mark.parametrize("text", ["24GB", "24,,24", "0", "-8", "nan", "inf", "24;24", "99999"])
def test_a_size_that_is_none_names_the_setting(text: str) -> None:
    """
    The message says which variable, which part of it, and what is allowed.
    """
    with pytest.raises(BadSetting, match=r"WORKER_STUB_GPUS=.* Write GiB, comma separated"):
        parse_cards(text)


def test_no_stub_cards_is_a_machine_without() -> None:
    """
    An empty setting is no mistake.
    """
    assert parse_cards(" ") == ()
