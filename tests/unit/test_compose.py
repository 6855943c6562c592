"""
compose.yml holds together: it has not been run where it was written, so what can be read of it is checked.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from common.settings import Settings, WorkerSettings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_every_image_that_is_built_is_a_target_of_the_dockerfile() -> None:
    """
    A renamed target would be found out only at build time.
    """
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))

    assert {service["build"]["target"] for service in SERVICES.values() if "build" in service} == targets


def test_redis_keeps_what_it_accepted() -> None:
    """
    On disk every second, never evicted, on a volume that outlives the container.
    """
    redis = SERVICES["redis"]

    assert "--appendonly yes --appendfsync everysec --maxmemory-policy noeviction" in redis["command"]
    assert redis["volumes"] == ["redis:/data"]
    assert "redis" in COMPOSE["volumes"]


def test_every_service_has_a_health_check_and_waits_for_redis() -> None:
    """
    Nothing starts before the broker answers.
    """
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"][0] == "CMD", name
        if name != "redis":
            assert service["depends_on"] == {"redis": {"condition": "service_healthy"}}


def test_the_worker_has_the_gpu_and_time_to_hand_its_jobs_back() -> None:
    """
    The container is killed only after the soft shutdown is over.
    """
    worker = SERVICES["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    grace_s = int(worker["stop_grace_period"].removesuffix("s"))

    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert grace_s > WorkerSettings.model_fields["soft_shutdown_s"].default
    assert "deploy" not in SERVICES["worker-cpu"] or not SERVICES["worker-cpu"]["deploy"]


def test_flower_does_not_start_without_a_password() -> None:
    """
    Compose refuses a missing or empty FLOWER_PASSWORD.
    """
    assert "${FLOWER_PASSWORD:?" in SERVICES["flower"]["environment"]["FLOWER_BASIC_AUTH"]


def test_every_port_is_on_the_loopback() -> None:
    """
    Redis and Flower are for this machine; whoever opens them does so on purpose.
    """
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert len(ports) == 2
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_variables_that_are_passed_on_are_settings() -> None:
    """
    A misspelt name would silently do nothing.
    """
    groups: list[Any] = [info.annotation for info in Settings.model_fields.values()]
    known = {f"{group.model_config['env_prefix']}{name}".upper() for group in groups for name in group.model_fields}
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yml").read_text(encoding="utf-8")))

    assert used == {"WORKER_NAME", "FLOWER_USER", "FLOWER_PASSWORD", "FLOWER_PORT"}
    assert used <= known


def test_the_e2e_tests_can_be_planned_on_containers() -> None:
    """
    No Docker engine has run them here; their modules import, and pytest finds every fixture they ask for.
    """
    planned = subprocess.run(
        [sys.executable, "-m", "pytest", "--setup-plan", "-q", "tests/e2e/test_journey.py"],
        cwd=ROOT, env={**os.environ, "TEST_NODES": "docker"}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "our_image" in planned.stdout
    assert "worker_container" in planned.stdout
