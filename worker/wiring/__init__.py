"""
Builds the processes from the settings: the one place that picks products.
"""

from worker.wiring.engines import build_engines
from worker.wiring.here import Survey, survey
from worker.wiring.router_process import run_router
from worker.wiring.worker_process import run_worker

__all__ = ["Survey", "build_engines", "run_router", "run_worker", "survey"]
