import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.sparse

from dmvae.config.data import PrepareConfig
from dmvae.config.sources import H5muModality, H5muSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation import stream
from dmvae.data.preparation.prepare import prepare, read_source
from dmvae.data.reading.dataset import open_dataset
from tests.data.preparation.test_rows import collect, read_all

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of mudata and anndata, about pandas
    import anndata
    import mudata
    import pandas as pd

CELLS = [f"cell {number}" for number in range(9)]
RNA, ADT = CELLS[:6], [CELLS[8], CELLS[3], CELLS[1], CELLS[6]]
COUNTS = np.random.default_rng(0).poisson(1, (6, 5))
PROTEINS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _names_stored_as_older_releases_do() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pd.set_option("future.infer_string", False)
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pd.reset_option("future.infer_string")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Cells with RNA, with surface proteins, with both, in another order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rna = anndata.AnnData(scipy.sparse.csr_matrix(np.log1p(COUNTS)), obs=pd.DataFrame(index=RNA))
        rna.layers["counts"] = scipy.sparse.csr_matrix(COUNTS)
        rna.layers["by_gene"] = scipy.sparse.csc_matrix(COUNTS)
        rna.var["kind"] = ["gene"] * 5
        rna.var["highly_variable"] = [True, False, True, False, True]
        adt = anndata.AnnData(PROTEINS, obs=pd.DataFrame(index=ADT))
        both = mudata.MuData({"rna": rna, "prot:adt": adt})
        both.obs["type"] = pd.Categorical(["T", "B", None, "B", "T", "T", "B", "B"], categories=["T", "B"])
        both.obs["donor"] = pd.Categorical(["x", "x", "y", "y", "z", "z", "x", "y"])
        both.obs["batch"] = pd.Categorical([4, 7, 4, 4, 7, 7, 4, 4])
        both.obs["depth"] = np.arange(1.0, 9)
        both.write(tmp_path / "cells.h5mu")
    return str(tmp_path / "cells.h5mu")


WANTED: dict[str, Any] = {"rna": H5muModality(layer="counts"), "adt": H5muModality(key="prot:adt")}


@pytest.mark.parametrize("layer", ["counts", "by_gene"])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 70])
def test_observations_that_a_modality_does_not_have_are_missing_there(
    path: str, monkeypatch: pytest.MonkeyPatch, layer: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    wanted = WANTED | {"rna": H5muModality(layer=layer)}
    source = H5muSource(path=path, modalities=wanted, label="type", group="donor", size_factor="depth")
    found = read_source(source, 0, Path())
    assert found.labels.names == ("T", "B")
    assert found.features == {"rna": tuple("01234"), "adt": tuple("012")}
    rows = collect(found)
    assert set(rows.ids.tolist()) == {*RNA, *ADT}
    assert rows.data["rna"].dtype == np.float32
    for row, cell in enumerate(rows.ids.tolist()):
        assert rows.present["rna"][row] == (cell in RNA)
        assert rows.present["adt"][row] == (cell in ADT)
        if cell in RNA:
            assert np.array_equal(rows.data["rna"][row], COUNTS[RNA.index(cell)])
        if cell in ADT:
            assert np.array_equal(rows.data["adt"][row], PROTEINS[ADT.index(cell)])
    assert rows.labels is not None
    assert rows.labels.tolist() == [0, 1, -1, 1, 0, 0, 1, 1]
    assert rows.groups is not None
    assert rows.groups.tolist() == list("xxyyzzxy")
    assert rows.size_factors is not None
    assert rows.size_factors.tolist() == list(range(1, 9))


def test_a_mudata_becomes_a_dataset_with_nulls_in_the_right_rows(path: str, tmp_path: Path) -> None:
    config = PrepareConfig(
        dataset=str(tmp_path / "data"),
        source=H5muSource(path=path, modalities=WANTED, group="donor"),
        splits={"train": 0.7, "val": 0.3},
        likelihood={"rna": "poisson"},
    )
    dataset = open_dataset(prepare(config, progress=lambda _: None))
    seen = {}
    for name in ("train", "val"):
        split = dataset.split(name)
        batch = split.read(np.arange(len(split)))
        for row, cell in enumerate(split.ids().tolist()):
            masks = batch.masks or {}
            seen[cell] = {key for key in ("rna", "adt") if key not in masks or masks[key][row]}
            if "rna" in seen[cell]:
                assert np.array_equal(batch.data["rna"][row].numpy(), COUNTS[RNA.index(cell)])
    assert seen == {cell: {key for key, own in (("rna", RNA), ("adt", ADT)) if cell in own} for cell in {*RNA, *ADT}}


def test_chosen_features_of_x_are_read(path: str) -> None:
    rows = read_all(H5muSource(path=path, modalities={"rna": H5muModality(features="highly_variable")}))
    assert np.array_equal(rows.data["rna"][:6], np.log1p(COUNTS)[:, ::2])


def test_categories_that_are_integers_are_labels(path: str) -> None:
    labels = read_all(H5muSource(path=path, modalities=WANTED, label="batch")).labels
    assert labels is not None
    assert labels.tolist() == [4, 7, 4, 4, 7, 7, 4, 4]


@pytest.mark.parametrize("layer", ["counts", "by_gene"])
def test_elements_that_are_stored_twice_add_up(path: str, layer: str) -> None:
    with h5py.File(path, "r+") as file:
        stored = file[f"mod/rna/layers/{layer}"]
        twice = {name: np.repeat(stored[name][()], 2) for name in ("data", "indices")}
        twice["indptr"] = 2 * stored["indptr"][()]
        for name, values in twice.items():
            del stored[name]
            stored[name] = values
    rows = read_all(H5muSource(path=path, modalities={"rna": H5muModality(layer=layer)}))
    assert np.array_equal(rows.data["rna"][:6], 2 * COUNTS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"modalities": {"atac": {}}}, r"Modality 'atac' not found in .*cells.h5mu, which has prot:adt, rna\."),
        ({"modalities": {"rna": {"layer": "raw"}}}, r"Layer 'raw' not found in .*which has by_gene, counts\."),
        ({"modalities": {"rna": {"features": "best"}}}, "Column 'best' not found in var"),
        ({"modalities": {"rna": {"features": "kind"}}}, "Column 'kind' of var must be boolean"),
        (
            {"modalities": {"rna": {"dtype": "int64"}}},
            "Cannot convert 0.69.* to int64 for modality 'rna' in .*observation 0",
        ),
        ({"modalities": WANTED, "label": "kind"}, "Column 'kind' not found in .*obs, which has .*source.label"),
        ({"path": "nowhere.h5mu"}, "Source file not found: nowhere.h5mu"),
        ({"path": __file__}, "as MuData"),
    ],
)
def test_what_is_not_there_is_named(path: str, source: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_all(H5muSource.model_validate({"path": path, **source}))


def written(path: Path, annotated: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        annotated.write(path)
    return str(path)


def cells(**arrays: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        var = None if "X" in arrays else pd.DataFrame(index=list("abcde"))
        found = anndata.AnnData(arrays.get("X"), obs=pd.DataFrame({"type": list("TBTBTB")}, index=RNA), var=var)
        found.layers.update(arrays.get("layers", {}))
        found.obsm.update(arrays.get("obsm", {}))
    return found


def test_any_name_in_the_file_becomes_a_legal_one_and_is_said(path: str) -> None:
    stream = read_source(H5muSource(path=path), 0, Path())
    assert stream.notes == (
        "modality 'prot:adt' is named 'prot_adt'",
        "not taken: 2 matrices (rna: layers/by_gene, rna: layers/counts)",
    )
    assert {name: values.shape[1] for name, values in collect(stream).data.items()} == {"prot_adt": 3, "rna": 5}


def test_names_that_become_the_same_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = mudata.MuData({"a b": cells(X=COUNTS), "a:b": cells(X=COUNTS)})
    with pytest.raises(DatasetError, match=r"'a:b' of .* would be named 'a_b', as another one is"):
        read_all(H5muSource(path=written(tmp_path / "t.h5mu", both)))


def test_an_anndata_has_x_and_the_arrays_of_obsm(tmp_path: Path) -> None:
    frame = pd.DataFrame(PROTEINS[[0, 1, 2, 3, 0, 1]], index=RNA, columns=["cd3", "cd4", "cd8"])
    path = written(tmp_path / "t.h5ad", cells(X=COUNTS, obsm={"protein": frame, "X_pca": np.zeros((6, 2))}))
    stream = read_source(H5muSource(path=path, label="type"), 0, Path())
    assert stream.notes == ("not taken: 1 matrices (obsm/X_pca)",)
    assert stream.features["protein"] == ("cd3", "cd4", "cd8")
    rows = collect(stream)
    assert rows.ids.tolist() == RNA
    assert np.array_equal(rows.data["X"], COUNTS)
    assert np.array_equal(rows.data["protein"], frame.to_numpy())
    named = H5muSource.model_validate({"path": path, "modalities": {"rna": {}, "protein": {}}})
    assert np.array_equal(read_all(named).data["rna"], COUNTS)
    twice = H5muSource.model_validate({"path": path, "modalities": {"rna": {}, "protien": {}}})
    with pytest.raises(DatasetError, match=r"\['rna', 'protien'\] would all be X .* obsm X_pca, protein"):
        read_all(twice)


def test_without_x_the_only_layer_is_read_and_said(tmp_path: Path) -> None:
    path = written(tmp_path / "one.h5ad", cells(layers={"counts": COUNTS}))
    stream = read_source(H5muSource(path=path), 0, Path())
    assert stream.notes == ("X: there is no X, and layers/counts is read",)
    assert np.array_equal(collect(stream).data["X"], COUNTS)
    path = written(tmp_path / "two.h5ad", cells(layers={"counts": COUNTS, "log": COUNTS}))
    with pytest.raises(DatasetError, match=r"No X in .*layers counts, log and obsm none. Set .*X.layer"):
        read_all(H5muSource(path=path))


def test_a_layer_may_be_an_array_of_obsm_of_a_modality(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = mudata.MuData({"rna": cells(X=COUNTS, obsm={"protein": PROTEINS[[0, 1, 2, 3, 0, 1]]})})
    source = {"modalities": {"rna": {}, "protein": {"key": "rna", "layer": "protein"}}}
    rows = read_all(H5muSource.model_validate({"path": written(tmp_path / "t.h5mu", one), **source}))
    assert np.array_equal(rows.data["protein"], PROTEINS[[0, 1, 2, 3, 0, 1]])


def test_columns_of_a_modality_s_own_obs_are_found(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rna, other = cells(X=COUNTS), cells(X=COUNTS[:4, :2].repeat(2, axis=0)[:6])[:4].copy()
        both = mudata.MuData({"rna": rna, "other": other})
        both.obs = pd.DataFrame(index=both.obs.index)
    path = written(tmp_path / "t.h5mu", both)
    with pytest.raises(DatasetError, match=r"'type' of .* is in the obs of other, rna. Name one .* other:type"):
        read_all(H5muSource(path=path, label="type"))
    stream = read_source(H5muSource(path=path, label="other:type"), 0, Path())
    labels = collect(stream).labels
    assert labels is not None
    assert stream.labels.names == ("B", "T")
    assert stream.labels.final[labels[:4]].tolist() == [1, 0, 1, 0]
    assert labels[4:].tolist() == [-1, -1]


def test_what_is_neither_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "one.h5ad", "w") as file:
        file.create_group("obs")
    with pytest.raises(DatasetError, match=r"one.h5ad is neither a MuData nor an AnnData file"):
        read_all(H5muSource(path=str(tmp_path / "one.h5ad")))
