"""The name under which models that were registered before November 2026 import the predictor."""

from dmvae.model.predictor import Predictor as Served
from dmvae.model.predictor import Request, row_type

__all__ = ["Request", "Served", "row_type"]
