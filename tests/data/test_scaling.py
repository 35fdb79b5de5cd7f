from dataclasses import dataclass

import pytest
import torch

from dmvae.data.scaling import Scale

FEATURES = (3,)


@dataclass(frozen=True)
class Info:
    scaling: str
    shape: tuple[int, ...] = FEATURES
    dtype: str = "float64"
    mean: tuple[float, ...] | None = (1.0, -2.0, 5.0)
    std: tuple[float, ...] | None = (2.0, 0.5, 1.0)
    low: tuple[float, ...] | None = (-1.0, 0.0, 7.0)
    high: tuple[float, ...] | None = (1.0, 10.0, 7.0)
    columns: None = None


INFOS = [Info("none"), Info("standardise"), Info("unit"), Info("log1p"), Info("unit", dtype="uint8")]


@pytest.mark.parametrize("info", INFOS)
def test_showing_undoes_reading(info: Info) -> None:
    values = torch.rand(7, *FEATURES, dtype=torch.float64) * 9
    before = values.clone()
    scale = Scale(info)
    torch.testing.assert_close(scale.show(scale.read(values, torch.float64)), values)
    assert torch.equal(values, before)
    zero = scale.read(torch.zeros(1, *FEATURES, dtype=torch.float64), torch.float64)
    assert scale.moves_zero or not zero.any()


@pytest.mark.parametrize("info", INFOS)
def test_the_log_jacobian_is_that_of_showing(info: Info) -> None:
    scale = Scale(info)
    values = torch.rand(4, *FEATURES, dtype=torch.float64)
    jacobians = [torch.autograd.functional.jacobian(scale.show, row) for row in values]
    expected = torch.stack([torch.linalg.slogdet(jacobian).logabsdet for jacobian in jacobians])
    torch.testing.assert_close(scale.log_jacobian(values), expected)


def test_the_unit_interval_is_that_of_least_and_largest_and_a_constant_feature_becomes_zero() -> None:
    read = Scale(Info("unit")).read(torch.tensor([[-1.0, 0.0, 7.0], [1.0, 10.0, 7.0]]))
    assert read.tolist() == [[0, 0, 0], [1, 1, 0]]


def test_bytes_are_read_in_the_unit_interval_and_left_alone() -> None:
    stored = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    torch.testing.assert_close(Scale(Info("unit", dtype="uint8")).read(stored), torch.tensor([[0, 0.2, 1]]))
    assert stored.tolist() == [[0, 51, 255]]
