"""
The app that Flower looks through: `celery -A worker.flower_app flower`.
"""

from common.celery_app import create_app
from common.settings import Settings

app = create_app(Settings.from_env())
# Flower counts queues only over a transport that it knows by name; it takes no jobs, so the stock one loses none.
app.conf.broker_transport = None
