"""
The Celery app that every process of ours builds: one set of delivery settings, JSON only.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Queue

from common import keys
from common.settings import Settings


def create_app(settings: Settings, *, owner: str = "nobody") -> Celery:
    """
    Build an app for the Redis of *settings*.

    *owner* names one start of one consuming process; its deliveries are leased under this name.
    """
    url = with_tls_checked(settings.redis.url)
    app = Celery("shiftworker", broker=url, backend=f"common.result_backend:ResultBackend+{url}", set_as_current=False)
    app.conf.update(delivery_settings(settings, owner=owner))
    return app


def create_producer_app(settings: Settings) -> Celery:
    """Build an app that sends jobs the way producers do: to RabbitMQ where *settings* name one, else to Redis."""
    app = create_app(settings)
    if settings.broker.url is not None:
        # RabbitMQ says that it has each message; without that a send into a dying connection would seem to succeed.
        app.conf.update(
            broker_url=settings.broker.url, broker_transport=None, broker_transport_options={"confirm_publish": True}
        )
    return app


def with_tls_checked(url: str) -> str:
    """
    Say in a rediss:// URL that the server's certificate is checked, unless it says something of its own.

    Without it kombu 5.7.0 connects in the clear, and Celery's backend refuses the URL.
    """
    if not url.startswith("rediss://") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"


def delivery_settings(settings: Settings, *, owner: str) -> dict[str, Any]:
    """Celery's settings for a queue that neither loses nor repeats jobs; the reasons stand beside each."""
    return {
        # The pop that loses nothing; the URL stays redis:// for Flower.
        "broker_transport": "common.transport:Transport",
        "broker_transport_options": {
            "owner": owner,
            "max_wait_s": settings.switch.max_wait_s,
            "max_waits": list(settings.switch.max_waits),  # as texts: Celery shows these options as JSON
            "priority_steps": list(keys.PRIORITY_STEPS),
            "socket_timeout": 30,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": 10,
        },
        # A message is acknowledged when its outcome is stored, whatever the outcome is.
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_reject_on_worker_lost": True,
        # What waits stays in Redis, where it can be counted, ordered and given to another worker.
        "worker_prefetch_multiplier": 1,
        # How many are in hand follows the engines (worker/scheduling/admit.py), also after a reconnect.
        "worker_enable_prefetch_count_reduction": False,
        # Redis may go away and come back, or be full (then it refuses commands); nothing ends because of it.
        "broker_channel_error_retry": True,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "result_backend_always_retry": True,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # JSON only: nothing that comes over the wire is ever executed.
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "result_expires": settings.job.result_ttl_s,
        # What Flower shows.
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "task_track_started": True,
        # Flower names each queue by these; model queues come and go at run time.
        "task_default_queue": keys.SUBMIT_QUEUE,
        "task_queues": [Queue(keys.SUBMIT_QUEUE, routing_key=keys.SUBMIT_QUEUE)],
        "task_create_missing_queues": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "timezone": "UTC",
    }
