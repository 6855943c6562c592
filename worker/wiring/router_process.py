"""
The router process, built from the settings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from common import keys
from common.celery_app import create_app
from common.fleet import read_alive, read_offers
from common.may_reach import Allowed
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import OfferedModel
from common.settings import Settings
from worker.alive import TOUCH_EVERY_S, alive_file
from worker.app import ConsumerProcess
from worker.delivery.rabbit import RabbitDoor
from worker.delivery.redis_steps import RedisSteps
from worker.delivery.redis_twins import RedisTwins
from worker.jobs.submit_lane import SubmitLane
from worker.routing.gate import Gate
from worker.routing.merge import merge_offers
from worker.routing.router import Router
from worker.routing.rules_file import load_rules
from worker.scheduling.celery_consumer import every
from worker.tasks import add_submit_task
from worker.webhooks.sender import WebhookSender
from worker.wiring.parts import lease_of, open_redis, owner_of, process_name, refuse, watch_the_waiting

_ROUTER_THREADS = 4
_ROUTER_TAKES = 64  # jobs in hand: its lane routes them together


def run_router(settings: Settings) -> int:
    """Run the router until it is told to stop; returns the exit code."""
    rules = load_rules(settings.routing.rules_file)
    name = process_name("router", settings)
    owner = owner_of(name)
    client, patient = open_redis(settings)
    app = create_app(settings, owner=owner)
    app.conf.worker_prefetch_multiplier = _ROUTER_TAKES // _ROUTER_THREADS
    store = RedisJobStore(patient, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes)
    gate = Gate(limits=settings.limit, egress=settings.egress, webhooks=settings.webhook.secret is not None)
    router = Router(store=store, offers=lambda: _offered(client), rules=rules, gate=gate)
    add_submit_task(app, router, store, RedisTwins(patient, owner=owner, ttl_s=settings.job.result_ttl_s))
    steps = RedisSteps(
        patient, app, owner=owner, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes
    )
    process = ConsumerProcess(
        app=app,
        name=name,
        lease=lease_of(app, settings, owner),
        concurrency=_ROUTER_THREADS,
        lanes={keys.SUBMIT_TASK: SubmitLane(router, steps).lane},
        refuse=lambda job_id, error: refuse(app, store, job_id, error),
        grace_s=settings.worker.soft_shutdown_s,
        own_queues=[keys.SUBMIT_QUEUE],
        steps=[every(TOUCH_EVERY_S, alive_file("router").touch)],
    )
    with _webhooks(settings), _rabbit(settings), watch_the_waiting(settings, store):
        return process.run()


def _webhooks(settings: Settings) -> AbstractContextManager[object]:
    """What sends webhooks; nothing without a secret to sign them with."""
    if settings.webhook.secret is None:
        return nullcontext()
    return WebhookSender(settings.redis.url, settings.webhook, Allowed.parse(settings.egress.allow))


def _rabbit(settings: Settings) -> AbstractContextManager[object]:
    """What brings the jobs from RabbitMQ, where there is one."""
    if settings.broker.url is None:
        return nullcontext()
    return RabbitDoor(settings.broker.url, create_app(settings))


def _offered(client: RedisClient) -> tuple[OfferedModel, ...]:
    offers = read_offers(client)
    return merge_offers(offers, alive=read_alive(client, (offer.worker for offer in offers)))
