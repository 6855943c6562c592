"""
What nvidia-smi prints becomes cards; whatever it does not say stays unknown.

The files in tests/data/hardware are written by hand in the program's format.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from worker.hardware.nvidia_smi import NvidiaSmiReader, parse

DATA = Path(__file__).parents[2] / "data" / "hardware"
MIB = 2**20


def text(name: str) -> str:
    return (DATA / f"{name}.csv").read_text()


def test_every_column_of_a_data_centre_card_is_read() -> None:
    """
    An H200 says everything; memory comes in MiB, shares in percent, capability as major.minor.
    """
    (gpu,) = parse(text("h200"))

    assert (gpu.index, gpu.name, gpu.compute_capability) == (0, "NVIDIA H200", (9, 0))
    assert (gpu.total_bytes, gpu.used_bytes, gpu.free_bytes) == (143771 * MIB, 1 * MIB, 143155 * MIB)
    assert (gpu.utilization, gpu.temperature_c, gpu.power_w, gpu.power_limit_w) == (0.0, 29.0, 76.23, 700.0)
    assert gpu.sm_clock_mhz == 345
    assert gpu.throttle_reasons == ()  # idle is no throttling


def test_each_line_is_a_card_of_its_own() -> None:
    """
    Two unequal consumer cards keep their own sizes, loads and throttle reasons.
    """
    large, small = parse(text("two_unequal"))

    assert (large.index, small.index) == (0, 1)
    assert large.total_bytes == 24564 * MIB
    assert small.total_bytes == 8192 * MIB
    assert large.utilization == pytest.approx(0.97)
    assert large.throttle_reasons == ("power_cap",)


def test_a_laptop_without_power_reading_has_unknown_power() -> None:
    """
    "[N/A]" is None, never zero; two throttle bits give two names.
    """
    (gpu,) = parse(text("laptop"))

    assert (gpu.power_w, gpu.power_limit_w) == (None, None)
    assert gpu.sm_clock_mhz == 210
    assert gpu.throttle_reasons == ("software_thermal", "hardware_thermal")


def test_wsl_leaves_much_unsaid() -> None:
    """
    "[Not Supported]" is None like "[N/A]", and what is said is still read.
    """
    (gpu,) = parse(text("wsl"))

    assert (gpu.utilization, gpu.power_limit_w, gpu.sm_clock_mhz) == (None, None, None)
    assert gpu.throttle_reasons == ()
    assert (gpu.power_w, gpu.free_bytes) == (31.05, 8857 * MIB)


@pytest.mark.parametrize(
    "line",
    [
        "0, GPU-1, Orin, [N/A], [N/A], [N/A], 3, 40, 5.0, 15.0, 300",  # memory shared with the host
        "No devices were found",
        "",
        "[Unknown Error], GPU-2, x, 1024, 0, 1024",
    ],
)
def test_a_line_without_index_or_memory_is_no_card(line: str) -> None:
    """
    A placement needs both, so such a card is left out.
    """
    assert parse(line) == ()


def test_a_name_may_hold_a_comma() -> None:
    """
    nvidia-smi quotes such a field, as CSV does.
    """
    (gpu,) = parse('0, GPU-1, "Card, large", 1024, 0, 1024')

    assert gpu.name == "Card, large"
    assert gpu.temperature_c is None


def test_an_old_driver_is_asked_without_the_newer_fields() -> None:
    """
    One unknown field fails the whole query; the reader then asks without the fields that old drivers lack.
    """
    asked: list[tuple[str, ...]] = []

    def old_driver(fields: tuple[str, ...]) -> str:
        asked.append(fields)
        if "compute_cap" in fields:
            raise subprocess.CalledProcessError(2, "nvidia-smi")
        return ", ".join(text("h200").split(", ")[: len(fields)])

    machine = NvidiaSmiReader(old_driver).read()

    assert machine.gpus[0].name == "NVIDIA H200"
    assert machine.gpus[0].compute_capability is None
    assert len(asked) == 3


def test_a_driver_that_goes_away_leaves_a_machine_without_cards() -> None:
    """
    A reader never raises once it was opened.
    """
    answers = [text("h200")]

    def dying(fields: tuple[str, ...]) -> str:
        if answers:
            return answers.pop()
        raise subprocess.TimeoutExpired("nvidia-smi", 10)

    assert NvidiaSmiReader(dying).read().gpus == ()
