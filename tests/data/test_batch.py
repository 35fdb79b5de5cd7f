import numpy as np
import pytest
import torch

from dmvae import Batch


def batch_of(rows: int = 5) -> Batch:
    return Batch(
        data={"a": torch.arange(rows * 2.0).view(rows, 2), "b": torch.arange(rows * 4).view(rows, 2, 2)},
        masks={"a": torch.arange(rows) % 2 == 0},
        labels=torch.arange(rows) * 10,
        ids=np.array([f"row {row}" for row in range(rows)]),
    )


def same(left: Batch, right: Batch) -> bool:
    assert left.masks is not None
    assert right.masks is not None
    return (
        all(torch.equal(left.data[name], right.data[name]) for name in ("a", "b"))
        and left.masks.keys() == right.masks.keys() == {"a"}
        and torch.equal(left.masks["a"], right.masks["a"])
        and torch.equal(left.labels, right.labels)
        and list(left.ids) == list(right.ids)
    )


@pytest.mark.parametrize("row", [0, 3, -1, np.int64(3), torch.tensor(3)])
def test_one_row_is_a_batch_of_one_row(row: int) -> None:
    batch = batch_of()
    one = batch[row]
    assert len(one) == 1
    assert torch.equal(one.data["b"][0], batch.data["b"][row])
    assert one.masks["a"].tolist() == [bool(batch.masks["a"][row])]
    assert one.labels.tolist() == [int(batch.labels[row])]
    assert list(one.ids) == [batch.ids[int(row)]]


@pytest.mark.parametrize(
    "rows",
    [
        slice(1, 4),
        slice(None, None, 2),
        slice(2, 2),
        torch.tensor([4, 0, 0]),
        torch.tensor([True, False, True, True, False]),
    ],
)
def test_slices_index_tensors_and_boolean_tensors_select_every_part(rows: slice | torch.Tensor) -> None:
    batch = batch_of()
    numbers = torch.arange(5)[rows]
    selected = batch[rows]
    assert len(selected) == len(numbers)
    assert selected.labels.tolist() == (numbers * 10).tolist()
    assert [int(name.split()[1]) for name in selected.ids] == numbers.tolist()
    assert torch.equal(selected.data["a"], batch.data["a"][numbers])
    assert torch.equal(selected.masks["a"], batch.masks["a"][numbers])


def test_iteration_yields_every_row_once_and_ends() -> None:
    assert [int(row.labels) for row in batch_of(3)] == [0, 10, 20]


@pytest.mark.parametrize("row", [5, -6])
def test_a_row_beyond_the_end_is_an_index_error(row: int) -> None:
    with pytest.raises(IndexError, match=str(row)):
        batch_of()[row]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_masks_of_every_documented_form_become_boolean_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    mask = torch.tensor([1, 0, 0, 1]).to(dtype).view(shape)
    batch = Batch({"a": torch.zeros(4, 3)}, {"a": mask})
    assert batch.masks["a"].dtype == torch.bool
    assert batch.masks["a"].tolist() == [True, False, False, True]


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan")])
def test_a_mask_of_other_values_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"'a' must be boolean or 0/1"):
        Batch({"a": torch.zeros(2, 3)}, {"a": torch.tensor([1.0, value])})


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'a' must be .*got \(2, 4\)"):
        Batch({"a": torch.zeros(2, 3)}, {"a": torch.ones(2, 4)})


def test_a_mask_of_an_unknown_modality_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'c'.*'a'"):
        Batch({"a": torch.zeros(2, 3)}, {"c": torch.ones(2)})


@pytest.mark.parametrize(
    "parts",
    [
        {"data": {"a": torch.zeros(3, 2), "b": torch.zeros(2, 2)}},
        {"data": {"a": torch.zeros(3, 2)}, "masks": {"a": torch.ones(2)}},
        {"data": {"a": torch.zeros(3, 2)}, "labels": torch.zeros(2)},
        {"data": {"a": torch.zeros(3, 2)}, "ids": torch.zeros(2)},
    ],
)
def test_parts_with_different_numbers_of_rows_are_refused(parts: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="same number of rows"):
        Batch(**parts)


def test_a_batch_without_any_modality_has_the_rows_of_its_ids() -> None:
    assert len(Batch({}, ids=torch.arange(3))) == 3
    assert len(Batch({})) == 0


def test_moving_changes_nothing_but_the_device() -> None:
    batch = batch_of()
    assert same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    tensors = [*moved.data.values(), *moved.masks.values(), moved.labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.ids is batch.ids


def test_a_batch_does_not_change_the_masks_that_it_was_given() -> None:
    masks = {"a": torch.tensor([1, 0])}
    Batch({"a": torch.zeros(2, 1)}, masks)
    assert masks["a"].dtype == torch.int64
