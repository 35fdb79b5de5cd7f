"""A small dataset of images, padded text and counts, and a run on it with the networks of `tests.example_package`."""

from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.preparation.prepare import prepare
from tests.runs import make_config

PACKAGE = "tests.example_package"


def make_rows(folder: Path, rows: int = 120) -> Path:
    """Write a dataset of 64x64 images, padded text of 3 to 5 words of 4 classes, and six counts; a third is missing."""
    rng = np.random.default_rng(0)
    cause = rng.normal(size=rows)
    ramp = np.linspace(-1, 1, 64)
    words = np.clip(np.round(1.5 + cause[:, None] + rng.normal(size=(rows, 5))), 0, 3).astype(np.int64)
    words[np.arange(5) >= rng.integers(3, 6, size=rows)[:, None]] = 4
    arrays = {
        "image": (cause[:, None, None, None] * ramp + 0.1 * rng.normal(size=(rows, 1, 64, 64))).astype(np.float32),
        "text": words,
        "table": rng.poisson(np.exp(1 + 0.5 * cause)[:, None], size=(rows, 6)).astype(np.float32),
    }
    masks = {f"mask.{name}": rng.random(rows) > 1 / 3 for name in arrays}
    masks["mask.table"] |= ~(masks["mask.image"] | masks["mask.text"])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "rows.npz", id=np.arange(rows), **arrays, **masks)
    source = {"kind": "npz", "path": str(folder / "rows.npz")}
    tree = {"dataset": str(folder / "data"), "source": source, "likelihood": {"table": "poisson"}}
    return Path(prepare(PrepareConfig.model_validate(tree), progress=lambda line: None))


def make_example(folder: Path, dataset: Path, name: str = "run", **changes: Any) -> TrainConfig:
    """Describe a run that names its networks in every way there is."""
    model = {
        "architectures": {
            "image": {"name": f"{PACKAGE}.nets:resnet", "params": {"width": 4}},
            "text": {
                "encoder": f"{PACKAGE}.nets:TextEncoder", "decoder": f"{PACKAGE}.nets:TextDecoder",
                "params": {"width": 4},
            },
            "table": {"name": f"{PACKAGE}.nets:table", "params": {"width": 4}},
        },
        "decoders_dist": {"table": f"{PACKAGE}.distributions:ZeroInflatedPoisson"},
        "decoder_dist_params": {"text": {"pad": 4}, "table": {"floor": 1e-4}},
    }  # fmt: skip
    tree: dict[str, Any] = {"training": {"precision": "float32"}, **changes}
    config = make_config(folder, dataset, name, **tree).model_dump(mode="json", exclude_unset=True)
    return TrainConfig.model_validate({**config, "model": {**config["model"], **model}})
