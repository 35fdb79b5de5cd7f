"""Rows from Python objects: joined on ids, with what is missing, and one message for each fault."""

from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from dmvae import Batch
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.objects import read_objects


def test_frames_are_joined_on_their_index_in_the_order_of_first_appearance() -> None:
    found = read_objects(
        {
            "a": pd.DataFrame({"x": [1.0, 2.0]}, index=["r1", "r0"]),
            "b": pd.DataFrame({"y": [3.0, 4.0], "z": [5.0, 6.0]}, index=["r2", "r0"]),
        }
    )
    assert found.rows.ids.tolist() == ["r1", "r0", "r2"]
    assert found.rows.present["a"].tolist() == [True, True, False]
    assert found.rows.present["b"].tolist() == [False, True, True]
    assert found.rows.data["b"][[1, 2]].tolist() == [[4.0, 6.0], [3.0, 5.0]]
    assert found.features == {"a": ("x",), "b": ("y", "z")}


def test_the_order_of_rows_and_of_modalities_changes_only_the_order() -> None:
    frame = pd.DataFrame(np.arange(6.0).reshape(3, 2), index=[5, 3, 9])
    straight = read_objects({"a": frame, "b": frame.iloc[:2]}).rows
    turned = read_objects({"b": frame.iloc[:2], "a": frame.iloc[::-1]}).rows
    place = {name: row for row, name in enumerate(turned.ids.tolist())}
    rows = [place[name] for name in straight.ids.tolist()]
    assert np.array_equal(turned.data["a"][rows], straight.data["a"])
    assert np.array_equal(turned.present["b"][rows], straight.present["b"])


@pytest.mark.parametrize(
    "values",
    [
        [[1.0, 2.0], None, [3.0, 4.0]],
        np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, 4.0]]),
        np.array([[1, 2], [None, None], [3, 4]], dtype=object),
        torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [3.0, 4.0]]),
        pd.DataFrame({"x": [1, None, 3], "y": [2, None, 4]}),
        pd.DataFrame({"x": pd.array([1, None, 3], "Int64"), "y": pd.array([2, None, 4], "Int64")}),
    ],
    ids=["list", "array", "objects", "tensor", "frame", "nullable"],
)
def test_a_row_of_nothing_but_nan_or_none_lacks_the_modality(values: Any) -> None:
    rows = read_objects({"a": values}).rows
    assert rows.present["a"].tolist() == [True, False, True]
    assert rows.data["a"][[0, 2]].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_integers_are_numbers_unless_the_likelihood_is_one_of_classes() -> None:
    values = np.array([[1, 2], [0, 1]])
    assert read_objects({"a": values}).rows.data["a"].dtype == np.float32
    assert read_objects({"a": values}, likelihood={"a": "categorical"}).rows.data["a"].dtype == np.int64
    assert read_objects({"a": np.array([[2**24 + 1]])}).rows.data["a"].item() == 2**24 + 1
    assert read_objects({"a": np.array([[True], [False]])}).rows.data["a"].tolist() == [[1.0], [0.0]]


def test_a_frame_whose_columns_differ_in_kind_is_a_table() -> None:
    frame = pd.DataFrame({"sex": ["f", "m", None], "age": [30.5, 40.0, np.nan]})
    found = read_objects({"a": frame})
    assert list(found.tables) == ["a"]
    assert found.rows.present["a"].tolist() == [True, True, False]


def test_a_batch_keeps_its_masks_cells_labels_and_size_factors() -> None:
    batch = Batch(
        {"a": torch.ones(2, 3), "b": torch.zeros(2, 1)},
        {"a": torch.tensor([[True, False, True], [True, True, True]]), "b": torch.tensor([False, True])},
        labels=torch.tensor([1, -1]),
        ids=["p", "q"],
        size_factors=torch.tensor([2.0, 3.0]),
    )
    rows = read_objects(batch).rows
    assert np.isnan(rows.data["a"]).tolist() == [[False, True, False], [False] * 3]
    assert rows.present["b"].tolist() == [False, True]
    assert rows.labels is not None
    assert rows.labels.tolist() == [1, -1]
    assert rows.ids.tolist() == ["p", "q"]
    assert rows.size_factors is not None
    assert rows.size_factors.tolist() == [2.0, 3.0]


def make_anndata(names: list[str], sparse: bool = False) -> anndata.AnnData:
    values = np.arange(2.0 * len(names), dtype=np.float32).reshape(-1, 2)
    found = anndata.AnnData(scipy.sparse.csr_matrix(values) if sparse else values)
    found.obs_names, found.var_names = names, ["g1", "g2"]
    found.obs["kind"] = pd.Categorical(["b" if name > "c2" else "a" for name in names])
    return found


@pytest.mark.filterwarnings("ignore:The inplace keyword", "ignore:var_names are not unique")  # mudata
@pytest.mark.parametrize("sparse", [False, True])
def test_observations_of_mudata_and_anndata_are_rows(sparse: bool) -> None:
    first, second = make_anndata(["c1", "c2", "c3"], sparse), make_anndata(["c3", "c4"], sparse)
    mudata.set_options(pull_on_update=False)
    mdata = mudata.MuData({"rna": first, "prot": second})
    found = read_objects(mdata)
    assert found.rows.ids.tolist() == mdata.obs_names.tolist()
    assert found.features["rna"] == ("g1", "g2")
    place = found.rows.ids.tolist().index("c3")
    assert found.rows.data["rna"][place].tolist() == [4.0, 5.0]
    assert found.rows.data["prot"][place].tolist() == [0.0, 1.0]
    alone = read_objects(first, labels="kind")
    assert list(alone.rows.data) == ["X"]
    assert alone.rows.labels is not None
    assert alone.labels.names == ("a", "b")


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"data": {"a": np.zeros((3, 1)), "b": np.zeros((4, 1))}}, r"same number of rows.*'a': 3, 'b': 4"),
    "ids twice": (
        {"data": {"a": pd.DataFrame({"x": [1.0, 2.0]}, index=["r", "r"])}},
        r"Duplicate id 'r' in data\['a'\]",
    ),
    "ids given twice": ({"data": {"a": np.zeros((2, 1))}, "ids": [4, 4]}, "Duplicate id 4 in ids"),
    "objects in an array": ({"data": {"a": np.array([["x"], [object()]], dtype=object)}}, r"data\['a'\] must hold"),
    "objects in a column": (
        {"data": {"a": pd.DataFrame({"x": [object(), object()]})}},
        r"data\['a'\] has a column of objects",
    ),
    "text": ({"data": {"a": np.array([["x"], ["y"]])}}, r"data\['a'\] must hold numbers"),
    "no X": ({"data": anndata.AnnData(obs=pd.DataFrame(index=["c1"]))}, "AnnData without X"),
    "no modality": ({"data": {}}, "data has no modality"),
    "a frame alone": ({"data": pd.DataFrame({"x": [1.0]})}, "data must be a dict.*got DataFrame"),
    "a name": ({"data": {"1a": np.zeros((2, 1))}}, "Invalid modality name '1a'"),
    "arrays beside frames": (
        {"data": {"a": pd.DataFrame({"x": [1.0]}, index=["r"]), "b": pd.DataFrame({"x": [1.0]}, index=["s"]),
                  "c": np.zeros((2, 1))}},
        r"Cannot tell which rows \['c'\] belong to",
    ),
    "labels": ({"data": {"a": np.zeros((2, 1))}, "labels": [1, 2, 3]}, "labels must have one entry for each row"),
    "labels of obs": ({"data": {"a": np.zeros((2, 1))}, "labels": "kind"}, "Column 'kind' of obs not found"),
    "columns": (
        {"data": {"a": pd.DataFrame(np.zeros((2, 2)), columns=["x", "x"])}},
        r"Columns of data\['a'\] must have different names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_one_message_that_names_the_part(fault: str) -> None:
    arguments, message = FAULTS[fault]
    with pytest.raises(DatasetError, match=message) as caught:
        read_objects(**arguments)
    assert "\n" not in str(caught.value)
