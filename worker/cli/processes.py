"""
`shiftworker worker`, `router`, `up`, `health`: the processes, and whether they live.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.redis_client import without_password
from worker.alive import is_alive
from worker.cli.console import out, read_settings, wiring
from worker.embedded_redis import EmbeddedRedis, free_port, given_url, usual_or_free_port
from worker.programs import programs
from worker.supervisor import Supervisor

app = typer.Typer()


@app.command()
def worker() -> None:
    """Run a worker: it owns this machine's cards, its engines, and the model queues it can serve."""
    sys.exit(wiring().run_worker(read_settings()))


@app.command()
def router() -> None:
    """Run the router: it validates, scores and routes jobs. It needs no GPU."""
    sys.exit(wiring().run_router(read_settings()))


@app.command()
def up(
    data: Annotated[Path, typer.Option(help="Where the embedded Redis keeps its file.")] = Path(".shiftworker"),
) -> None:
    """Run everything on this box: Redis (unless REDIS_URL names one), router, worker and Flower."""
    settings = read_settings()
    redis = None if given_url() else EmbeddedRedis(data / "redis", port=usual_or_free_port())
    url = redis.url if redis else settings.redis.url
    port = settings.flower.port or free_port()
    supervisor = Supervisor(programs(settings, redis_url=url, flower_port=port))
    supervisor.ask_to_stop_on_signals()
    try:
        if redis is not None:
            redis.start()
        supervisor.start()
        out.print(f"Redis   {without_password(url)}\nFlower  http://127.0.0.1:{port}\nCtrl-C stops everything.")
        supervisor.run()
    finally:
        supervisor.stop()
        if redis is not None:
            redis.stop()


@app.command()
def health(role: Annotated[str, typer.Argument(help="worker or router")]) -> None:
    """Exit 0 if the process of this role on this machine turns its loop; for container health checks."""
    sys.exit(0 if is_alive(role) else 1)
