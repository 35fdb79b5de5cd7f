"""Factor analysis of incomplete rows: the linear model, exact for every set of modalities.

    z ~ N(0, I),   x = W z + mu + e,   e ~ N(0, diag(v)),   x_A ~ N(mu_A, W_A W_A' + diag(v_A))

x is all modalities of a row, flattened and joined; A is the set of modalities that the row has. With one v for all
features it is probabilistic PCA.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.data.batch import Batch
from dmvae.evaluation.masking import mask_modalities
from dmvae.evaluation.pattern_moments import FitData, Layout, Moments, Noise, Pattern, num_rows, rows_by_pattern

SHRINKAGE = 0.03
"""Of the factor analysis that a model is compared with."""


@dataclass(frozen=True, eq=False)
class FactorAnalysis:
    """Factor analysis, in float64 on the CPU.

    Attributes:
        layout: where each modality's features are in `weight`, `mean` and `noise_variance`.
        weight: W, the loadings.
        mean: mu.
        noise_variance: v.
        unit: each feature's prior deviation.
        history: log-likelihood of the fit's rows in nats per row (those of the prior among them), at its start and
            after each step of EM.
        converged: whether the last step gained less than the tolerance.

    Source: Rubin & Thayer 1982; Tipping & Bishop 1999, section 3 and appendix B, for one noise.
    """

    layout: Layout
    weight: Float[Tensor, "feature factor"]
    mean: Float[Tensor, " feature"]
    noise_variance: Float[Tensor, " feature"]
    unit: Float[Tensor, " feature"]
    history: tuple[float, ...] = ()
    converged: bool = False

    @classmethod
    def fit(
        cls,
        rows: Batch | Iterable[Batch],
        num_factors: int,
        noise: Noise = "own",
        shrinkage: float = SHRINKAGE,
        max_steps: int = 200,
        tolerance: float = 1e-3,
    ) -> "FactorAnalysis":
        """Maximise the likelihood of the observed values by EM.

        EM begins at the eigenvectors of the covariances, each taken over the rows that have both features; for
        complete rows and one noise that is the solution. Memory, and the time of a step, grow with the number of
        distinct sets of modalities times the square of the number of features, and not with the number of rows.

        Args:
            rows: one batch or several; rows with nothing do not count.
            num_factors: at least 1, below the number of features.
            noise: `own`: a variance for each feature of a table (shapes of one dimension) and one for each other
                modality, as the model's learned scales; `one`: a single variance, which is probabilistic PCA.
            shrinkage: towards independent features. The likelihood counts this many rows of independent features for
                each row of data: an inverse Wishart prior of the covariance.
            max_steps: of EM, at most.
            tolerance: EM stops when a step gains less, in nats per row.

        Raises:
            ValueError: for values that are not floating-point, a modality whose shape changes, num_factors out of
                range, or, without shrinkage, rows that vary in no more than num_factors directions.
        """
        return cls._maximise(FitData.of(rows, noise, shrinkage), num_factors, max_steps, tolerance)

    @classmethod
    def _maximise(cls, data: "FitData", num_factors: int, max_steps: int, tolerance: float) -> "FactorAnalysis":
        if not 1 <= num_factors < data.layout.num_features:
            raise ValueError(
                f"num_factors must be at least 1 and below the {data.layout.num_features} features, "
                f"but got {num_factors}."
            )
        model = cls(data.layout, *data.start(num_factors), data.unit)
        history = [model._log_likelihood(data.moments)]
        for _ in range(max_steps):
            model = model._step(data)
            history.append(model._log_likelihood(data.moments))
            if history[-1] - history[-2] < tolerance:
                break
        converged = len(history) > 1 and history[-1] - history[-2] < tolerance
        return replace(model, mean=data.origin + model.mean, history=tuple(history), converged=converged)

    def log_prob(self, rows: Batch) -> Float[Tensor, " row"]:
        """Return the exact log-density of what each row has, in nats; 0 for a row with nothing.

        With r = (x_A - mu_A) / sqrt(v_A), U = W_A / sqrt(v_A) and G = I + U' U:

            log|C|    = sum log v_A + log|G|
            r' C^-1 r = |r|^2 - r' U G^-1 U' r

        Raises:
            ValueError: for a modality that the fit did not have, or had with another size.
        """
        log_p = torch.zeros(len(rows), dtype=torch.float64)
        for chosen, residual, part in self._residuals(rows):
            explained = torch.linalg.solve_triangular(part.factor, part.weight.T @ residual.T, upper=False)
            log_p[chosen] = -0.5 * (residual.square().sum(1) - explained.square().sum(0) + part.log_normaliser)
        return log_p

    def predict(self, rows: Batch, modality: str) -> Float[Tensor, "row value"]:
        """Return the conditional mean of a modality given the others that each row has; the mean for a row with none.

            E[x_m | x_A] = mu_m + W_m G^-1 U' r

        Raises:
            ValueError: for a modality that the fit did not have.
        """
        if modality not in self.layout.shapes:
            raise ValueError(f"Unknown modality {modality!r}. The fit has {sorted(self.layout.shapes)}.")
        return self.complete(mask_modalities(rows, modality))[:, self.layout.columns[modality]]

    def complete(self, rows: Batch) -> Float[Tensor, "row feature"]:
        """Return what each row has, and the conditional means of the rest, side by side.

        Raises:
            ValueError: for a modality that the fit did not have, or had with another size.
        """
        filled = self.mean.repeat(len(rows), 1)
        for chosen, residual, part in self._residuals(rows):
            factors = torch.cholesky_solve(part.weight.T @ residual.T, part.factor)
            filled[chosen] += (self.weight @ factors).T
            filled[chosen[:, None], part.index] = residual * part.deviation + part.mean
        return filled

    def _residuals(self, rows: Batch) -> Iterator[tuple[Int64[Tensor, " chosen"], Tensor, "_Observed"]]:
        """Yield the numbers of the rows of each pattern, their r, and the model of what they have."""
        for pattern, chosen, values in rows_by_pattern(rows):
            part = self._observed(pattern)
            if values.shape[1] != len(part.mean):
                raise ValueError(
                    f"{list(pattern)} must have {len(part.mean)} features as in the fit, but got {values.shape[1]}."
                )
            yield chosen, (values - part.mean) / part.deviation, part

    def _step(self, data: "FitData") -> "FactorAnalysis":
        """Return the model after one step of EM.

        Expectation, with z~ = [z, 1] and x~ = [x_A, 1]:

            <z> = G^-1 U' diag(v_A)^-1/2 [I, -mu_A] x~,   <z~ z~'> = <z~><z~>' + [G^-1, 0; 0, 0]

        Maximisation, for each modality m over the rows that have it:

            [W_m, mu_m] = (sum x_m <z~>') (sum <z~ z~'>)^-1
            v           = <(x - [W, mu] z~)^2>, the mean over the values that share it

        and z ~ N(m, S) is fitted too and taken into W and mu, without which EM is slow where the noise is small
        (parameter expansion, Liu, Rubin & Wu 1998).
        """
        num_factors = self.weight.shape[1]
        cross = torch.zeros(len(self.mean), num_factors + 1, dtype=torch.float64)
        squares, rows = torch.zeros(2, len(self.mean), dtype=torch.float64)
        total = torch.zeros(num_factors + 1, num_factors + 1, dtype=torch.float64)
        latent = {name: torch.zeros_like(total) for name in self.layout.shapes}
        for pattern, root in data.moments:
            part = self._observed(pattern)
            z = torch.cat((torch.cholesky_solve(part.project(root), part.factor).T, root[:, -1:]), dim=1)
            second = z.T @ z
            second[:-1, :-1] += num_rows(root) * torch.cholesky_inverse(part.factor)
            cross[part.index] += root[:, :-1].T @ z
            squares[part.index] += root[:, :-1].square().sum(0)
            rows[part.index] += num_rows(root)
            total += second
            for name in pattern:
                latent[name] += second
        solution = torch.cat(
            [torch.linalg.solve(latent[name], cross[span].T).T for name, span in self.layout.columns.items()]
        )
        variance = data.pool(squares - (solution * cross).sum(1)) / data.pool(rows)
        # float64 cannot tell less from nothing
        if bool((variance <= 1e-10 * data.pool(squares) / data.pool(rows)).any()):
            raise ValueError(
                f"Cannot fit {num_factors} factors: the rows vary in no more directions. "
                "Lower num_factors, or raise shrinkage."
            )
        weight, mean = solution[:, :-1], solution[:, -1]
        z_mean, z_square = total[-1, :-1] / total[-1, -1], total[:-1, :-1] / total[-1, -1]
        z_factor = torch.linalg.cholesky(z_square - torch.outer(z_mean, z_mean))
        return replace(self, weight=weight @ z_factor, mean=mean + weight @ z_mean, noise_variance=variance)

    def _log_likelihood(self, moments: Moments) -> float:
        """Return the mean log-density in nats per row."""
        total = 0.0
        for pattern, root in moments:
            part = self._observed(pattern)
            squares = ((root[:, :-1] - root[:, -1:] * part.mean) / part.deviation).square().sum()
            explained = torch.linalg.solve_triangular(part.factor, part.project(root), upper=False).square().sum()
            total -= 0.5 * float(squares - explained + num_rows(root) * part.log_normaliser)
        return total / sum(num_rows(root) for _, root in moments)

    def _observed(self, pattern: Pattern) -> "_Observed":
        stray = sorted(set(pattern) - set(self.layout.shapes))
        if stray:
            raise ValueError(f"Unknown modalities {stray}. The fit has {sorted(self.layout.shapes)}.")
        index = self.layout.index(pattern)
        deviation = self.noise_variance[index].sqrt()
        weight = self.weight[index] / deviation[:, None]
        gram = torch.eye(weight.shape[1], dtype=torch.float64) + weight.T @ weight
        return _Observed(index, self.mean[index], deviation, weight, torch.linalg.cholesky(gram))


@dataclass(frozen=True, eq=False)
class _Observed:
    """Some modalities' columns, mu_A, sqrt(v_A), U = W_A / sqrt(v_A) and the Cholesky factor of G."""

    index: Int64[Tensor, " feature"]
    mean: Float[Tensor, " feature"]
    deviation: Float[Tensor, " feature"]
    weight: Float[Tensor, "feature factor"]
    factor: Float[Tensor, "factor factor"]

    @property
    def log_normaliser(self) -> Float[Tensor, ""]:
        """Return d log(2 pi) + log|C|."""
        log_det = 2 * (self.deviation.log().sum() + self.factor.diagonal().log().sum())
        return len(self.mean) * math.log(2 * math.pi) + log_det

    def project(self, root: Float[Tensor, "_ _"]) -> Float[Tensor, "factor _"]:
        """Return U' diag(v_A)^-1/2 [I, -mu_A] R'."""
        return self.weight.T @ ((root[:, :-1] - root[:, -1:] * self.mean) / self.deviation).T


def choose_num_factors(rows: Batch, num_folds: int = 3, shrinkage: float = SHRINKAGE) -> int:
    """Return the number of factors under which rows that the fit has not seen are likeliest.

    Numbers are doubled until the held-out log-likelihood gains less than a standard error; a quarter less and a half
    more than the last are tried too. The smallest number that is within a standard error of the best is taken. The
    standard error is that of the difference, paired by row. EM begins so well that a few steps tell.

    Args:
        rows: in any order that does not sort them.
        num_folds: parts that the rows are cut into, each held out once.
        shrinkage: as in `FactorAnalysis.fit`.
    """
    fold = torch.arange(len(rows)) % num_folds
    held_out = [rows[fold == number] for number in range(num_folds)]
    folds = [FitData.of(rows[fold != number], "own", shrinkage) for number in range(num_folds)]
    most = min(folds[0].layout.num_features - 1, len(rows))
    scores: dict[int, Tensor] = {}

    def score(num_factors: int) -> Float[Tensor, " row"]:
        if num_factors not in scores:
            fits = [FactorAnalysis._maximise(data, num_factors, max_steps=5, tolerance=1e-2) for data in folds]
            scores[num_factors] = torch.cat([fit.log_prob(part) for fit, part in zip(fits, held_out, strict=True)])
        return scores[num_factors]

    def gains(more: int, fewer: int) -> bool:
        gain = score(more) - score(fewer)
        return float(gain.mean()) > float(gain.std()) / math.sqrt(len(rows))

    number = 1
    while 2 * number <= most and gains(2 * number, number):
        number *= 2
    tried = sorted({max(1, 3 * number // 4), number, min(most, 3 * number // 2)})
    best = max(tried, key=lambda tried_number: float(score(tried_number).mean()))
    return next(few for few in tried if few == best or not gains(best, few))


def fit_factor_analysis(rows: Batch | Iterable[Batch], sample: Batch) -> FactorAnalysis:
    """Fit rows with the number of factors that `choose_num_factors` finds in a sample of them."""
    return FactorAnalysis.fit(rows, choose_num_factors(sample))
