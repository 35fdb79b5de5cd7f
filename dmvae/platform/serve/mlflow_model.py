"""Package a model for MLflow: a pyfunc loaded from code, with the modules that it needs and no pickle."""

import logging
import os
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow

from dmvae.model.predictor import Predictor, Request
from dmvae.platform.serve.model_card import README
from dmvae.platform.serve.shipped_code import ShippedCode


def save(content: Path, target: Path, code: ShippedCode, trust: Collection[str]) -> None:
    """Write an MLflow model.

    Args:
        content: a folder with weights, configuration, `units.json` and the card.
        target: the folder to write; its parent also gets a copy of the code.
        code: to bring along.
        trust: import paths of own code, which the model may import wherever it is loaded.
    """
    predictor = Predictor.load(content, trust)
    copied = code.copy(target.with_name("code"))
    with warnings.catch_warnings(), quiet_mlflow():
        warnings.simplefilter("ignore")  # MLflow finds the values of an answer too loosely typed
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(content)},
            model_config={
                "shapes": {name: list(shape) for name, shape in predictor.shapes.items()},
                "named": predictor.named,
                "trust": list(trust),
            },
            code_paths=[str(path) for path in copied],
            input_example=(
                [_example(predictor)],
                {"operation": "impute", "num_samples": 0, "num_draws": 100, "seed": 0},
            ),
            pip_requirements=code.requirements,
        )
    shutil.copy2(content / README, target / "README.md")


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Show only MLflow's errors, and none of its progress bars unless the environment asks for them."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _example(predictor: Predictor) -> dict[str, Any]:
    """Return a row that has only its first modality, drawn from the model."""
    (drawn,) = predictor.answer([{}], Request(operation="sample"))
    first, spec = next(iter(predictor.units.items()))
    if spec.columns is not None:
        return {first: drawn["values"][first]}
    if spec.classes is not None:
        return {first: [0.0] * len(drawn["values"][first])} if len(spec.shape) == 1 else {}
    counts = first in predictor.counts
    values = _rounded(drawn["values"][first], 255.0 if spec.dtype == "uint8" else None, 0 if counts else 3)
    return {first: values} | ({"size_factor": 1.0} if counts else {})


def _rounded(values: Any, high: float | None, digits: int) -> Any:
    """Return nested values with every number rounded, and clipped to [0, high] if there is a limit."""
    if isinstance(values, dict):
        return {name: _rounded(value, high, digits) for name, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value, high, digits) for value in values]
    return round(values if high is None else min(max(values, 0.0), high), digits)
