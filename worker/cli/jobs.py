"""
`shiftworker submit`, `cancel`, `demo`: jobs sent, followed, shown and cancelled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from common.client import JobClient
from common.errors import InvalidRequest, ShiftworkerError
from common.schemas import JobRequest, Outcome
from worker.cli.console import Json, err, out, print_json, read_settings

app = typer.Typer()


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
    settings = read_settings()
    failed = 0
    with closing(JobClient(settings.redis.url)) as client:
        # All at once: a line that is broken or refused sends nothing.
        ids = client.submit_many(_streamed(request) if stream else request for _, request in read_requests(body, model))
        for job_id in ids:
            if not wait:
                out.print(job_id, highlight=False)
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


def _wait(client: JobClient, job_id: str, timeout: float) -> Outcome | None:
    try:
        return client.wait(job_id, timeout)
    except ShiftworkerError as error:
        err.print(f"{job_id}: {error.kind}: {error.message}", highlight=False, markup=False)
        return client.result(job_id)


def _streamed(request: JobRequest) -> JobRequest:
    return JobRequest.parse({**request.model_dump(mode="json", exclude_none=True), "stream": True})


def _show_stream(client: JobClient, job_id: str, timeout: float, *, as_json: bool) -> None:
    """Print what the job says as it says it; what a lost attempt said stays on the screen, and a line says so."""
    if not as_json:
        out.rule(job_id, style="dim")
    for event in client.stream(job_id, timeout=timeout):
        if as_json:
            print_json(event.model_dump(mode="json", exclude_none=True))
            sys.stdout.flush()  # also into a pipe as it comes
        elif event.kind == "reset" and event.attempt != 1:
            out.print(f"\nattempt {event.attempt} begins anew", style="yellow")
        else:
            out.print(
                event.text, end="\n" if event.kind == "end" else "", highlight=False, markup=False, soft_wrap=True
            )


def _show_outcome(job_id: str, outcome: Outcome | None, *, as_json: bool) -> None:
    if outcome is None or outcome.error is not None:
        return
    if as_json:
        print_json(outcome.model_dump(mode="json"))
        return
    out.rule(f"{job_id}  {outcome.ledger.model}  {outcome.ledger.why}", style="dim")
    out.print(outcome.answer or outcome.response, highlight=False, markup=False)


@app.command()
def cancel(job_id: str) -> None:
    """Cancel a job: a waiting one never runs, a running one is stopped in the engine."""
    with closing(JobClient(read_settings().redis.url)) as client:
        cancelled = client.cancel(job_id)
    out.print("cancelled" if cancelled else "it has ended already")
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

    sys.exit(run_demo(list(read_requests(str(jobs), "")), data, out, stay=stay))
