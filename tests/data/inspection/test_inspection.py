"""What `jobs.inspect` says of data whose faults are known, and that what it proposes can be trained."""

import re
import tomllib
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmvae.cli import run_verb
from dmvae.config.inspect import InspectConfig
from dmvae.config.training import TrainConfig
from dmvae.data.format.manifest import save_manifest
from dmvae.data.inspection.duplicates import RowHash, repeated
from dmvae.data.inspection.findings import list_findings
from dmvae.data.inspection.profile import DatasetProfile, profile_dataset
from dmvae.data.inspection.suggestions import suggest_likelihoods
from dmvae.data.inspection.value_stats import ValueStats
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from dmvae.platform.evaluate.checks import check_data
from dmvae.report.dataset_overview import Inspection, inspect
from dmvae.training.settings import resolve
from tests.data.preparation.test_build_manifest import tensors, write_shard
from tests.data.preparation.test_rows import make_rows
from tests.runs import train_here

Parts = dict[str, Rows]
Change = Callable[[Parts], Parts]


def quiet(text: str) -> None:
    pass


def made(num: int, seed: int, **changes: Any) -> Rows:
    """Rows with a vector of measurements, `x`, and one of counts, `y`, a third of each missing; ids differ by seed."""
    rng = np.random.default_rng(seed)
    lost = rng.integers(0, 3, num)
    rows = {
        "ids": np.arange(num) + 10_000 * seed,
        "data": {
            "x": rng.normal(size=(num, 6)).astype(np.float32),
            "y": 1 + rng.poisson(4.0, (num, 20)).astype(np.float32),
        },
        "present": {"x": lost != 0, "y": lost != 1},
        "labels": np.arange(num) % 3,
    }
    return Rows(**(rows | changes))


def clean() -> Parts:
    return {"train": made(300, 1), "val": made(80, 2), "test": made(60, 3)}


def with_values(rows: Rows, name: str, change: Callable[[np.ndarray[Any, Any]], None]) -> Rows:
    values = rows.data[name].copy()
    change(values)
    return replace(rows, data={**rows.data, name: values})


def put(index: Any, value: float) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(values: np.ndarray[Any, Any]) -> None:
        values[index] = value

    return change


def join(*parts: Rows) -> Rows:
    return Rows(
        ids=np.concatenate([part.ids for part in parts]),
        data={name: np.concatenate([part.data[name] for part in parts]) for name in parts[0].data},
        present={name: np.concatenate([part.present[name] for part in parts]) for name in parts[0].data},
        labels=np.concatenate([part.labels for part in parts if part.labels is not None]),
    )


def profile_of(folder: Path, parts: Parts, **settings: Any) -> DatasetProfile:
    return profile_dataset(open_dataset(write_dataset(folder / "data", parts, **settings)), quiet)


def told(profile: DatasetProfile) -> list[str]:
    return [f"{finding.level} {finding.text}" for finding in list_findings(profile)]


def test_sums_of_values_are_those_of_all_rows_at_once() -> None:
    rng = np.random.default_rng(0)
    rows = rng.laplace(1e4, [1.0, 5.0, 1e-3], size=(5000, 3))
    rows[:, 2] = 7
    parts = [ValueStats(rows[:10])]
    parts.append(ValueStats(parts[0]))
    for number, block in enumerate(np.array_split(rows, 9)):
        parts[number % 2].add(block, np.arange(len(block)))
    whole = ValueStats.merge(parts)
    assert whole.rows == 5000
    np.testing.assert_allclose(whole.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.std, rows.std(0), rtol=1e-9)
    centred = rows[:, :2] - rows[:, :2].mean(0)
    np.testing.assert_allclose(whole.kurtosis[:2], (centred**4).mean(0) / (centred**2).mean(0) ** 2, rtol=1e-8)
    assert whole.is_constant.tolist() == [False, False, True]
    assert np.isnan(whole.kurtosis[2])
    assert whole.overall == pytest.approx((rows.mean(), rows.std()), rel=1e-9)
    assert (whole.low == rows.min(0)).all()
    assert (whole.high == rows.max(0)).all()


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float64", "int64"])
def test_rows_have_one_hash_if_and_only_if_they_are_the_same(dtype: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 9, (4000, 3)).astype(dtype)
    kinds, where = np.unique(rows, axis=0, return_inverse=True)
    hashes = RowHash(rows[0].nbytes, 5)(rows)
    assert len(np.unique(hashes)) == len(kinds) == len({(h, k) for h, k in zip(hashes, where.ravel(), strict=True)})
    assert repeated(hashes).sum() == len(rows) - len(kinds)


def test_every_row_is_counted_once_by_pattern_label_and_split(tmp_path: Path) -> None:
    parts = {"train": make_rows(500, string_ids=True), "val": make_rows(90, seed=1, string_ids=True)}
    profile = profile_of(tmp_path, parts, record_batch_rows=64, shard_bytes=9000)
    assert len(open_dataset(tmp_path / "data").manifest.splits["train"].shards) > 1
    for name, rows in parts.items():
        found = profile.splits[name]
        kinds, counts = np.unique(np.stack([*rows.present.values()], axis=1), axis=0, return_counts=True)
        assert found.patterns.counts == dict(zip(map(tuple, kinds.tolist()), counts.tolist(), strict=True))
        assert rows.labels is not None
        assert found.labels.counts == {label: (rows.labels == label).sum() for label in range(3)}
        for modality, values in rows.data.items():
            observed = values[rows.present[modality]].reshape(rows.present[modality].sum(), -1)
            assert found.values[modality].rows == len(observed)
            assert found.values[modality].zeros == (observed == 0).sum()
            np.testing.assert_allclose(found.values[modality].mean, observed.astype(float).mean(0), rtol=1e-9)
        assert profile.id_of(name, 77) == rows.ids[77]


def test_clean_data_has_no_finding(tmp_path: Path) -> None:
    assert told(profile_of(tmp_path, clean())) == []


FAULTS: list[tuple[str, Change, list[str]]] = [
    (
        "ids twice",
        lambda p: p | {"val": replace(p["val"], ids=np.where(p["val"].ids == 20_007, 20_003, p["val"].ids))},
        ["error val: 1 rows repeat the id of an earlier row, the first with id 20003"],
    ),
    (
        "rows that are in train, too",
        lambda p: p | {"test": join(p["test"], p["train"].take(slice(7, 17)))},
        ["error Leakage: 10 of 70 rows of test also occur, with the same id, in train, the first with id 10007"],
    ),
    (
        "copies under other ids",
        lambda p: p | {"test": join(p["test"], replace(p["train"].take(slice(7, 17)), ids=np.arange(10)))},
        ["error Leakage: 10 of 70 rows of test also occur, with another id, in train, the first with id 0"],
    ),
    (
        "one modality's values again",
        lambda p: p
        | {
            "test": join(
                p["test"],
                replace(
                    made(10, 5),
                    data={"x": p["train"].data["x"][p["train"].present["x"]][:10], "y": made(10, 5).data["y"]},
                    present={"x": np.ones(10, bool), "y": np.ones(10, bool)},
                ),
            )
        },
        ["warning x: 10 of", "rows of test have the same values as rows of train with another id"],
    ),
    (
        "ids that start again",
        lambda p: p | {"test": replace(p["test"], ids=p["train"].ids[:60])},
        ["warning all ids of test also occur in train. If these are different rows, give them new ids"],
    ),
    (
        "copies in one split",
        lambda p: p | {"train": join(p["train"], replace(p["train"].take(slice(4, 5)), ids=np.array([5])))},
        ["note train: 1 rows duplicate an earlier row, the first with id 5."],
    ),
    (
        "an outlier",
        lambda p: p | {"val": with_values(p["val"], "x", put((p["val"].present["x"].argmax(), 2), 1e6))},
        [
            "warning x: 1 of 6 features have outliers", "The furthest is 1e+06", "element 2 of id 2000", "in val",
            "warning x: not scaled", "warning x: the splits differ",
        ],
    ),
    (
        "a constant feature",
        lambda p: {name: with_values(rows, "x", put((slice(None), 4), 0.5)) for name, rows in p.items()},
        ["warning x: 1 of 6 features are constant"],
    ),
    (
        "rows of zeros",
        lambda p: p | {"train": with_values(p["train"], "x", put(np.flatnonzero(p["train"].present["x"])[:4], 0))},
        ["warning x: 4 observed rows are all zero. If that means missing, set them to null.", "note train: "],
    ),
    (
        "another unit",
        lambda p: p | {"val": with_values(p["val"], "x", lambda x: np.multiply(x, 9, out=x))},
        ["warning x: the splits differ", "in val, "],
    ),
    (
        "values that are far from 1",
        lambda p: {name: with_values(rows, "x", lambda x: np.add(x, 500, out=x)) for name, rows in p.items()},
        ["warning x: not scaled", "scaling.x = 'standardise'"],
    ),
    (
        "modalities that never meet",
        lambda p: p
        | {"train": replace(p["train"], present=p["train"].present | {"y": ~p["train"].present["x"]})},
        ["warning 1 pairs of modalities are never observed together in train: x and y", "note train: no row has all"],
    ),
    (
        "a label that train has not",
        lambda p: p | {"test": replace(p["test"], labels=np.full(60, 7))},
        ["warning test: 1 labels never occur in train: 7."],
    ),
    (
        "a modality that train has not",
        lambda p: p | {"train": replace(p["train"], present={"x": np.zeros(300, bool), "y": np.ones(300, bool)})},
        ["error x: no row of train has this modality", "note train: no row has all modalities"],
    ),
    ("no rows to choose by", lambda p: {"train": p["train"]}, ["warning Only 'train' has rows"]),
    ("no train", lambda p: {"a": p["val"], "b": p["train"]}, ["warning There is no split 'train'; the largest split"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found_and_nothing_else(change: Change, words: list[str], tmp_path: Path) -> None:
    found = told(profile_of(tmp_path, change(clean())))
    for word in words:
        assert any(word in text for text in found), found
    assert len(found) == sum(word.startswith(("error ", "warning ", "note ")) for word in words), found


def test_integers_that_can_hardly_be_classes_are_told(tmp_path: Path) -> None:
    numbers = 10**12 * np.arange(50)[:, None]
    rows = Rows(np.arange(50), {"number": numbers}, {"number": np.ones(50, bool)})
    found = told(profile_of(tmp_path, {"train": rows.take(slice(0, 40)), "val": rows.take(slice(40, 50))}))
    assert any(
        "warning number: integers are classes, and this makes 49,000,000,000,001 classes." in text for text in found
    )


def test_what_shards_of_strangers_hold_is_told_where_it_breaks_a_law(tmp_path: Path) -> None:
    """The manifest is of sound values; the file was altered afterwards, so only a look at the values tells."""
    values = np.arange(24, dtype=np.float64).reshape(12, 2) + 0.5
    columns = {"id": list(range(12)), "x": tensors(values), "c": tensors(np.full((12, 1), 77)), "label": [5] * 12}
    write_shard(tmp_path / "train/a.arrow", columns)
    save_manifest(build_manifest(tmp_path), tmp_path)
    shard = tmp_path / "train/a.arrow"
    content = shard.read_bytes().replace(np.float64(10.5).tobytes(), np.float64(np.nan).tobytes())
    first = content.index(np.int64(77).tobytes())
    content = content[:first] + np.int64(78).tobytes() + content[first + 8 :]
    first = content.index(np.int64(5).tobytes() * 2)
    shard.write_bytes(content[: first + 8] + np.int64(-5).tobytes() + content[first + 16 :])
    found = told(profile_dataset(open_dataset(tmp_path), quiet))
    assert "error x: 1 observed rows of train have NaN or infinity, the first with id 5" in " ".join(found)
    assert "error c: classes must be between 0 and 77, but got 78 in train, id 0" in " ".join(found)
    assert "error train: labels must be 0 or more, or null, but got -5." in " ".join(found)


def test_likelihoods_go_with_the_values(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {
        "picture": rng.integers(0, 256, (400, 1, 28, 28), dtype=np.uint8),
        "mask": (255 * rng.integers(0, 2, (400, 30))).astype(np.uint8),
        "answer": rng.integers(0, 2, (400, 9)).astype(np.float32),
        "share": rng.random((400, 4)),
        "tissue": rng.integers(0, 4, (400, 1)),
        "count": rng.poisson(3.0, (400, 20)).astype(np.float32),
        "burst": rng.negative_binomial(1, 0.2, (400, 20)).astype(np.float32),
        "bell": rng.normal(size=(400, 5)),
        "tail": rng.standard_t(2.5, size=(400, 20)),
        "hint": rng.normal(size=(400, 5)),
        "logged": rng.lognormal(3, 2, size=(400, 5)),
    }
    rows = Rows(np.arange(400), data, {name: np.ones(400, bool) for name in data})
    parts = {"train": rows.take(slice(0, 300)), "val": rows.take(slice(300, 400))}
    profile = profile_of(tmp_path, parts, likelihood={"hint": "laplace"}, scaling={"logged": "log1p"})
    found = suggest_likelihoods(profile)
    assert {name: fit.likelihood for name, fit in found.items()} == {
        "picture": "normal", "mask": "bernoulli", "answer": "bernoulli", "share": "normal", "tissue": "categorical",
        "count": "poisson", "burst": "negative_binomial", "bell": "normal", "tail": "laplace", "hint": "laplace",
        "logged": "normal",
    }  # fmt: skip
    assert "grey" in found["picture"].reason
    assert "counts" in found["count"].reason
    assert "kurtosis" in found["tail"].reason
    result = inspect(InspectConfig(dataset=str(tmp_path / "data")), quiet)
    assert result.run is not None
    run = TrainConfig.model_validate(tomllib.loads(result.run))
    assert run.model.architectures["picture"].name == "residual"
    assert {run.model.architectures[name].name for name in data if name != "picture"} == {"skip_mlp"}
    assert (run.model.sources, run.model.cross) == ("subsets", "prior")
    scales = {name: run.model.dist_params(name).get("scale") for name in ("picture", "bell", "tail", "count")}
    assert scales == {
        "picture": "learned_per_modality", "bell": "learned_per_feature", "tail": "learned_per_feature", "count": None,
    }  # fmt: skip
    dataset = open_dataset(tmp_path / "data")
    resolved = resolve(run, dataset)
    assert resolved.model.private_dims["tissue"] == 0, "a scalar has no private latent"
    check_data(resolved, dataset)


def look(folder: Path, parts: Parts, **changes: Any) -> Inspection:
    where = write_dataset(folder / "data", parts)
    return inspect(InspectConfig(dataset=str(where), **changes), quiet)


def test_sizes_of_what_is_proposed_grow_with_the_data(tmp_path: Path) -> None:
    dims, dropouts = [], []
    for num, width in ((40, 8), (400, 8), (400, 80)):
        data = {name: np.random.default_rng(0).normal(size=(num, width)).astype(np.float32) for name in ("a", "b")}
        rows = Rows(np.arange(num), data, {name: np.ones(num, bool) for name in data})
        parts = {"train": rows, "val": replace(rows.take(slice(0, 20)), ids=np.arange(10_000, 10_020))}
        run = look(tmp_path / f"{num}-{width}", parts).run
        assert run is not None
        model = TrainConfig.model_validate(tomllib.loads(run)).model
        dims.append(model.latent_dim)
        dropouts.append(model.architectures["a"].dropout)
    assert dims == [4, 8, 25]
    assert dropouts == [0.2, 0.0, 0.2], "with few rows for each feature"


def test_one_modality_is_proposed_no_prediction_of_others(tmp_path: Path) -> None:
    parts = {
        name: Rows(rows.ids, {"x": rows.data["x"]}, {"x": np.ones(len(rows.ids), bool)})
        for name, rows in clean().items()
    }
    run = look(tmp_path, parts).run
    assert run is not None
    assert TrainConfig.model_validate(tomllib.loads(run)).model.sources == "unimodal"


def test_what_is_proposed_trains(tmp_path: Path) -> None:
    cause = np.random.default_rng(0).normal(size=(440, 1)).astype(np.float32)
    parts, start = clean(), 0
    for name, rows in parts.items():
        mine = cause[start : start + len(rows)]
        start += len(rows)
        parts[name] = with_values(rows, "x", lambda x, mine=mine: np.add(3 * mine, 0.3 * x, out=x))  # type: ignore[misc]
    output = tmp_path / "out"
    look(tmp_path, parts, output=str(output))
    tree = tomllib.loads((output / "train.toml").read_text())
    tree["training"]["epochs"] = 2
    config = TrainConfig.model_validate(tree)
    dataset = open_dataset(config.data.dataset)
    check_data(resolve(config, dataset), dataset)
    _, figures = train_here(config)
    losses = [figures[step]["val/loss"] for step in sorted(figures) if "val/loss" in figures[step]]
    assert losses[-1] < losses[0] - 1


@pytest.mark.acceptance
def test_jobs_train_takes_what_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", clean())
    assert run_verb("inspect", ["data", "--output", "look"]) == 0
    assert run_verb("train", ["look/train.toml", "--training.epochs", "3"]) == 0
    assert (tmp_path / "runs/data-first/best/model.safetensors").is_file()


def test_the_table_and_its_files_are_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "data", clean())
    arguments = [str(tmp_path / "data"), "--output", str(tmp_path / "look"), "--verify"]
    assert run_verb("inspect", arguments) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "No errors; 0 warning(s)."
    for word in (
        "440 rows",
        "complete rows",
        "x + y",
        "no label",
        "counts: whole numbers",
        "in train",
    ):
        assert word in shown
    assert (tmp_path / "look/missingness.png").read_bytes().startswith(b"\x89PNG")
    mine = tmp_path / "look/train.toml"
    mine.write_text("# my own\n")
    assert run_verb("inspect", arguments) == 0
    assert mine.read_text() == "# my own\n"
    assert f"kept      {mine}" in capsys.readouterr().out


def test_many_modalities_are_told_by_the_most_frequent_combinations(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = {f"m{number:02d}": rng.normal(size=(2000, 3)).astype(np.float32) for number in range(20)}
    present = {name: rng.random(2000) < 0.5 for name in data}
    present["m00"] |= True
    for mask in present.values():
        mask[:600] = True
    rows = Rows(np.arange(2000), data, present)
    result = look(tmp_path, {"train": rows, "val": rows.take(slice(0, 0))}, output=str(tmp_path / "out"))
    text = "\n".join(result.lines)
    assert f"{'#' * 20} 600" in re.sub(" +", " ", text)
    assert "other combinations" in text
    assert (tmp_path / "out/missingness.png").stat().st_size > 10_000
    assert any("val: split has no rows" in finding.text for finding in result.findings)


def test_memory_does_not_grow_with_the_rows_but_for_their_hashes(tmp_path: Path) -> None:
    peaks = []
    for num in (4_000, 16_000):
        rows = Rows(np.arange(num), {"x": np.random.default_rng(0).random((num, 300))}, {"x": np.ones(num, dtype=bool)})
        folder = write_dataset(tmp_path / str(num), {"train": rows, "val": rows.take(slice(0, 100))})
        del rows
        dataset = open_dataset(folder)
        tracemalloc.start()
        profile_dataset(dataset, quiet)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 12_000 * 24  # a row is 2,400 bytes


def test_wrong_data_and_bad_input_get_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*argv: str) -> str:
        assert run_verb("inspect", list(argv)) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        return shown

    assert "No dataset.json found in" in message(str(tmp_path))
    assert "does not exist" in message(str(tmp_path / "absent"))
    parts = clean()
    good = str(
        write_dataset(tmp_path / "data", parts | {"test": join(parts["test"], parts["train"].take(slice(0, 1)))})
    )
    assert "The dataset has 1 error(s) and 0 warning(s)" in message(good)
    (tmp_path / "file").write_text("")
    assert "Choose another folder for output" in message(good, "--output", str(tmp_path / "file/in"))
    shard = tmp_path / "data/val/part-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[content.index(parts["val"].data["x"][parts["val"].present["x"]][0].tobytes())] ^= 1
    shard.write_bytes(content)
    assert "The dataset has 2 error(s)" in message(good, "--verify")
    shard.write_bytes(content[: len(content) // 2])
    assert "Size mismatch" in message(good)


def test_the_proposed_networks_are_those_for_the_kind_of_values(tmp_path: Path) -> None:
    rng, num = np.random.default_rng(0), 60
    data = {
        "small": rng.random((num, 1, 28, 28)).astype(np.float32),
        "large": rng.random((num, 3, 40, 33)).astype(np.float32),
        "strip": rng.random((num, 1, 4, 40)).astype(np.float32),
        "signal": rng.normal(size=(num, 3, 100)).astype(np.float32),
        "matrix": rng.normal(size=(num, 3, 5)).astype(np.float32),
        "text": rng.integers(0, 5, (num, 20)),
        "answers": rng.integers(0, 5, (num, 4)),
        "table": rng.normal(size=(num, 50)).astype(np.float32),
    }
    rows = Rows(np.arange(num), data, {name: np.ones(num, bool) for name in data})
    run = look(tmp_path, {"train": rows.take(slice(0, 50)), "val": rows.take(slice(50, 60))}).run
    assert run is not None
    config = TrainConfig.model_validate(tomllib.loads(run))
    assert {name: settings.name for name, settings in config.model.architectures.items()} == {
        "small": "residual", "large": "residual", "strip": "skip_mlp", "signal": "series", "matrix": "skip_mlp",
        "text": "sequence", "answers": "skip_mlp", "table": "skip_mlp",
    }  # fmt: skip
    resolve(config, open_dataset(tmp_path / "data"))


@pytest.mark.parametrize(("absent", "sources"), [(0, "joint"), (40, "subsets")])
def test_where_only_cells_are_missing_they_are_what_a_run_learns_to_predict(
    absent: int, sources: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    data = {name: rng.normal(size=(400, 6)).astype(np.float32) for name in ("blood", "urine")}
    data["blood"][rng.random((400, 6)) < 0.1] = np.nan
    data["blood"][np.isnan(data["blood"]).all(axis=1)] = 0.0
    present = {name: np.ones(400, bool) for name in data}
    present["urine"][:absent] = False
    rows = Rows(np.arange(400), data, present)
    profile_of(tmp_path, {"train": rows.take(slice(0, 300)), "val": rows.take(slice(300, 400))})
    found = inspect(InspectConfig(dataset=str(tmp_path / "data")), quiet).run
    assert found is not None
    assert TrainConfig.model_validate(tomllib.loads(found)).model.sources == sources
