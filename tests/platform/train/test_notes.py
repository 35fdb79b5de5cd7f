"""What a user is told of a run before it starts."""

from pathlib import Path

import numpy as np
import pytest

from dmvae.config.data import PrepareConfig
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.platform.train.notes import notes
from dmvae.training.settings import resolve
from tests.runs import make_config


def lines(folder: Path, patterns: list[str], dropout: float = 0.0) -> list[str]:
    """Return the notes of a run on rows that have the modalities whose letters are in their pattern."""
    found = np.array(patterns * 8)
    names = {"r": "rna", "p": "prot", "a": "atac"}
    splits = np.where(np.arange(len(found)) < len(found) // 2, "train", "val")
    splits[-len(patterns) :] = "test"
    arrays = {name: np.random.default_rng(0).normal(size=(len(found), 2)).astype(np.float32) for name in names.values()}
    masks = {f"mask.{name}": np.array([letter in pattern for pattern in found]) for letter, name in names.items()}
    np.savez(folder / "rows.npz", id=np.arange(len(found)), split=splits, **arrays, **masks)
    tree = {"dataset": str(folder / "data"), "source": {"kind": "npz", "path": str(folder / "rows.npz")}}
    dataset = open_dataset(prepare(PrepareConfig.model_validate(tree), progress=lambda line: None))
    architectures = {name: {"dropout": dropout} for name in names.values()}
    config = resolve(make_config(folder, dataset.where, model={"architectures": architectures}), dataset)
    return list(notes(config, dataset, "CPU"))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["rpa", "r"], []),
        (["rp", "ra", "pa"], []),
        (["rp", "pa"], ["note: No row of split 'train' has both rna and atac: only other modalities tie them"]),
        (
            ["rp", "a"],
            ["warning: Nothing in this data ties rna, prot to atac: no row of split 'train' has both, so the model "
             "cannot learn to predict one from the other"],
        ),
        (
            ["r", "p", "a"],
            ["warning: Nothing in this data ties rna to prot to atac: no row of split 'train' has both, so the model "
             "cannot learn to predict one from the other"],
        ),
    ],
)  # fmt: skip
def test_modalities_that_no_row_has_together_are_named(
    patterns: list[str], expected: list[str], tmp_path: Path
) -> None:
    assert lines(tmp_path, patterns) == expected


def test_dropout_is_said_to_depend_on_the_workers(tmp_path: Path) -> None:
    assert lines(tmp_path, ["rpa"], dropout=0.1) == ["note: With dropout, the result depends on the number of workers"]
