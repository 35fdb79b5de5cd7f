import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import DigitsSource, NpzSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation import external_shuffle, stream
from dmvae.data.preparation.prepare import prepare
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources import digits as digits_source
from dmvae.data.reading.dataset import Dataset, open_dataset
from tests.data.preparation.test_rows import read_all

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arrays(num: int = 100) -> dict[str, Any]:
    """A little of everything that an npz file may hold; `x` identifies the row."""
    mask = np.ones(num, dtype=bool)
    mask[:3] = False
    x = np.stack((np.arange(num), np.arange(num) * 2.0), axis=1)
    x[5:10] = np.nan
    return {
        "x": x,
        "image": np.full((num, 1, 2, 2), 255, dtype=np.uint8),
        "word": (np.arange(num) % 4).astype(np.int32),
        "mask.image": mask,
        "label": np.arange(num, dtype=np.int32) - 1,
        "id": np.array([f"patient {row}" for row in range(num)]),
    }


def prepared(folder: Path, content: dict[str, Any], told: list[str] | None = None, **settings: Any) -> Dataset:
    np.savez(folder / "source.npz", **content)
    source = NpzSource(path=str(folder / "source.npz"), group=settings.pop("group", None))
    config = PrepareConfig(dataset=str(folder / "data"), source=source, **settings)
    return open_dataset(prepare(config, (told if told is not None else []).append))


def test_an_npz_file_becomes_a_dataset(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, arrays())
    assert {name: split.rows for name, split in dataset.manifest.splits.items()} == {"test": 10, "train": 80, "val": 10}
    assert dataset.verify() == ()
    assert dataset.manifest.input_dims == {"x": (2,), "image": (1, 2, 2), "word": (1,)}
    assert dataset.manifest.modalities["word"].classes == 4
    found = set()
    for name in ("train", "val", "test"):
        split = dataset.split(name)
        batch = split.read(np.arange(len(split)), dtype=torch.float64)
        assert batch.labels is not None
        for index, identity in enumerate(batch.ids if batch.ids is not None else ()):
            row = int(str(identity).removeprefix("patient "))
            found.add(row)
            assert batch.labels[index] == row - 1
            assert batch.data["word"][index, 0] == row % 4
            assert batch.data["x"][index].tolist() == ([0, 0] if 5 <= row < 10 else [row, row * 2.0])
            assert batch.data["image"][index].unique().tolist() == ([0] if row < 3 else [1])
    assert found == set(range(100))


def test_the_same_description_gives_the_same_fingerprint_and_another_seed_another(tmp_path: Path) -> None:
    first = prepared(tmp_path, arrays())
    again = prepared(tmp_path, arrays(), replace=True)
    other = prepared(tmp_path, arrays(), replace=True, seed=1)
    assert first.manifest.fingerprint == again.manifest.fingerprint != other.manifest.fingerprint
    assert first.manifest.origin == again.manifest.origin


def test_rows_are_shuffled(tmp_path: Path) -> None:
    names = prepared(tmp_path, arrays()).split("train").ids().tolist()
    assert names != sorted(names, key=lambda name: int(name.split()[1]))


def test_the_sources_own_splits_are_kept(tmp_path: Path) -> None:
    content = arrays(10) | {"split": np.array(["fit"] * 7 + ["held_out"] * 3)}
    dataset = prepared(tmp_path, content)
    assert sorted(dataset.split("held_out").ids().tolist()) == ["patient 7", "patient 8", "patient 9"]
    with pytest.raises(DatasetError, match="source has splits of its own"):
        prepared(tmp_path, content, replace=True, splits={"train": 1.0})


def test_shares_decide_the_size_of_splits(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, arrays(), splits={"train": 0.55, "val": 0.45})
    assert {name: split.rows for name, split in dataset.manifest.splits.items()} == {"train": 55, "val": 45}


def test_partial_rows_are_kept_refused_or_dropped(tmp_path: Path) -> None:
    content = arrays()
    content["x"][[20, 30], 1] = np.nan
    with pytest.raises(DatasetError, match=r"'x' are missing in 2 rows.*patient [23]0.*'keep'.*'drop'"):
        prepared(tmp_path, content, partial="refuse")
    told: list[str] = []
    dropped = prepared(tmp_path, content, told, partial="drop")
    assert sum(split.observed["x"] for split in dropped.manifest.splits.values()) == 93
    assert dropped.manifest.missing_cells == ()
    assert "x: dropped the modality from 2 rows with missing cells" in told
    kept = prepared(tmp_path, content, told, replace=True)
    assert "x: 2 cells are missing in 2 rows that have others" in told
    assert sum(split.observed["x"] for split in kept.manifest.splits.values()) == 95
    size = content["x"].shape[1]
    assert sum(split.observed_cells["x"] for split in kept.manifest.splits.values()) == 95 * size - 2


def test_the_result_does_not_depend_on_chunks_or_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = arrays()
    content["x"][[20, 30], 1] = np.nan
    settings: dict[str, Any] = {"scaling": {"x": "standardise"}}
    whole = prepared(tmp_path, content, **settings).manifest
    for chunk, held in ((500, 1 << 20), (900, 1000)):
        monkeypatch.setattr(stream, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(external_shuffle, "HELD_BYTES", held)
        cut = prepared(tmp_path, content, replace=True, **settings).manifest
        assert cut.splits == whole.splits
        assert cut.modalities["x"].mean == pytest.approx(whole.modalities["x"].mean, rel=1e-15)


def test_rows_of_a_group_come_into_one_split(tmp_path: Path) -> None:
    group = np.repeat(np.arange(20), 5)
    dataset = prepared(tmp_path, arrays() | {"patient": group}, group="patient")
    splits = {name: {int(key.split()[1]) // 5 for key in dataset.split(name).ids().tolist()} for name in SHARES}
    assert {name: len(found) for name, found in splits.items()} == {"train": 16, "val": 2, "test": 2}
    assert set.union(*splits.values()) == set(range(20))
    assert "patient" not in dataset.manifest.modalities
    with pytest.raises(DatasetError, match=r"Cannot fill splits \['.*only 2 groups, of up to 50 rows"):
        prepared(tmp_path, arrays() | {"patient": np.repeat(["a", "b"], 50)}, replace=True, group="patient")


def test_a_giant_group_leaves_no_split_without_one(tmp_path: Path) -> None:
    patient = np.concatenate((np.zeros(180, dtype=int), np.arange(1, 21)))
    dataset = prepared(tmp_path, {"x": np.zeros((200, 1)), "patient": patient}, group="patient")
    assert {name: split.rows for name, split in dataset.manifest.splits.items()} == {
        "test": 10,
        "train": 180,
        "val": 10,
    }


def test_labels_are_in_every_split_in_the_same_shares(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, -1], [60, 30, 10])
    dataset = prepared(tmp_path, arrays() | {"label": labels}, stratify=True)
    for name, share in SHARES.items():
        found = dataset.split(name).labels()
        assert found is not None
        assert np.bincount(found.numpy() + 1).tolist() == [round(10 * share), round(60 * share), round(30 * share)]


def test_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for held in (1 << 20, 1000):  # no room for shards, and none for what is put aside
        monkeypatch.setattr(external_shuffle, "HELD_BYTES", held)
        np.savez(tmp_path / "source.npz", x=np.zeros((300, 40)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000 if held > 1000 else 1500, hard))
        try:
            with pytest.raises(DatasetError, match="Disk full"):
                prepare(PrepareConfig(dataset=str(tmp_path / "d"), source=NpzSource(path=str(tmp_path / "source.npz"))))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["source.npz"]


def test_rows_with_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    told: list[str] = []
    dataset = prepared(tmp_path, {"x": arrays()["x"]}, told)
    assert sum(split.rows for split in dataset.manifest.splits.values()) == 95
    assert "dropped 5 rows without any modality" in told


def test_shares_hold_of_rare_labels_too(tmp_path: Path) -> None:
    for each, shares in ((1, {"train": 0.5, "val": 0.5}), (3, SHARES)):
        content = {"x": np.zeros((3000, 1)), "label": np.arange(3000) // each}
        dataset = prepared(tmp_path, content, stratify=True, splits=shares, replace=True)
        for name, share in shares.items():
            assert abs(dataset.manifest.splits[name].rows - 3000 * share) < 150


def test_a_source_without_values_or_with_a_split_for_every_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="None of the 10 rows of the npz source has a modality"):
        prepared(tmp_path, {"x": np.full((10, 2), np.nan)})
    with pytest.raises(DatasetError, match=r"Too many splits: .*'s100' in .*source.npz, row 100"):
        prepared(tmp_path, {"x": np.zeros(40_000), "split": np.array([f"s{row}" for row in range(40_000)])})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"x": np.full((100, 2), np.inf)}, {}, "'x' must be finite, but got infinity in .*source.npz, row 0"),
        ({"word": np.full(100, -1)}, {}, "'word' holds integers, which are classes, .*got -1 in .*source.npz, row 0"),
        ({"x": np.full((100, 1), 1.5)}, {"likelihood": {"x": "poisson"}}, "'x' holds counts, .*got 1.5 in .*row 0"),
        (
            {"x": np.ones((100, 1)), "size_factor": np.where(np.arange(100) == 7, np.nan, 1.0)},
            {"likelihood": {"x": "poisson"}},
            "Missing size factor for the counts of modality 'x' in .*source.npz, row 7",
        ),
        ({"id": np.arange(100, dtype=np.uint64) + 2**63}, {}, "array 'id.npy' has 9223372036854775907"),
        (
            {"id": np.arange(100) % 60},
            {},
            r"Duplicate id \d+: .*source.npz, row \d+ and .*source.npz, row \d+\.",
        ),
        ({"split": np.array(["a/b"] * 100)}, {}, "Cannot use the split in .*source.npz, row 0: "),
        (
            {"label": np.full(100, -1)},
            {"stratify": True, "group": "id"},
            "Cannot both stratify and keep groups together",
        ),
        ({}, {"group": "patient"}, "Array 'patient' not found in .*source.group"),
        (
            {"size_factor": np.arange(100.0)},
            {},
            "source.npz: .*positive and finite, but got 0.0 in array 'size_factor', row 0",
        ),
        ({"mask.sound": np.ones(100, dtype=bool)}, {}, r"Unknown modalities \['sound'\] in masks"),
        ({"mask.x": np.full(100, 2)}, {}, "boolean or 0/1"),
        ({"mask.x": np.ones((100, 2), dtype=bool)}, {}, r"'mask.x' must be boolean or 0/1, one for each row"),
        ({"word": np.zeros(99, dtype=int)}, {}, "same number of rows"),
        ({"label": np.full(100, 0.5)}, {}, "Labels must be integers, text, .* got 0.5 in array 'label', row 0"),
        ({"id": np.zeros(100)}, {}, "'id' must hold strings or integers"),
        ({"joint": np.zeros((100, 1))}, {}, "'joint'"),
        ({}, {"scaling": {"y": "standardise"}}, r"Unknown modalities \['y'\]"),
        ({}, {"likelihood": {"y": "normal"}}, r"Unknown modalities \['y'\]"),
        ({}, {"scaling": {"image": "standardise"}}, "only floats can be scaled"),
    ],
)
def test_a_source_that_breaks_a_law_is_refused(
    tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        prepared(tmp_path, arrays() | change, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"source.npz"}


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Source file not found"):
        read_all(NpzSource(path=str(tmp_path / "nowhere.npz")))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DatasetError, match=r"an \.npz file"):
        read_all(NpzSource(path=str(tmp_path / "text.npz")))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(DatasetError, match="Expected named arrays, got a single one"):
        read_all(NpzSource(path=str(tmp_path / "one.npy")))
    np.savez(tmp_path / "labels.npz", label=np.arange(3))
    with pytest.raises(DatasetError, match="No modality among the arrays label"):
        read_all(NpzSource(path=str(tmp_path / "labels.npz")))


@pytest.fixture(scope="module", autouse=True)
def _mnist_read_once() -> Iterator[None]:
    images = digits_source._load_mnist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_source, "_load_mnist", lambda: images)
        yield


@pytest.fixture(scope="module")
def digits() -> Rows:
    return read_all(DigitsSource())


def of_split(rows: Rows, name: str) -> Rows:
    assert rows.splits is not None
    return rows.take(rows.splits == name)


def test_digits_have_the_promised_size(digits: Rows) -> None:
    assert digits.splits is not None
    names, counts = np.unique(digits.splits, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "train": 8000,
        "val": 1000,
        "test": 1000,
        "test_complete": 1000,
    }
    assert {name: values.shape[1:] for name, values in digits.data.items()} == {
        "mnist": (1, 28, 28),
        "optdigits": (1, 8, 8),
    }
    assert digits.data["optdigits"].max() == 255


def test_no_image_is_in_two_splits_of_digits(digits: Rows) -> None:
    for image in (lambda rows: rows.ids // 10_000, lambda rows: rows.ids % 10_000):
        seen = [set(image(of_split(digits, name)).tolist()) for name in ("train", "val", "test")]
        assert len(set.union(*seen)) == sum(map(len, seen))


def test_pairs_of_digits_occur_once_and_agree_in_label(digits: Rows) -> None:
    from sklearn.datasets import load_digits

    for name in ("train", "val", "test"):
        rows = of_split(digits, name)
        assert len(np.unique(rows.ids)) == len(rows)
    optdigits = load_digits()
    assert digits.labels is not None
    assert np.array_equal(optdigits.target[digits.ids % 10_000], digits.labels)
    assert np.array_equal(
        digits.data["optdigits"][:, 0], np.rint(optdigits.images * 255 / 16).astype(np.uint8)[digits.ids % 10_000]
    )
    # mnist's images come sorted by label, 500 of each
    assert np.array_equal(digits.ids // 10_000 // 500, digits.labels)


def test_the_chosen_share_of_digits_is_removed_and_no_row_is_empty(digits: Rows) -> None:
    for name in ("train", "val", "test"):
        present = np.stack(list(of_split(digits, name).present.values()), axis=1)
        assert present.any(axis=1).all()
        assert present.mean(axis=0) == pytest.approx([0.625, 0.625], abs=0.05)
        assert present.all(axis=1).mean() == pytest.approx(0.25, abs=0.05)


def test_the_complete_test_digits_are_those_of_test_with_nothing_removed(digits: Rows) -> None:
    test, complete = of_split(digits, "test"), of_split(digits, "test_complete")
    assert all(mask.all() for mask in complete.present.values())
    assert np.array_equal(test.ids, complete.ids)
    assert all(np.array_equal(test.data[name], complete.data[name]) for name in test.data)


def test_digits_depend_on_the_seed_alone(digits: Rows) -> None:
    again = read_all(DigitsSource())
    assert np.array_equal(again.ids, digits.ids)
    assert all(np.array_equal(again.present[name], mask) for name, mask in digits.present.items())
    other = read_all(DigitsSource(missing={"mnist": 1.0}, pairs_per_image=1), seed=1)
    assert not np.array_equal(np.sort(other.ids)[:100], np.sort(digits.ids)[:100])
    assert of_split(other, "train").present["optdigits"].all()
    assert not of_split(other, "train").present["mnist"].any()


def test_the_demo_is_prepared(tmp_path: Path) -> None:
    config = PrepareConfig(dataset=str(tmp_path / "digits"), source=DigitsSource(pairs_per_image=1))
    told: list[str] = []
    dataset = open_dataset(prepare(config, told.append))
    assert dataset.verify() == ("500 ids are in both test and test_complete",)
    test, complete = dataset.split("test"), dataset.split("test_complete")
    assert test.read(np.arange(9)).masks is not None
    assert complete.read(np.arange(9)).masks is None
    assert any(line.startswith("train: 4000 rows, mnist in 6") for line in told)
