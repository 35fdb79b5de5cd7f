"""Linear models of incomplete rows: against closed forms, scikit-learn, and the exact conditional Gaussian."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from dmvae import Batch
from dmvae.evaluation.factor_analysis import FactorAnalysis, choose_num_factors
from dmvae.evaluation.masking import mask_modalities
from dmvae.evaluation.pattern_moments import FitData

pytestmark = pytest.mark.slow


def sample(rows: int = 400, latent_dim: int = 2, scale: float = 0.3, offset: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(latent_dim, 9, generator=generator, dtype=torch.float64)
    z = torch.randn(rows, latent_dim, generator=generator, dtype=torch.float64)
    x = offset + z @ weight + scale * torch.randn(rows, 9, generator=generator, dtype=torch.float64)
    return {"b": x[:, :4].reshape(-1, 2, 2), "a": x[:, 4:7], "c": x[:, 7:]}


def incomplete(data: dict[str, Tensor], missing: float = 0.4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    rows = len(data["a"])
    masks = {name: torch.rand(rows, generator=generator) >= missing for name in data}
    values = {name: torch.full_like(x, math.nan) for name, x in data.items()}
    for name, mask in masks.items():
        values[name][mask] = data[name][mask]
    return Batch(values, masks)


def fit_pca(
    rows: Batch | list[Batch], latent_dim: int, max_steps: int = 1000, tolerance: float = 1e-4
) -> FactorAnalysis:
    return FactorAnalysis.fit(rows, latent_dim, "one", 0.0, max_steps, tolerance)


def joined(data: dict[str, Tensor]) -> Tensor:
    return torch.cat([data[name].flatten(1) for name in sorted(data)], dim=1)


def covariance(model: FactorAnalysis) -> Tensor:
    return model.weight @ model.weight.T + model.noise_variance.diag()


def test_complete_rows_have_the_eigenvectors_solution() -> None:
    data = sample()
    model = fit_pca(Batch(data), latent_dim=2)
    x = joined(data)
    eigenvalues, vectors = torch.linalg.eigh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x))
    noise = eigenvalues[:-2].mean()
    signal = vectors[:, -2:] @ torch.diag(eigenvalues[-2:] - noise) @ vectors[:, -2:].T
    expected = signal + noise * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(model.mean, x.mean(0))
    torch.testing.assert_close(covariance(model), expected, rtol=1e-6, atol=1e-6)
    # the maximum's value: Tipping & Bishop 1999, equation 9
    log_det = eigenvalues[-2:].log().sum() + 7 * noise.log()
    best = -0.5 * (9 * math.log(2 * math.pi) + log_det + 9)
    assert model.history[-1] == pytest.approx(float(best), abs=1e-9)
    assert model.converged


def test_em_reaches_the_eigenvectors_solution_from_elsewhere() -> None:
    data = sample()
    solution = fit_pca(Batch(data), latent_dim=2)
    generator = torch.Generator().manual_seed(3)
    known = FitData.of(Batch(data), "one", 0.0)
    weight = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    model, history = replace(solution, weight=weight, mean=0 * known.origin, noise_variance=0 * known.origin + 1), []
    for _ in range(400):
        history.append(model._log_likelihood(known.moments))
        model = model._step(known)
    model = replace(model, mean=model.mean + known.origin)
    assert min(b - a for a, b in itertools.pairwise(history)) > -1e-9
    torch.testing.assert_close(covariance(model), covariance(solution), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.mean, solution.mean, rtol=1e-6, atol=1e-6)


def test_likelihood_of_incomplete_rows_never_falls_and_ends_at_a_maximum() -> None:
    batch = incomplete(sample())
    model = fit_pca(batch, latent_dim=2, max_steps=5000, tolerance=1e-12)
    assert model.converged
    assert len(model.history) > 5
    assert min(b - a for a, b in itertools.pairwise(model.history)) > -1e-10
    some = (~torch.isnan(joined(dict(batch.data)))).any(1)
    assert model.history[-1] == pytest.approx(float(model.log_prob(batch)[some].mean()), abs=1e-9)
    assert abs(gradient_along_noise(model, batch)) < 1e-4


def gradient_along_noise(model: FactorAnalysis, batch: Batch) -> float:
    up, down = (replace(model, noise_variance=model.noise_variance * factor) for factor in (1.001, 0.999))
    return float(up.log_prob(batch).mean() - down.log_prob(batch).mean()) / 0.002


def test_log_prob_is_the_normal_density_of_the_observed_values() -> None:
    data = sample(rows=60)
    batch = incomplete(data)
    model = FactorAnalysis.fit(batch, num_factors=3, shrinkage=0.1)
    assert batch.masks is not None
    log_p, mean, cov = model.log_prob(batch), model.mean.numpy(), covariance(model).numpy()
    for row in range(60):
        columns = [
            column
            for name in ("a", "b", "c")
            if batch.masks[name][row]
            for column in range(model.layout.columns[name].start, model.layout.columns[name].stop)
        ]
        expected = 0.0
        if columns:
            x = joined(data)[row].numpy()[columns]
            expected = stats.multivariate_normal(mean[columns], cov[columns][:, columns]).logpdf(x)
        assert float(log_p[row]) == pytest.approx(expected, abs=1e-9)


def test_a_row_with_nothing_has_log_density_0_and_does_not_count() -> None:
    data = sample(rows=50)
    nothing = {name: torch.cat((x, torch.full_like(x[:5], math.nan))) for name, x in data.items()}
    mask = torch.arange(55) < 50
    batch = Batch(nothing, dict.fromkeys(data, mask))
    model, alone = fit_pca(batch, latent_dim=2), fit_pca(Batch(data), latent_dim=2)
    assert model.history[-1] == pytest.approx(alone.history[-1], abs=1e-12)
    assert model.log_prob(batch)[50:].tolist() == [0.0] * 5


def test_order_of_rows_and_batches_is_irrelevant() -> None:
    batch = incomplete(sample())
    one = fit_pca(batch, latent_dim=2)
    order = torch.randperm(400)
    many = fit_pca([batch[order[:150]], batch[order[150:151]], batch[order[151:]]], latent_dim=2)
    torch.testing.assert_close(covariance(many), covariance(one), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(many.log_prob(batch[order]), one.log_prob(batch)[order], rtol=1e-8, atol=1e-8)


def test_a_modality_left_out_of_data_is_missing() -> None:
    data = sample()
    absent = Batch({name: x for name, x in data.items() if name != "b"})
    masked = Batch(data, {"b": torch.zeros(400, dtype=torch.bool)})
    model = fit_pca([Batch(data), absent], latent_dim=2)
    torch.testing.assert_close(model.log_prob(absent), model.log_prob(masked), rtol=0, atol=0)


def test_large_means_cost_no_digits() -> None:
    near, far = (fit_pca(incomplete(sample(offset=offset)), latent_dim=2) for offset in (0.0, 1e4))
    assert far.history[-1] == pytest.approx(near.history[-1], abs=1e-4)


def test_values_far_from_float64_are_computed_in_it() -> None:
    data = sample()
    model = fit_pca(Batch({name: x.float() for name, x in data.items()}), latent_dim=2)
    assert model.history[-1] == pytest.approx(fit_pca(Batch(data), latent_dim=2).history[-1], abs=1e-5)


@pytest.mark.parametrize("latent_dim", [0, 9])
def test_latent_dim_out_of_range_is_refused(latent_dim: int) -> None:
    with pytest.raises(ValueError, match=f"below the 9 features, but got {latent_dim}"):
        fit_pca(Batch(sample()), latent_dim)


def test_rows_without_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="Cannot fit 2 factors: the rows vary in no more directions"):
        fit_pca(Batch(sample(scale=0.0)), latent_dim=2)


def test_integers_changed_sizes_and_unknown_modalities_are_refused() -> None:
    data = sample()
    model = fit_pca(Batch(data), latent_dim=2)
    with pytest.raises(ValueError, match=r"'a' must be floating-point, but got torch\.uint8"):
        fit_pca(Batch({"a": torch.zeros(3, 4, dtype=torch.uint8)}), latent_dim=2)
    with pytest.raises(ValueError, match=r"'a' must keep its shape, but got \(3,\) and \(2,\)"):
        fit_pca([Batch(data), Batch({"a": data["a"][:, :2]})], latent_dim=2)
    with pytest.raises(ValueError, match=r"\['a'\] must have 3 features as in the fit, but got 2"):
        model.log_prob(Batch({"a": data["a"][:, :2]}))
    with pytest.raises(ValueError, match=r"Unknown modalities \['d'\]. The fit has \['a', 'b', 'c'\]"):
        model.log_prob(Batch({"d": data["a"]}))


def uneven(rows: int = 600, num_factors: int = 2) -> dict[str, Tensor]:
    """Tables whose features have noises of their own."""
    data = sample(rows, num_factors, scale=0.0)
    noise = torch.randn(rows, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x = joined(data) + noise * torch.linspace(0.2, 1.5, 9, dtype=torch.float64)
    return {"a": x[:, :4], "b": x[:, 4:7], "c": x[:, 7:]}


def test_complete_rows_have_the_solution_of_scikit_learn() -> None:
    from sklearn.decomposition import FactorAnalysis as Theirs

    data = uneven()
    model = FactorAnalysis.fit(Batch(data), 2, shrinkage=0.0, max_steps=1000, tolerance=1e-9)
    theirs = Theirs(2, tol=1e-12, max_iter=20000, svd_method="lapack").fit(joined(data).numpy())
    assert model.history[-1] == pytest.approx(theirs.score(joined(data).numpy()), abs=1e-5)
    torch.testing.assert_close(covariance(model), torch.from_numpy(theirs.get_covariance()), rtol=1e-2, atol=1e-2)


def test_factor_analysis_of_incomplete_rows_ends_at_a_maximum_and_never_falls() -> None:
    batch = incomplete(uneven())
    model = FactorAnalysis.fit(batch, 2, shrinkage=0.0, max_steps=300, tolerance=1e-7)
    assert min(b - a for a, b in itertools.pairwise(model.history)) > -1e-10
    weight, mean, log_noise = (
        part.clone().requires_grad_() for part in (model.weight, model.mean, model.noise_variance.log())
    )
    moved = replace(model, weight=weight, mean=mean, noise_variance=log_noise.exp())
    gradients = torch.autograd.grad(moved.log_prob(batch).mean(), (weight, mean, log_noise))
    for gradient in gradients:
        assert float(gradient.abs().max()) < 1e-2


def test_missing_values_are_completed_by_the_conditional_mean_of_what_each_row_has() -> None:
    batch = incomplete(uneven(rows=80))
    model = FactorAnalysis.fit(batch, num_factors=3)
    assert batch.masks is not None
    completed, cov = model.complete(batch), covariance(model)
    predicted = model.predict(batch, "a")
    for row in range(80):
        have = torch.cat([batch.masks[n][row].expand(s.stop - s.start) for n, s in model.layout.columns.items()])
        x = joined(dict(batch.data))[row]
        torch.testing.assert_close(completed[row, have], x[have])
        gain = cov[~have][:, have] @ torch.linalg.inv(cov[have][:, have])
        torch.testing.assert_close(completed[row, ~have], model.mean[~have] + gain @ (x - model.mean)[have])
        own, others = torch.arange(9) < 4, have & (torch.arange(9) >= 4)
        gain = cov[own][:, others] @ torch.linalg.inv(cov[others][:, others])
        torch.testing.assert_close(predicted[row], model.mean[own] + gain @ (x - model.mean)[others])


def test_a_row_with_nothing_is_completed_by_the_mean() -> None:
    rows = mask_modalities(Batch(uneven(rows=50)), "a", "b", "c")
    model = FactorAnalysis.fit(Batch(uneven(rows=50)), num_factors=2)
    torch.testing.assert_close(model.complete(rows), model.mean.expand(50, -1))


def test_shrinkage_is_rows_of_independent_features_beside_the_data() -> None:
    data = uneven(rows=300)
    x, shrinkage = joined(data), 18 / 300
    variance = x.var(0, correction=0)
    prior = torch.cat([0.9 * v + 0.1 * v.mean() for v in variance.split([4, 3, 2])])
    beside = x.mean(0) + torch.cat((torch.eye(9), -torch.eye(9))).double() * (9 * prior).sqrt()
    rows = torch.cat((x, beside)).split([4, 3, 2], dim=1)
    steps = {"max_steps": 500, "tolerance": 1e-9}
    explicit = FactorAnalysis.fit(Batch(dict(zip("abc", rows, strict=True))), 2, shrinkage=0.0, **steps)
    model = FactorAnalysis.fit(Batch(data), 2, shrinkage=shrinkage, **steps)
    torch.testing.assert_close(covariance(model), covariance(explicit), rtol=1e-3, atol=1e-3)


def test_tables_have_a_noise_for_each_feature_and_images_one() -> None:
    model = FactorAnalysis.fit(Batch(sample()), num_factors=2)
    image, tables = model.noise_variance[model.layout.columns["b"]], model.noise_variance[:3]
    assert len(image.unique()) == 1
    assert len(tables.unique()) == 3


def test_constant_and_duplicated_features_leave_the_density_finite() -> None:
    data = uneven(rows=200)
    data["a"] = torch.cat((data["a"], data["a"][:, :1], torch.full((200, 1), 7.0, dtype=torch.float64)), dim=1)
    model = FactorAnalysis.fit(Batch(data), num_factors=4)
    assert bool(torch.isfinite(model.log_prob(Batch(data))).all())
    assert float(model.noise_variance.min()) > 1e-4


@pytest.mark.parametrize("num_factors", [1, 4])
def test_cross_validation_finds_the_number_of_factors(num_factors: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(num_factors, 20, generator=generator, dtype=torch.float64)
    z, noise = (torch.randn(800, n, generator=generator, dtype=torch.float64) for n in (num_factors, 20))
    x = z @ weight + 0.5 * noise
    batch = Batch({"a": x[:, :12], "c": x[:, 12:]}, {"a": torch.rand(800, generator=generator) > 0.3})
    assert choose_num_factors(batch) == num_factors
