"""The only part that imports ray, optuna or mlflow: training, search, evaluation, tracking and serving on a cluster."""

import os

# DDP looks for unused parameters on purpose (see worker.py); torch would warn of its cost in every run
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Ray Train's controller looks at its workers this often; the default of 2 s is what every report would cost.
# Ray reads it when ray.train is imported, so it has to stand before any module of this package imports ray
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
