"""The registered model, as MLflow loads it: this file is copied into the model and run from there.

It needs the package's core and MLflow, nothing of Ray.
"""

from pathlib import Path
from typing import Any

from mlflow.models import ModelConfig, set_model
from mlflow.pyfunc.model import PythonModel

from dmvae.model.predictor import Predictor, Request, row_type

Row = row_type(ModelConfig().get("shapes"))  # type: ignore[no-untyped-call]


class RegisteredModel(PythonModel):
    """Answers rows; `params` is a `Request`: operation, num_samples, num_draws, seed."""

    def load_context(self, context: Any) -> None:
        """Read the model and its units."""
        self.served = Predictor.load(Path(context.artifacts["model"]))

    def predict(  # type: ignore[override]  # MLflow hands over what it finds in this signature
        self,
        model_input: list[Row],  # type: ignore[valid-type]
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer every row; each answer says which modalities were observed."""
        return self.served.answer(model_input, Request.model_validate(params or {}))


set_model(RegisteredModel())
