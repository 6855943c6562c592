"""
The environment, read once into one typed object: a group per capability.

Every variable is listed in .env.example with its meaning, unit and default; a test keeps the two alike.
An empty variable counts as not set, so that a compose file may pass everything through.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from common.bounds import Bounds
from common.errors import BadSetting
from common.may_reach import Allowed
from common.redis_client import without_password
from common.standard_webhook import key_of

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def _split_at_commas(value: object) -> object:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class _Group(BaseSettings):
    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, case_sensitive=False)


class RedisSettings(_Group):
    """Where jobs, results and the hardware's status lie."""

    model_config = SettingsConfigDict(env_prefix="REDIS_")

    url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix://")

    @field_validator("url")
    @classmethod
    def _has_a_scheme(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value


class BrokerSettings(_Group):
    """How jobs come in, if not through Redis."""

    model_config = SettingsConfigDict(env_prefix="BROKER_")

    url: str | None = Field(None, description="amqp:// or amqps://: producers hand jobs to RabbitMQ; unset = to Redis")

    @field_validator("url")
    @classmethod
    def _is_rabbits(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("amqp://", "amqps://")):
            raise ValueError("must start with amqp:// or amqps://")
        return value


class VllmSettings(_Group):
    """Overrides of the choice at boot, and where vLLM is."""

    model_config = SettingsConfigDict(env_prefix="VLLM_")

    model: str | None = Field(None, description="catalogue id, alias, folder or hub repository to serve; only it")
    quantization: str | None = Field(None, description="e.g. awq, gptq, fp8; unset = as the model's files say")
    max_model_len: int | None = Field(None, ge=1, description="tokens of prompt and answer together")
    gpu_memory_utilization: float = Field(0.0, ge=0, le=1, description="share of the card; 0 = computed")
    tensor_parallel_size: int | None = Field(None, ge=1, description="cards that share each layer")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests that vLLM works on at once")
    force: bool = Field(False, description="load VLLM_MODEL even if the arithmetic says it cannot fit")
    python: Path | None = Field(None, description="the Python that has vLLM; unset = .venv-vllm, then our own")
    channel: Literal["host", "server"] = Field(
        "host", description="host = forks of one process with vLLM imported; server = vLLM's own HTTP server"
    )


class LlamaCppSettings(_Group):
    """llama.cpp's server."""

    model_config = SettingsConfigDict(env_prefix="LLAMACPP_")

    server: str | None = Field(None, description="path of llama-server; unset = the one on the PATH, then xllamacpp")
    n_gpu_layers: int | None = Field(None, ge=-1, description="layers on the card; -1 = all; unset = computed")
    parallel: int = Field(8, ge=1, le=256, description="requests at once")


class ModelSettings(_Group):
    """Which models exist and which of them this worker serves."""

    model_config = SettingsConfigDict(env_prefix="MODELS_")

    file: Path | None = Field(None, description="a catalogue of your own, added to the shipped one")
    only: Annotated[tuple[str, ...], NoDecode] = Field((), description="serve only these ids, comma separated")
    dir: Path | None = Field(None, description="where relative paths in a catalogue start; unset = its folder")

    _split = field_validator("only", mode="before")(_split_at_commas)


class WorkerSettings(_Group):
    """The worker process."""

    model_config = SettingsConfigDict(env_prefix="WORKER_")

    name: str = Field("", max_length=60, pattern=r"^[A-Za-z0-9_.-]*$", description="unset = the host's name")
    concurrency: int = Field(32, ge=1, le=1024, description="threads: jobs at once where the engine needs one for each")
    hardware: Literal["auto", "cpu", "stub"] = Field("auto", description="auto = NVML, then nvidia-smi, then none")
    stub_gpus: str = Field("", description="for WORKER_HARDWARE=stub: cards in GiB, e.g. 24,24")
    stub_engine: bool = Field(False, description="answer every job with a stand-in, for trying things out")
    stub_load_s: float = Field(0.2, ge=0, description="how long the stand-in takes to load")
    stub_run_s: float = Field(0.05, ge=0, description="how long the stand-in takes for a job")
    stub_wake_s: float | None = Field(
        None, ge=0, description="how long the stand-in takes to wake on a card; unset = it cannot sleep"
    )
    run_dir: Path | None = Field(None, description="private folder for sockets and logs; unset = a temporary one")
    soft_shutdown_s: Seconds = Field(30, description="after SIGTERM, running jobs may take this long")


class SwitchSettings(_Group):
    """Changing the model."""

    model_config = SettingsConfigDict(env_prefix="SWITCH_")

    timeout_s: Seconds = Field(90, description="for one attempt to load and verify")
    attempts: int = Field(3, ge=1, le=10)
    drain_s: Seconds = Field(120, description="running jobs may take this long before they go back to the queue")
    max_wait_s: Seconds = Field(600, description="a job that waits longer gets its model's turn")
    max_waits: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="another bound for TENANT=SECONDS, TENANT:PRIORITY=SECONDS, *:PRIORITY=SECONDS, comma separated"
    )
    min_turn_s: Seconds = Field(30, description="a model with waiting jobs stays at least this long")
    max_residents: int = Field(1, ge=1, description="models ready side by side, when they fit")
    max_asleep: int = Field(2, ge=0, description="models that sleep beside those instead of ending; 0 = none")
    max_temperature_c: float = Field(85, gt=0, description="no load on a card hotter than this")
    max_power_share: float = Field(0.95, gt=0, le=1.5, description="no load on a card above this share of its limit")
    quarantine_s: Seconds = Field(60, description="first pause after a model failed to load; doubles")

    _split = field_validator("max_waits", mode="before")(_split_at_commas)

    @field_validator("max_waits")
    @classmethod
    def _are_bounds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        Bounds.parse(1.0, value)
        return value

    @property
    def bounds(self) -> Bounds:
        """How long the jobs of each tenant and class may wait."""
        return Bounds.parse(self.max_wait_s, self.max_waits)


class JobSettings(_Group):
    """What a job may take."""

    model_config = SettingsConfigDict(env_prefix="JOB_")

    timeout_s: Seconds = Field(600, description="in the engine, per attempt")
    max_attempts: int = Field(5, ge=1, le=100, description="failures under one job, in engines that live on")
    max_deaths: int = Field(2, ge=1, le=100, description="of an engine with one job alone in it: it is set aside")
    max_worker_deaths: int = Field(3, ge=1, le=100, description="of a worker, likewise")
    result_ttl_s: Seconds = Field(24 * 3600, ge=1, description="how long outcomes and streams are kept")
    result_max_bytes: int = Field(4 * 2**30, ge=2**20, description="answers kept; beyond, the oldest are dropped")


class LimitSettings(_Group):
    """What one job, and the jobs of one tenant, may take of the queue."""

    model_config = SettingsConfigDict(env_prefix="LIMIT_")

    body_bytes: int = Field(16 * 2**20, ge=1, description="one body, as JSON")
    prompt_chars: int = Field(4_000_000, ge=1, description="the text of one prompt")
    answers: int = Field(128, ge=1, description="of one job: n, or best_of, for each of its prompts")
    max_tokens: int = Field(131_072, ge=1, description="that a job may ask for, in each answer")
    tenant_jobs: int = Field(100_000, ge=1, description="jobs of one tenant that have not ended")
    tenant_bytes: int = Field(2 * 2**30, ge=1, description="bodies of one tenant's jobs that have not ended")
    unrouted_jobs: int = Field(100_000, ge=1, description="jobs that wait for the router")


ANY_HOST = "*"


class EgressSettings(_Group):
    """Where the URLs in jobs (webhooks, images, audio, video) may lead."""

    model_config = SettingsConfigDict(env_prefix="EGRESS_")

    allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="hosts, addresses and networks that may be called though not public, comma separated"
    )
    media_domains: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="hosts that images, audio and video may come from, comma separated; * = any"
    )

    _split = field_validator("allow", "media_domains", mode="before")(_split_at_commas)

    @field_validator("allow")
    @classmethod
    def _can_be_read(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        Allowed.parse(value)
        return value


class WebhookSettings(_Group):
    """Telling the address that a job names how it ended; off without a secret."""

    model_config = SettingsConfigDict(env_prefix="WEBHOOK_")

    secret: SecretStr | None = Field(None, description="whsec_ and 24 to 64 bytes in base64; unset = off")
    timeout_s: Seconds = Field(15, description="for one call, from the name's resolution to the answer's status")
    give_up_s: Seconds = Field(24 * 3600, description="calls are repeated, ever more seldom, for this long")
    parallel: int = Field(32, ge=1, le=1024, description="calls at once")

    @field_validator("secret")
    @classmethod
    def _is_a_secret(cls, value: SecretStr | None) -> SecretStr | None:
        try:
            good = value is None or 24 <= len(key_of(value.get_secret_value())) <= 64  # noqa: PLR2004 - the standard's
        except ValueError:
            good = False
        if not good:
            raise ValueError("must be whsec_ and 24 to 64 bytes in base64; `openssl rand -base64 32` makes the latter")
        return value


class CloudSettings(_Group):
    """An OpenAI-compatible endpoint that stands in for models which cannot be made ready here; off without a URL."""

    model_config = SettingsConfigDict(env_prefix="CLOUD_")

    url: str | None = Field(None, description="with the version, e.g. https://api.openai.com/v1; unset = off")
    api_key: SecretStr | None = Field(None, description="unset = the endpoint needs none")
    model: str | None = Field(None, validate_default=True, description="what the endpoint calls the model")
    for_models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="ids it may stand in for, comma separated; unset = all, for jobs that name no model"
    )
    capabilities: Annotated[tuple[str, ...], NoDecode] = Field(
        ("chat",), description="what that model can do: chat, completion, tools, vision, json; comma separated"
    )
    parallel: int = Field(8, ge=1, le=1024, description="jobs that are there at once")

    _split = field_validator("for_models", "capabilities", mode="before")(_split_at_commas)

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "https://none")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must start with https:// (or http://) and name a host")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("must be an address alone; the key goes into CLOUD_API_KEY")
        return value

    @field_validator("api_key")
    @classmethod
    def _is_a_key(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None:
            return None
        if re.fullmatch(r"[!-~]+", value.get_secret_value()) is None:
            raise ValueError("must be visible ASCII characters only, as HTTP's headers are")
        parts = urlsplit(info.data.get("url") or "https://none")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError("a key over http:// can be read on its way; CLOUD_URL must be https:// or on the loopback")
        return value

    @field_validator("model")
    @classmethod
    def _is_named(cls, value: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("url") is not None and value is None:
            raise ValueError("CLOUD_URL needs it")
        return value


class DeliverySettings(_Group):
    """How fast a dead worker's jobs come back."""

    model_config = SettingsConfigDict(env_prefix="DELIVERY_")

    lease_s: Seconds = Field(15, description="a process that is silent this long is taken for dead")
    visibility_timeout_s: Seconds = Field(120, description="backstop for deliveries without a lease")


class RoutingSettings(_Group):
    """The router."""

    model_config = SettingsConfigDict(env_prefix="ROUTING_")

    rules_file: Path | None = Field(None, description="indicator rules of your own; unset = the shipped ones")


class StatusSettings(_Group):
    """What is published about the hardware."""

    model_config = SettingsConfigDict(env_prefix="STATUS_")

    interval_s: Seconds = Field(5, description="how often, besides every change")
    ttl_s: Seconds = Field(15, description="silent this long = gone")
    stream_length: int = Field(2000, ge=1, description="how many are kept to look back")


class LogSettings(_Group):
    """Logs."""

    model_config = SettingsConfigDict(env_prefix="LOG_")

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["auto", "console", "json"] = Field("auto", description="auto = console on a terminal, else json")


class FlowerSettings(_Group):
    """Flower, as `shiftworker up` starts it."""

    model_config = SettingsConfigDict(env_prefix="FLOWER_")

    port: int = Field(5555, ge=0, le=65535, description="0 = a free one")
    user: str = "shiftworker"
    password: SecretStr | None = Field(None, description="unset = Flower listens on the loopback only")


class Settings(BaseModel):
    """Everything that can be set."""

    model_config = ConfigDict(frozen=True)

    redis: RedisSettings
    broker: BrokerSettings
    vllm: VllmSettings
    llamacpp: LlamaCppSettings
    models: ModelSettings
    worker: WorkerSettings
    switch: SwitchSettings
    job: JobSettings
    limit: LimitSettings
    egress: EgressSettings
    webhook: WebhookSettings
    cloud: CloudSettings
    delivery: DeliverySettings
    routing: RoutingSettings
    status: StatusSettings
    log: LogSettings
    flower: FlowerSettings

    @classmethod
    def from_env(cls) -> Self:
        """
        Read the environment.

        Raises
        ------
        BadSetting
            Names every variable that is wrong, its value, and what is allowed.
        """
        groups: dict[str, _Group] = {}
        problems: list[str] = []
        for name, info in cls.model_fields.items():
            group = info.annotation
            assert isinstance(group, type)  # noqa: S101 - every field of this class is a group
            assert issubclass(group, _Group)  # noqa: S101
            try:
                groups[name] = group()
            except ValidationError as error:
                problems += [_problem(group, dict(found)) for found in error.errors(include_url=False)]
        if problems:
            raise BadSetting(f"{'; '.join(problems)}. Every setting is described in .env.example.")
        return cls.model_validate(groups)


def _problem(group: type[_Group], found: dict[str, object]) -> str:
    """One finding of pydantic with the variable's name in front."""
    location = found["loc"]
    field = str(location[0]) if isinstance(location, tuple) and location else "?"
    variable = f"{group.model_config.get('env_prefix', '')}{field}".upper()
    info = group.model_fields.get(field)
    meaning = f" ({info.description})" if info is not None and info.description else ""
    secret = info is not None and info.annotation is not None and "Secret" in str(info.annotation)
    given = found.get("input")
    value = "..." if secret else repr(without_password(given) if isinstance(given, str) else given)
    return f"{variable}={value}: {str(found['msg']).removeprefix('Value error, ')}{meaning}"
