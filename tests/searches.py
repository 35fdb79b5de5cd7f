"""Small searches over the small runs of `tests.runs`."""

from pathlib import Path
from typing import Any

from dmvae.config.search import SearchConfig
from tests.runs import make_config


def make_search(folder: Path, dataset: Path, name: str = "study", **changes: Any) -> SearchConfig:
    """Describe a search of four short trials; `base` holds changes of the base configuration, by section."""
    base = make_config(folder, dataset, "base", **changes.pop("base", {}))
    tree: dict[str, Any] = {
        "name": name,
        "base": base.model_dump(mode="json", exclude_unset=True),
        "runs_dir": str(folder / "runs"),
        "trials": 4,
        "space": {
            "model.latent_dim": {"low": 1, "high": 6},
            "optim.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
        },
        "objectives": ["imputation"],
        "scheduler": "none",
        "judged_rows": 200,
        "num_draws": 60,
        "startup_trials": 2,
        "retrain": {"how": "none"},
    }
    return SearchConfig.model_validate(tree | changes)
