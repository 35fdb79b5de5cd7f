"""Small incomplete data of every form that `dmvae.fit` takes."""

from typing import Any

import numpy as np
import pandas as pd


def frames(rows: int = 120, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Return two modalities that share a cause; the first ten rows lack the left one, the last ten the right one."""
    rng = np.random.default_rng(seed)
    cause = rng.normal(size=(rows, 2))
    index = [f"row{number}" for number in range(rows)]
    left = 100 + 5 * (cause @ rng.normal(size=(2, 4)) + 0.3 * rng.normal(size=(rows, 4)))
    right = cause @ rng.normal(size=(2, 3)) + 0.3 * rng.normal(size=(rows, 3))
    return {
        "left": pd.DataFrame(left, index=index, columns=list("abcd")).iloc[10:],
        "right": pd.DataFrame(right, index=index, columns=list("xyz")).iloc[:-10],
    }


def arrays(rows: int = 120, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return the same rows as arrays, with NaN where a row lacks a modality."""
    tables = frames(rows, seed)
    index = [f"row{number}" for number in range(rows)]
    return {name: table.reindex(index).to_numpy().copy() for name, table in tables.items()}


NETWORK = {"name": "skip_mlp", "hidden_dims": [8], "dropout": 0.0}
SHORT: dict[str, Any] = {
    "model": {"latent_dim": 2, "architectures": {"left": NETWORK, "right": NETWORK}},
    "training": {"epochs": 3, "batch_size": 16, "precision": "float64"},
    "progress": False,
}
"""Settings of a run of a second."""
