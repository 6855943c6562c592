"""
The command `shiftworker`: start the processes, ask how they are, send jobs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from celery.exceptions import TimeoutError as CeleryTimeout
from dotenv import find_dotenv, load_dotenv
from rich.console import Console
from rich.markup import escape

from common import keys, logs
from common.celery_app import create_app
from common.client import JobClient
from common.errors import BadSetting, InvalidRequest, Misconfigured, ShiftworkerError, Unavailable, UnknownModel
from common.fleet import read_alive, read_offers, read_statuses, read_unserved
from common.redis_client import connect, ping, without_password
from common.schemas import HardwareStatus, JobRequest, Outcome
from common.settings import Settings
from worker import show
from worker.alive import is_alive
from worker.bench.commands import app as bench
from worker.dead import app as dead
from worker.embedded_redis import EmbeddedRedis, free_port, given_url, usual_or_free_port
from worker.programs import programs
from worker.supervisor import Supervisor

# Exit codes of sysexits.h, so that a supervisor can tell "fix me" from "try again".
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

_LOOK_EVERY_S = 0.1  # whether a draining worker is gone

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One GPU, many models, one queue.",
)
app.add_typer(bench, name="bench")
app.add_typer(dead, name="dead")
_out = Console()
_err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """Run the command line; an error of ours is one clear sentence and an exit code, never a traceback."""
    load_dotenv(find_dotenv(usecwd=True))  # .env beside the caller; what the environment says already stays
    try:
        app()
    except ShiftworkerError as error:
        _err.print(f"[bold red]{error.kind}[/]: {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_CONFIG if isinstance(error, Misconfigured) else EXIT_UNAVAILABLE)


def _settings() -> Settings:
    settings = Settings.from_env()
    logs.configure(settings.log.level, settings.log.format)
    return settings


def _wiring() -> Any:
    """What builds the processes; a producer's light install does not have what it needs."""
    try:
        from worker import wiring  # noqa: PLC0415
    except ImportError as error:
        raise Misconfigured(
            f"{error.name} is not installed: this is the light package of a producer. "
            "Run `pip install 'shiftworker[worker]'` on a machine that should work."
        ) from error
    return wiring


# --- Processes --------------------------------------------------------------------------------------------


@app.command()
def worker() -> None:
    """Run a worker: it owns this machine's cards, its engines, and the model queues it can serve."""
    sys.exit(_wiring().run_worker(_settings()))


@app.command()
def router() -> None:
    """Run the router: it validates, scores and routes jobs. It needs no GPU."""
    sys.exit(_wiring().run_router(_settings()))


@app.command()
def up(
    data: Annotated[Path, typer.Option(help="Where the embedded Redis keeps its file.")] = Path(".shiftworker"),
) -> None:
    """Run everything on this box: Redis (unless REDIS_URL names one), router, worker and Flower."""
    settings = _settings()
    redis = None if given_url() else EmbeddedRedis(data / "redis", port=usual_or_free_port())
    url = redis.url if redis else settings.redis.url
    port = settings.flower.port or free_port()
    supervisor = Supervisor(programs(settings, redis_url=url, flower_port=port))
    supervisor.ask_to_stop_on_signals()
    try:
        if redis is not None:
            redis.start()
        supervisor.start()
        _out.print(f"Redis   {without_password(url)}\nFlower  http://127.0.0.1:{port}\nCtrl-C stops everything.")
        supervisor.run()
    finally:
        supervisor.stop()
        if redis is not None:
            redis.stop()


@app.command()
def health(role: Annotated[str, typer.Argument(help="worker or router")]) -> None:
    """Exit 0 if the process of this role on this machine turns its loop; for container health checks."""
    sys.exit(0 if is_alive(role) else 1)


# --- What is here -----------------------------------------------------------------------------------------


@app.command()
def models(*, as_json: Json = False) -> None:
    """Show which models this machine can serve, how, and why each other one is left out."""
    found = _wiring().survey(_settings())
    if as_json:
        _print_json(show.choice_as_dict(found.choice, found.measured))
        return
    _out.print(show.machine_line(found.machine))
    for reason in found.detected.passed_over:
        _out.print(f"  passed over {reason}", style="dim", highlight=False)
    _out.print(show.choice_table(found.choice, found.measured))


@app.command()
def doctor(*, as_json: Json = False) -> None:
    """Look at this machine: what is here, what fits, what would be chosen and why, what is missing."""
    from worker import doctor as examine  # noqa: PLC0415 - it knows every part, and a producer has only some

    report = examine.examine(_settings())
    if as_json:
        _print_json(report.as_dict())
    else:
        _out.print(show.doctor_report(report))
    if not report.healthy:
        raise typer.Exit(EXIT_UNAVAILABLE)


@app.command()
def estimate(
    model: Annotated[
        str | None, typer.Argument(help="catalogue id, folder, config.json, .gguf file, or hub id")
    ] = None,
    *,
    engine: Annotated[str | None, typer.Option(help="vllm or llamacpp")] = None,
    vllm_version: Annotated[str | None, typer.Option(help="constants of this version")] = None,
    quantization: Annotated[str | None, typer.Option(help="awq, gptq, fp8, mxfp4, Q4_K_M ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="of weights that are not packed")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="auto, fp8; llama.cpp: f16, q8_0 ...")] = None,
    tensor_parallel_size: Annotated[int | None, typer.Option(help="cards that share every layer")] = None,
    pipeline_parallel_size: Annotated[int | None, typer.Option(help="stages of layers, one after the other")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens of prompt and answer")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="requests at once; llama.cpp: slots")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="tokens of one step; llama.cpp: ubatch")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(help="of one card, as the driver says")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="share of it, 0 to 1")] = None,
    gpu: Annotated[str | None, typer.Option(help="the card's name, where its memory is not given")] = None,
    n_gpu_layers: Annotated[int | None, typer.Option(help="llama.cpp: layers on the card; -1 = all")] = None,
    batch: Annotated[Path | None, typer.Option(help="a file with a JSON object for each case")] = None,
    as_json: Json = False,
) -> None:
    """Compute what a model takes on a card, term by term, before it is loaded."""
    from worker import estimates  # noqa: PLC0415 - it reads files that a producer has no use for

    options = {key: value for key, value in locals().items() if key not in {"batch", "as_json", "estimates"}}
    if (model is None) == (batch is None):
        raise BadSetting("shiftworker estimate needs a MODEL, or --batch with a file: one of the two.")
    if batch is not None:
        _estimate_batch(batch)
        return
    answer = estimates.answer_named(options, _settings())
    if as_json:
        _print_json(answer.model_dump(mode="json"))
    else:
        _out.print(show.answer_table(answer))


def _estimate_batch(file: Path) -> None:
    """Print an answer for each line of *file*; keys that mean nothing are named once, on stderr."""
    from worker import estimates  # noqa: PLC0415 - as above

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"--batch {file} cannot be read: {error}.") from None
    ignored: set[str] = set()
    for answer, unknown in estimates.answer_lines(lines, _settings()):
        for key in [key for key in unknown if key not in ignored]:
            _err.print(f"ignored: {escape(key)} means nothing here", highlight=False, soft_wrap=True)
            ignored.add(key)
        sys.stdout.write(answer.model_dump_json() + "\n")


@app.command()
def plan(
    costs: Annotated[Path, typer.Option(help="What loads and jobs of each model take, a TOML table for each.")],
    trace: Annotated[Path | None, typer.Argument(help="Jobs, a JSON object on each line.")] = None,
    policy: Annotated[str, typer.Option(help="shiftworker, fifo, collate or round-robin")] = "shiftworker",
    workers: Annotated[int, typer.Option(min=1, help="Workers on the one queue.")] = 1,
    max_wait: Annotated[float | None, typer.Option(min=0, help="Seconds; unset = SWITCH_MAX_WAIT_S.")] = None,
    *,
    live: Annotated[bool, typer.Option("--live", help="Instead of a trace: what waits now.")] = False,
    turns: Annotated[bool, typer.Option("--turns", help="Show each turn, and why it was taken.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recorded or made-up trace on virtual time, with the worker's own decisions: switches, waits, finish."""
    from worker.simulate.plan import plan_file  # noqa: PLC0415 - a producer has no use for it
    from worker.simulate.policies import policy_named  # noqa: PLC0415 - as above
    from worker.simulate.show import show_plan  # noqa: PLC0415 - as above

    settings = _settings()
    max_wait_s = settings.switch.max_wait_s if max_wait is None else max_wait
    if live == (trace is not None):
        raise BadSetting("shiftworker plan needs a TRACE, or --live for what waits now: one of the two.")
    if trace is None:
        _plan_live(settings, costs, max_wait_s, as_json=as_json)
        return
    found = plan_file(
        trace,
        costs,
        policy=policy_named(policy),
        workers=workers,
        max_wait_s=max_wait_s,
        min_turn_s=settings.switch.min_turn_s,
    )
    if as_json:
        _print_json(found.as_dict(turns=turns))
    else:
        _out.print(show_plan(found, turns=turns))


def _plan_live(settings: Settings, costs_file: Path, max_wait_s: float, *, as_json: bool) -> None:
    """Print what the worker would do with the jobs that wait."""
    from worker.scheduling.redis_queues import RedisQueues  # noqa: PLC0415 - as above
    from worker.simulate.costs import read_costs  # noqa: PLC0415 - as above
    from worker.simulate.live import plan_backlog  # noqa: PLC0415 - as above

    costs = read_costs(costs_file)
    client = connect(settings.redis.url)
    ping(client, settings.redis.url)
    found = read_statuses(client)
    offered = {model.id for offer in read_offers(client) for model in offer.models}
    planned = plan_backlog(
        RedisQueues(client, sorted(offered | costs.keys())).backlog(),
        costs,
        now=time.time(),
        workers=found,
        max_wait_s=max_wait_s,
        min_turn_s=settings.switch.min_turn_s,
    )
    if as_json:
        _print_json(planned.as_dict())
        return
    for model, jobs in planned.jobs.items():
        _out.print(f"{model}: {jobs} jobs, the last ends in {planned.finish_s[model]:,.0f} s", highlight=False)
    _out.print(f"{planned.switches} switches on {planned.workers} workers", highlight=False)


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="A job's id: how it is, and when it will have ended.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Show how every worker is: cards, residents, queues, last switches, alerts. Or how one job is."""
    settings = _settings()
    if job is not None:
        with _client(settings) as producer:
            view = producer.status(job)
        if as_json:
            _print_json(view.model_dump(mode="json"))
        else:
            _out.print(show.job_lines(view), highlight=False)
        return
    client = connect(settings.redis.url)
    ping(client, settings.redis.url)
    statuses = read_statuses(client)
    away = sorted({offer.worker for offer in read_offers(client)} - {found.worker for found in statuses})
    unserved = read_unserved(client, {model for found in statuses for model in found.backlog})
    unrouted = sum(client.llen(name) for name in keys.lists_of(keys.SUBMIT_QUEUE))
    set_aside = client.zcard(keys.DEAD)
    if as_json:
        workers = [found.model_dump(mode="json") for found in statuses]
        waiting = {"unserved": unserved, "waiting_for_router": unrouted, "set_aside": set_aside}
        _print_json({"workers": workers, "away": away, **waiting})
        return
    for found in statuses:
        _out.print(show.status_panel(found))
    if not statuses:
        _out.print("No worker is alive. Start one with `shiftworker worker` or `shiftworker up`.")
    if away:
        _out.print(f"Away: {', '.join(away)}", style="yellow")
    for model, count in unserved.items():
        _out.print(f"No worker that is alive serves {escape(model)}: {count} jobs wait", style="yellow")
    if set_aside:
        _out.print(f"{set_aside} jobs are set aside; `shiftworker dead list` says why", style="yellow")
    _out.print(f"{unrouted} jobs wait for the router")


@app.command()
def switch(
    model: Annotated[str, typer.Argument(help="Catalogue id or alias.")],
    worker: Annotated[str, typer.Option(help="Which worker; unset = the only one.")] = "",
    *,
    force: Annotated[bool, typer.Option(help="Skip the checks of temperature, power and free memory.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the end of the switch.")] = 600,
) -> None:
    """Make a model ready now. The worker switches again when its queues ask for it."""
    settings = _settings()
    client = connect(settings.redis.url)
    ping(client, settings.redis.url)
    name, model_id = _find_model(model, worker, read_statuses(client), client)
    celery = create_app(settings)
    pending = celery.send_task(
        keys.SWITCH_TASK, kwargs={"model": model_id, "force": force}, queue=keys.control_queue(name)
    )
    with _out.status(f"{name}: switching to {model_id}"):
        try:
            record = pending.get(timeout=timeout)
        except CeleryTimeout:
            raise ShiftworkerError(
                f"{name} has not ended the switch to {model_id} after {timeout:.0f} s; "
                "`shiftworker status` shows its stage."
            ) from None
    _out.print(f"{record['outcome']} after {record['seconds']:.1f} s: {record['reason']}", highlight=False)
    sys.exit(0 if record["outcome"] == "ready" else 1)


def _find_model(model: str, worker: str, alive: tuple[HardwareStatus, ...], client: Any) -> tuple[str, str]:
    names = [found.worker for found in alive if worker in ("", found.worker)]
    if len(names) != 1:
        known = ", ".join(found.worker for found in alive) or "none"
        raise BadSetting(f"--worker must name one of the workers that are alive: {known}.")
    for offer in read_offers(client):
        for offered in offer.models:
            if offer.worker == names[0] and model in (offered.id, *offered.aliases):
                return names[0], offered.id
    raise UnknownModel(f"Worker {names[0]} does not offer {model!r}; `shiftworker models` there says why.")


@app.command()
def drain(
    worker: Annotated[str | None, typer.Argument(help="Which worker; unset = all of this host.")] = None,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they are gone.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 600,
) -> None:
    """
    Let workers go, for an upgrade: they take no more jobs, give those that run their grace, the rest back, and end.

    Exit codes: 0 = they are leaving (with --wait: gone), 1 = not all are gone in time, 69 = none has heard it.
    """
    from worker.delivery.drain import ask_to_drain  # noqa: PLC0415 - it brings half of Celery's worker

    settings = _settings()
    client = connect(settings.redis.url)
    ping(client, settings.redis.url)
    leaving = ask_to_drain(create_app(settings), worker)
    if not leaving:
        raise Unavailable(
            f"No worker {f'named {worker}' if worker else 'of this host'} has answered; alive are: "
            f"{', '.join(found.worker for found in read_statuses(client)) or 'none'}. One that is cut off from Redis "
            "or paused hears nothing: send it SIGTERM."
        )
    _out.print(f"Draining: {', '.join(leaving)}", highlight=False)
    if not wait:
        return
    until = time.monotonic() + timeout
    while (there := read_alive(client, leaving)) and time.monotonic() < until:
        time.sleep(_LOOK_EVERY_S)
    if there:
        _err.print(f"Not gone after {timeout:g} s: {', '.join(sorted(there))}", highlight=False)
        sys.exit(1)
    _out.print("Gone")


# --- Jobs -------------------------------------------------------------------------------------------------


@app.command()
def submit(
    body: Annotated[str, typer.Argument(help="A prompt, a JSON body, a .jsonl file, or - for lines on stdin.")],
    model: Annotated[str, typer.Option(help="auto, an alias, or a catalogue id.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for each job.")] = 600,
    *,
    wait: Annotated[bool, typer.Option(help="Wait for the answers.")] = True,
    stream: Annotated[bool, typer.Option("--stream", help="Show each answer while it is made.")] = False,
    as_json: Json = False,
) -> None:
    """Send one job, or a file of jobs in OpenAI's batch form, and show the answers."""
    settings = _settings()
    failed = 0
    with _client(settings) as client:
        requests = list(read_requests(body, model))  # read to the end first: a broken line sends nothing
        ids = [client.submit(_streamed(request) if stream else request) for _, request in requests]
        for job_id in ids:
            if not wait:
                _out.print(job_id, highlight=False)
                continue
            if stream:
                _show_stream(client, job_id, timeout, as_json=as_json)
            outcome = _wait(client, job_id, timeout)
            failed += outcome is None or outcome.error is not None
            if not stream:
                _show_outcome(job_id, outcome, as_json=as_json)
    sys.exit(1 if failed else 0)


def read_requests(body: str, model: str) -> Iterator[tuple[str, JobRequest]]:
    """
    Read what `submit` was given: a prompt, a JSON body, or lines of either a body or OpenAI's batch form.

    Each comes with its name: the `custom_id` of a batch line, else what and where it was.

    Raises
    ------
    InvalidRequest
        A line is no JSON or no body; the message names the line.
    """
    if body == "-" or body.endswith(".jsonl"):
        where = "stdin" if body == "-" else body
        text = sys.stdin.read() if body == "-" else _read_file(Path(body))
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _read_request(line, model, f"{where}, line {number}")
        return
    if body.lstrip().startswith("{"):
        yield _read_request(body, model, "the body")
        return
    yield "the prompt", JobRequest.parse({"messages": [{"role": "user", "content": body}], "model": model or "auto"})


def _read_request(text: str, model: str, where: str) -> tuple[str, JobRequest]:
    try:
        found = json.loads(text)
        line = found if isinstance(found, dict) else {}
        parsed = JobRequest.parse(line.get("body", found))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{where} is not JSON ({error}). Write one JSON object on each line.") from None
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error.message}") from None
    return str(line.get("custom_id", where)), parsed.model_copy(update={"model": model}) if model else parsed


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}. Give the path of a UTF-8 file of JSON lines.") from None


@contextmanager
def _client(settings: Settings) -> Iterator[JobClient]:
    client = JobClient(settings.redis.url)
    try:
        yield client
    finally:
        client.close()


def _wait(client: JobClient, job_id: str, timeout: float) -> Outcome | None:
    try:
        return client.wait(job_id, timeout)
    except ShiftworkerError as error:
        _err.print(f"{job_id}: {error.kind}: {error.message}", highlight=False, markup=False)
        return client.result(job_id)


def _streamed(request: JobRequest) -> JobRequest:
    return JobRequest.parse({**request.model_dump(mode="json", exclude_none=True), "stream": True})


def _show_stream(client: JobClient, job_id: str, timeout: float, *, as_json: bool) -> None:
    """Print what the job says as it says it; what a lost attempt said stays on the screen, and a line says so."""
    if not as_json:
        _out.rule(job_id, style="dim")
    for event in client.stream(job_id, timeout=timeout):
        if as_json:
            _print_json(event.model_dump(mode="json", exclude_none=True))
            sys.stdout.flush()  # also into a pipe as it comes
        elif event.kind == "reset" and event.attempt != 1:
            _out.print(f"\nattempt {event.attempt} begins anew", style="yellow")
        else:
            _out.print(
                event.text, end="\n" if event.kind == "end" else "", highlight=False, markup=False, soft_wrap=True
            )


def _show_outcome(job_id: str, outcome: Outcome | None, *, as_json: bool) -> None:
    if outcome is None or outcome.error is not None:
        return
    if as_json:
        _print_json(outcome.model_dump(mode="json"))
        return
    _out.rule(f"{job_id}  {outcome.ledger.model}  {outcome.ledger.why}", style="dim")
    _out.print(outcome.answer or outcome.response, highlight=False, markup=False)


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + os.linesep)


@app.command()
def cancel(job_id: str) -> None:
    """Cancel a job: a waiting one never runs, a running one is stopped in the engine."""
    with _client(_settings()) as client:
        cancelled = client.cancel(job_id)
    _out.print("cancelled" if cancelled else "it has ended already")
    sys.exit(0 if cancelled else 1)


@app.command()
def demo(
    jobs: Annotated[Path, typer.Option(help="Jobs in OpenAI's batch form.")] = Path("examples/jobs.jsonl"),
    data: Annotated[Path, typer.Option(help="Where models and logs are kept.")] = Path(".shiftworker/demo"),
    *,
    stay: Annotated[bool, typer.Option(help="Keep everything running afterwards, for jobs of your own.")] = False,
) -> None:
    """Start everything on free ports, answer real jobs with two small models, show what happened, stop."""
    from worker.demo.run import run_demo  # noqa: PLC0415 - needs the extra [demo]

    sys.exit(run_demo(list(read_requests(str(jobs), "")), data, _out, stay=stay))
