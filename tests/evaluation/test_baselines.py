import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from dmvae import Batch
from dmvae.evaluation.baselines import ProbabilisticPCA


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


def joined(data: dict[str, Tensor]) -> Tensor:
    return torch.cat([data[name].flatten(1) for name in sorted(data)], dim=1)


def covariance(model: ProbabilisticPCA) -> Tensor:
    return model.weight @ model.weight.T + model.noise_variance * torch.eye(len(model.mean), dtype=torch.float64)


def test_complete_rows_have_the_eigenvectors_solution() -> None:
    data = sample()
    model = ProbabilisticPCA.fit(Batch(data), latent_dim=2)
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
    solution = ProbabilisticPCA.fit(Batch(data), latent_dim=2)
    generator = torch.Generator().manual_seed(3)
    start = ProbabilisticPCA(
        solution.columns, torch.randn(9, 2, generator=generator, dtype=torch.float64), torch.zeros(9).double(), 1.0
    )
    x = torch.cat((joined(data), torch.ones(400, 1, dtype=torch.float64)), dim=1)
    moments = {("a", "b", "c"): x.T @ x}
    model, history = start, []
    for _ in range(400):
        history.append(model._log_likelihood(moments))
        model = model._step(moments)
    assert min(b - a for a, b in itertools.pairwise(history)) > -1e-9
    torch.testing.assert_close(covariance(model), covariance(solution), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.mean, solution.mean, rtol=1e-6, atol=1e-6)


def test_likelihood_of_incomplete_rows_never_falls_and_ends_at_a_maximum() -> None:
    batch = incomplete(sample())
    model = ProbabilisticPCA.fit(batch, latent_dim=2, max_steps=5000, tolerance=1e-12)
    assert model.converged
    assert len(model.history) > 5
    assert min(b - a for a, b in itertools.pairwise(model.history)) > -1e-10
    some = (~torch.isnan(joined(dict(batch.data)))).any(1)
    assert model.history[-1] == pytest.approx(float(model.log_prob(batch)[some].mean()), abs=1e-9)
    assert abs(gradient_along_noise(model, batch)) < 1e-4


def gradient_along_noise(model: ProbabilisticPCA, batch: Batch) -> float:
    up, down = (replace(model, noise_variance=model.noise_variance * factor) for factor in (1.001, 0.999))
    return float(up.log_prob(batch).mean() - down.log_prob(batch).mean()) / 0.002


def test_log_prob_is_the_normal_density_of_the_observed_values() -> None:
    data = sample(rows=60)
    batch = incomplete(data)
    model = ProbabilisticPCA.fit(batch, latent_dim=3)
    assert batch.masks is not None
    log_p, mean, cov = model.log_prob(batch), model.mean.numpy(), covariance(model).numpy()
    for row in range(60):
        columns = [
            column
            for name in ("a", "b", "c")
            if batch.masks[name][row]
            for column in range(model.columns[name].start, model.columns[name].stop)
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
    model, alone = ProbabilisticPCA.fit(batch, latent_dim=2), ProbabilisticPCA.fit(Batch(data), latent_dim=2)
    assert model.history[-1] == pytest.approx(alone.history[-1], abs=1e-12)
    assert model.log_prob(batch)[50:].tolist() == [0.0] * 5


def test_order_of_rows_and_batches_is_irrelevant() -> None:
    batch = incomplete(sample())
    one = ProbabilisticPCA.fit(batch, latent_dim=2)
    order = torch.randperm(400)
    many = ProbabilisticPCA.fit([batch[order[:150]], batch[order[150:151]], batch[order[151:]]], latent_dim=2)
    torch.testing.assert_close(covariance(many), covariance(one), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(many.log_prob(batch[order]), one.log_prob(batch)[order], rtol=1e-8, atol=1e-8)


def test_a_modality_left_out_of_data_is_missing() -> None:
    data = sample()
    absent = Batch({name: x for name, x in data.items() if name != "b"})
    masked = Batch(data, {"b": torch.zeros(400, dtype=torch.bool)})
    model = ProbabilisticPCA.fit([Batch(data), absent], latent_dim=2)
    torch.testing.assert_close(model.log_prob(absent), model.log_prob(masked), rtol=0, atol=0)


def test_large_means_cost_no_digits() -> None:
    near, far = (ProbabilisticPCA.fit(incomplete(sample(offset=offset)), latent_dim=2) for offset in (0.0, 1e4))
    assert far.history[-1] == pytest.approx(near.history[-1], abs=1e-4)


def test_values_far_from_float64_are_computed_in_it() -> None:
    data = sample()
    model = ProbabilisticPCA.fit(Batch({name: x.float() for name, x in data.items()}), latent_dim=2)
    assert model.history[-1] == pytest.approx(ProbabilisticPCA.fit(Batch(data), latent_dim=2).history[-1], abs=1e-5)


@pytest.mark.parametrize("latent_dim", [0, 9])
def test_latent_dim_out_of_range_is_refused(latent_dim: int) -> None:
    with pytest.raises(ValueError, match=f"below the 9 features; got {latent_dim}"):
        ProbabilisticPCA.fit(Batch(sample()), latent_dim)


def test_rows_without_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="more directions than latent_dim; got latent_dim=2"):
        ProbabilisticPCA.fit(Batch(sample(scale=0.0)), latent_dim=2)


def test_integers_changed_sizes_and_unknown_modalities_are_refused() -> None:
    data = sample()
    model = ProbabilisticPCA.fit(Batch(data), latent_dim=2)
    with pytest.raises(ValueError, match=r"got torch\.uint8 for 'a'"):
        ProbabilisticPCA.fit(Batch({"a": torch.zeros(3, 4, dtype=torch.uint8)}), latent_dim=2)
    with pytest.raises(ValueError, match="keeps its size; got 'a' with 3 and 2"):
        ProbabilisticPCA.fit([Batch(data), Batch({"a": data["a"][:, :2]})], latent_dim=2)
    with pytest.raises(ValueError, match=r"\['a'\] have 3 features in the fit; got 2"):
        model.log_prob(Batch({"a": data["a"][:, :2]}))
    with pytest.raises(ValueError, match=r"of the fit, \['a', 'b', 'c'\]; got \['d'\]"):
        model.log_prob(Batch({"d": data["a"]}))
