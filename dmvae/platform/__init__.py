"""Everything that uses Ray, Optuna or MLflow: training, search, evaluation, tracking and serving.

No other folder imports these libraries. Only the command line, `dmvae.load` and the jobs import this one.
"""

import os

# DDP searches for unused parameters on purpose (see train/collectives.py); torch would warn of the cost in every run
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# how often Ray Train's controller polls its workers: a report takes that long, and the default is ten times as long.
# Ray reads it on import, so it must be set before any module of this package imports ray
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Ray Serve kills a proxy that is not ready after 5 s, which a busy node takes; Ray reads it where the processes start
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
