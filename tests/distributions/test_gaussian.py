import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from dmvae.distributions.gaussian import DiagGaussian, log_prior, product_of_experts


def random_gaussian(*shape: int, seed: int = 0) -> DiagGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, log_var = torch.randn(2, *shape, generator=generator, dtype=torch.float64).unbind()
    return DiagGaussian(mean, log_var)


def torch_normal(gaussian: DiagGaussian) -> Independent:
    return Independent(Normal(gaussian.mean, torch.exp(0.5 * gaussian.log_var)), 1)


def test_divergence_is_the_mean_log_ratio_of_its_own_samples() -> None:
    q = random_gaussian(4, 3)
    many = DiagGaussian(q.mean.expand(100_000, 4, 3), q.log_var.expand(100_000, 4, 3))
    z = many.sample(torch.randn(100_000, 4, 3, dtype=torch.float64))
    ratios = q.log_density(z) - log_prior(z)
    error = ratios.std(0) / math.sqrt(len(ratios))
    assert bool(((ratios.mean(0) - q.kl_from_prior()).abs() < 5 * error).all())
    assert error.max() < 0.02


def test_divergence_and_density_are_those_of_torch_distributions() -> None:
    q = random_gaussian(5, 3)
    prior = DiagGaussian(torch.zeros_like(q.mean), torch.zeros_like(q.mean))
    z = torch.randn(7, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(q.kl_from_prior(), kl_divergence(torch_normal(q), torch_normal(prior)))
    torch.testing.assert_close(q.log_density(z), torch_normal(q).log_prob(z))
    torch.testing.assert_close(log_prior(z), torch_normal(prior).log_prob(z))


def test_the_prior_is_at_no_distance_from_itself() -> None:
    assert DiagGaussian(torch.zeros(2, 3), torch.zeros(2, 3)).kl_from_prior().tolist() == [0.0, 0.0]


def test_samples_are_reparameterised() -> None:
    mean = torch.tensor([[1.0, -2.0]], requires_grad=True)
    log_var = torch.tensor([[0.5, -1.0]], requires_grad=True)
    noise = torch.tensor([[2.0, -3.0]])
    DiagGaussian(mean, log_var).sample(noise).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(1, 2))
    torch.testing.assert_close(log_var.grad, 0.5 * torch.exp(0.5 * log_var.detach()) * noise)


@pytest.mark.parametrize("log_var", [-120.0, 120.0])
def test_the_density_at_a_sample_is_finite_for_extreme_variances(log_var: float) -> None:
    q = DiagGaussian(torch.ones(2, 3), torch.full((2, 3), log_var))
    assert bool(q.log_density(q.sample(torch.randn(2, 3))).isfinite().all())


def experts(seed: int = 0, num: int = 4, rows: int = 16, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Experts in which the rows go through every pattern of presence."""
    q = random_gaussian(num, rows, dim, seed=seed)
    present = torch.tensor(list(itertools.product([False, True], repeat=num))).T[:, :rows]
    return q.mean, q.log_var, present


def test_the_product_is_the_closed_form() -> None:
    mean, log_var, present = experts()
    product = product_of_experts(mean, log_var, present)
    for row in range(present.shape[1]):
        here = present[:, row]
        precision = 1 + torch.exp(-log_var[here, row]).sum(0)
        expected = (torch.exp(-log_var[here, row]) * mean[here, row]).sum(0) / precision
        torch.testing.assert_close(product.mean[row], expected)
        torch.testing.assert_close(product.log_var[row], -torch.log(precision))


def test_the_product_is_proportional_to_the_product_of_densities() -> None:
    mean, log_var, present = experts()
    product = product_of_experts(mean, log_var, present)
    z = torch.randn(50, 1, 16, 3, dtype=torch.float64)
    densities = DiagGaussian(mean, log_var).log_density(z.expand(50, 4, 16, 3)) * present
    constant = product.log_density(z[:, 0]) - (densities.sum(1) + log_prior(z[:, 0]))
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(4)), seed=st.integers(0, 10))
def test_the_order_of_experts_is_irrelevant(order: list[int], seed: int) -> None:
    mean, log_var, present = experts(seed)
    left = product_of_experts(mean, log_var, present)
    right = product_of_experts(mean[order], log_var[order], present[order])
    torch.testing.assert_close(left.mean, right.mean)
    torch.testing.assert_close(left.log_var, right.log_var)


def test_a_row_without_experts_is_the_prior() -> None:
    mean, log_var, present = experts()
    product = product_of_experts(mean, log_var, torch.zeros_like(present))
    assert bool((product.mean == 0).all())
    assert bool((product.log_var == 0).all())


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_what_an_absent_expert_holds_changes_neither_value_nor_gradient(garbage: float) -> None:
    def run(fill: float) -> list[Tensor]:
        mean, log_var, present = experts()
        absent = ~present.unsqueeze(-1)
        mean = mean.masked_fill(absent, fill).requires_grad_()
        log_var = log_var.masked_fill(absent, fill).requires_grad_()
        product = product_of_experts(mean, log_var, present)
        (product.mean.square().sum() + product.kl_from_prior().sum()).backward()
        return [product.mean, product.log_var, mean.grad, log_var.grad]

    for clean, dirty in zip(run(0.0), run(garbage), strict=True):
        assert torch.equal(clean, dirty)


def test_gradients_of_the_product_are_right() -> None:
    mean, log_var, present = experts()

    def function(mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        product = product_of_experts(mean, log_var, present)
        return product.mean, product.log_var

    assert torch.autograd.gradcheck(function, (mean.requires_grad_(), log_var.requires_grad_()))


@settings(deadline=None, max_examples=60)
@given(log_vars=st.lists(st.sampled_from([-120.0, -30.0, 0.0, 30.0, 120.0]), min_size=3, max_size=3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_variances_give_finite_values_and_gradients(log_vars: list[float], dtype: torch.dtype) -> None:
    log_var = torch.tensor(log_vars, dtype=dtype).view(3, 1, 1).requires_grad_()
    mean = torch.tensor([1.0, -2.0, 3.0], dtype=dtype).view(3, 1, 1).requires_grad_()
    product = product_of_experts(mean, log_var, torch.ones(3, 1, dtype=torch.bool))
    assert product.mean.dtype == product.log_var.dtype == torch.float32
    (product.mean.sum() + product.log_var.sum()).backward()
    for tensor in (product.mean, product.log_var, mean.grad, log_var.grad):
        assert bool(tensor.isfinite().all())
    exact = torch.tensor(log_vars, dtype=torch.float64)
    precision = 1 + torch.exp(-exact).sum()
    weights = torch.exp(-exact) / precision
    expected = (weights * torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)).sum()
    torch.testing.assert_close(product.mean.double().squeeze(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(product.log_var.double().squeeze(), -torch.log(precision), rtol=1e-5, atol=1e-5)
