"""Answer rows as an MLflow model. This file is copied into each registered model and run from there.

It needs the package's model code and MLflow, but not Ray.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlflow.models import ModelConfig, set_model
from mlflow.pyfunc.model import PythonModel


def _prefer_installed() -> None:
    """Let the package answer where it is installed; elsewhere, the part of it that this model carries.

    MLflow puts the carried part first on the path. There it would shadow the package for the rest of the process, in
    which `dmvae.load` would then fail.
    """
    carried = Path(__file__).resolve().with_name("code")
    ours = [entry for entry in sys.path if Path(entry).resolve() == carried]
    others = [entry for entry in sys.path if entry not in ours]
    sys.path[:] = others
    if find_spec("dmvae") is None:
        sys.path[:] = ours + others
    else:
        import_module("dmvae")
        sys.path[:] = others + ours  # own code that the model carries


_prefer_installed()
from dmvae.model.predictor import Predictor, Request, row_type  # noqa: E402

_config: Any = ModelConfig()  # MLflow knows it only while it loads this file
Row = row_type(_config.get("shapes"), _config.get("named"))
TRUSTED = _config.get("trust")


class RegisteredModel(PythonModel):
    """Answers rows; `params` are the fields of `Request`: operation, num_samples, num_draws, seed."""

    def load_context(self, context: Any) -> None:
        """Load the model with the specs of its modalities."""
        # who loads this file runs its code, so what its registration trusted needs no consent of its own
        self.predictor = Predictor.load(Path(context.artifacts["model"]), TRUSTED)

    def predict(  # type: ignore[override]  # MLflow reads the types of rows and params from this signature
        self,
        model_input: list[Row],  # type: ignore[valid-type]
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer every row; each answer says which modalities were observed."""
        return self.predictor.answer(model_input, Request.model_validate(params or {}))


set_model(RegisteredModel())
