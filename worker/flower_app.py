"""
The app that Flower looks through: `celery -A worker.flower_app flower`.
"""

from common.celery_app import create_app
from common.settings import Settings

app = create_app(Settings.from_env())
