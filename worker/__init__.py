"""Turns queued jobs into stored outcomes on whatever GPUs are here."""

import os

# SIGTERM begins Celery's soft shutdown: running jobs get `worker_soft_shutdown_timeout`, then they are told to
# stop and go back to their queue. Billiard reads this when anything of Celery's worker is first imported, so it
# stands before every other import of ours.
os.environ.setdefault("REMAP_SIGTERM", "SIGQUIT")
