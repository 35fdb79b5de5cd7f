"""Probabilistic PCA of incomplete rows: the linear model that a DMVAE of the same latent size has to beat.

    z ~ N(0, I),   x = W z + mu + e,   e ~ N(0, s2 I),   x_A ~ N(mu_A, W_A W_A' + s2 I)

x is all modalities of a row, flattened and joined; A is the set of modalities that the row has. To the fit, rows
with the same A are their number, sum and second moments, which add over batches.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.batch import Batch, MultimodalRows

Pattern = tuple[str, ...]
"""The modalities that a row has, sorted; never empty."""

_LEAST_NOISE = 1e-10  # times the features' mean variance; float64 cannot tell less from nothing


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, sum and second moments of rows that have the same modalities, in float64."""

    count: int
    total: Float[Tensor, " feature"]
    products: Float[Tensor, "feature feature"]

    @classmethod
    def of(cls, values: Float[Tensor, "row feature"]) -> Self:
        """Add rows up."""
        return cls(len(values), values.sum(0), values.T @ values)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)

    def about(self, origin: Float[Tensor, " feature"]) -> "Moments":
        """Return the moments of the rows less `origin`."""
        total = self.total - self.count * origin
        products = self.products - torch.outer(origin, self.total) - torch.outer(total, origin)
        return Moments(self.count, total, products)


@dataclass(frozen=True, eq=False)
class ProbabilisticPCA:
    """Probabilistic PCA, in float64 on the CPU.

    Attributes:
        columns: where each modality's features are in `weight` and `mean`.
        weight: W.
        mean: mu.
        noise_variance: s2.
        history: log-likelihood of the fit's rows in nats per row, at its start and after each step of EM.
        converged: whether the last step gained less than the tolerance.

    Source: Tipping & Bishop 1999, section 3 and appendix B.
    """

    columns: Mapping[str, slice]
    weight: Float[Tensor, "feature latent"]
    mean: Float[Tensor, " feature"]
    noise_variance: float
    history: tuple[float, ...] = ()
    converged: bool = False

    @classmethod
    def fit(
        cls,
        rows: MultimodalRows | Iterable[MultimodalRows],
        latent_dim: int,
        max_steps: int = 1000,
        tolerance: float = 1e-3,
    ) -> Self:
        """Maximise the likelihood of the observed values by EM.

        EM begins at the eigenvectors of the covariances, each taken over the rows that have both features; for
        complete rows that is the solution. Memory, and the time of a step, grow with the number of distinct sets
        of modalities times the square of the number of features, and not with the number of rows.

        Args:
            rows: one batch or several; rows with nothing do not count.
            latent_dim: at least 1, below the number of features.
            max_steps: of EM, at most.
            tolerance: EM stops when a step gains less, in nats per row.

        Raises:
            ValueError: for values that are not floating-point, a modality whose size changes, a latent_dim out
                of range, or rows that vary in no more than latent_dim directions.
        """
        moments, columns = _gather([rows] if isinstance(rows, MultimodalRows) else rows)
        num_features = sum(_size(span) for span in columns.values())
        if not 1 <= latent_dim < num_features:
            raise ValueError(
                f"latent_dim is at least 1 and below the number of observed features, {num_features}; got {latent_dim}."
            )
        # moments about the mean keep the digits of features whose mean is large
        origin = _observed_mean(moments, columns)
        moments = {pattern: part.about(origin[_index(columns, pattern)]) for pattern, part in moments.items()}
        model = cls._begin(moments, columns, latent_dim)
        history = [model._log_likelihood(moments)]
        for _ in range(max_steps):
            model = model._step(moments)
            history.append(model._log_likelihood(moments))
            if history[-1] - history[-2] < tolerance:
                break
        converged = len(history) > 1 and history[-1] - history[-2] < tolerance
        return replace(model, mean=origin + model.mean, history=tuple(history), converged=converged)

    def log_prob(self, rows: MultimodalRows) -> Float[Tensor, " row"]:
        """Return the exact log-density of what each row has, in nats; 0 for a row with nothing.

        With M = s2 I + W_A' W_A, r = x_A - mu_A, and d the number of observed features:

            log|C| = (d - q) log s2 + log|M|
            r' C^-1 r = (|r|^2 - r' W_A M^-1 W_A' r) / s2

        Raises:
            ValueError: for a modality that the fit did not have, or had with another size.
        """
        log_p = torch.zeros(_num_rows(rows), dtype=torch.float64)
        for pattern, chosen, values in _by_pattern(rows):
            self._check(pattern, values)
            index = _index(self.columns, pattern)
            residual, weight, factor = values - self.mean[index], self.weight[index], self._factor(pattern)
            explained = torch.linalg.solve_triangular(factor, weight.T @ residual.T, upper=False)
            distance = (residual.square().sum(1) - explained.square().sum(0)) / self.noise_variance
            log_p[chosen] = -0.5 * (distance + self._log_normaliser(factor, len(index)))
        return log_p

    @classmethod
    def _begin(cls, moments: Mapping[Pattern, Moments], columns: Mapping[str, slice], latent_dim: int) -> Self:
        """Solve for the leading eigenvectors of covariances over the rows that have both features."""
        num_features = sum(_size(span) for span in columns.values())
        products = torch.zeros(num_features, num_features, dtype=torch.float64)
        pairs = torch.zeros_like(products)
        for pattern, part in moments.items():
            index = _index(columns, pattern)
            products[index[:, None], index] += part.products
            pairs[index[:, None], index] += part.count
        eigenvalues, vectors = torch.linalg.eigh(products / pairs.clamp(min=1))
        rest, largest = eigenvalues[:-latent_dim], eigenvalues[-latent_dim:]
        # covariances of different rows need not be positive definite together: keep the start inside
        noise = max(float(rest.mean()), 1e-3 * float(eigenvalues.mean()))
        weight = vectors[:, -latent_dim:] * torch.sqrt((largest - noise).clamp(min=0))
        return cls(columns, weight, torch.zeros(num_features, dtype=torch.float64), noise)

    def _step(self, moments: Mapping[Pattern, Moments]) -> Self:
        """Return the model after one step of EM.

        Expectation, r = x_A - mu_A:   <z> = M^-1 W_A' r,   <z z'> = s2 M^-1 + <z><z>'
        Maximisation, per modality m over the rows that have it, with z~ = [z, 1] and x less the origin:

            [W_m, mu_m] = (sum x_m <z~>') (sum <z~ z~'>)^-1
            s2          = sum_m sum |x_m - [W_m, mu_m] z~|^2 / (number of observed values)
        """
        latent_dim = self.weight.shape[1]
        cross = torch.zeros(len(self.mean), latent_dim + 1, dtype=torch.float64)
        latent = {name: torch.zeros(latent_dim + 1, latent_dim + 1, dtype=torch.float64) for name in self.columns}
        squares, num_values = 0.0, 0
        for pattern, part in moments.items():
            index = _index(self.columns, pattern)
            inverse = torch.cholesky_inverse(self._factor(pattern))
            project = inverse @ self.weight[index].T
            residual = part.about(self.mean[index])
            z = project @ residual.total
            zz = project @ residual.products @ project.T + part.count * self.noise_variance * inverse
            xz = (part.products - torch.outer(part.total, self.mean[index])) @ project.T
            cross[index] += torch.cat((xz, part.total[:, None]), dim=1)
            count = torch.tensor([[float(part.count)]], dtype=torch.float64)
            both = torch.cat((torch.cat((zz, z[:, None]), dim=1), torch.cat((z[None], count), dim=1)))
            for name in pattern:
                latent[name] = latent[name] + both
            squares += float(part.products.trace())
            num_values += part.count * len(index)
        solution = torch.cat([torch.linalg.solve(latent[name], cross[span].T).T for name, span in self.columns.items()])
        noise = (squares - float((solution * cross).sum())) / num_values
        if noise <= _LEAST_NOISE * squares / num_values:
            raise ValueError(
                f"rows vary in more than latent_dim directions, or their likelihood has no maximum; "
                f"got latent_dim={latent_dim}. Lower it."
            )
        return replace(self, weight=solution[:, :-1], mean=solution[:, -1], noise_variance=noise)

    def _log_likelihood(self, moments: Mapping[Pattern, Moments]) -> float:
        """Return the mean log-density in nats per row."""
        total = 0.0
        for pattern, part in moments.items():
            index = _index(self.columns, pattern)
            weight, factor, residual = self.weight[index], self._factor(pattern), part.about(self.mean[index]).products
            project = torch.cholesky_solve(weight.T, factor)
            distance = float(residual.trace() - ((project @ residual) * weight.T).sum()) / self.noise_variance
            total -= 0.5 * (distance + part.count * self._log_normaliser(factor, len(index)))
        return total / sum(part.count for part in moments.values())

    def _factor(self, pattern: Pattern) -> Float[Tensor, "latent latent"]:
        """Return the Cholesky factor of M = s2 I + W_A' W_A."""
        weight = self.weight[_index(self.columns, pattern)]
        noise = self.noise_variance * torch.eye(weight.shape[1], dtype=torch.float64)
        return torch.linalg.cholesky(noise + weight.T @ weight)

    def _log_normaliser(self, factor: Float[Tensor, "latent latent"], num_features: int) -> float:
        """Return d log(2 pi) + log|C|."""
        log_det = (num_features - len(factor)) * math.log(self.noise_variance)
        return num_features * math.log(2 * math.pi) + log_det + 2 * float(factor.diagonal().log().sum())

    def _check(self, pattern: Pattern, values: Float[Tensor, "row feature"]) -> None:
        known = {name: _size(span) for name, span in self.columns.items()}
        stray = sorted(set(pattern) - set(known))
        if stray:
            raise ValueError(f"rows hold modalities of the fit {sorted(known)}; got {stray}.")
        size = sum(known[name] for name in pattern)
        if values.shape[1] != size:
            raise ValueError(f"{list(pattern)} have {size} features in the fit; got {values.shape[1]}.")


def _gather(batches: Iterable[MultimodalRows]) -> tuple[dict[Pattern, Moments], dict[str, slice]]:
    """Add up the moments of each set of modalities, and lay the modalities out side by side."""
    moments: dict[Pattern, Moments] = {}
    sizes: dict[str, int] = {}
    for batch in batches:
        for pattern, _, values in _by_pattern(batch):
            for name in pattern:
                size = math.prod(batch.data[name].shape[1:])
                if sizes.setdefault(name, size) != size:
                    raise ValueError(f"a modality keeps its size; got {name!r} with {sizes[name]} and {size} features.")
            part = Moments.of(values)
            moments[pattern] = moments[pattern] + part if pattern in moments else part
    columns, start = {}, 0
    for name in sorted(sizes):
        columns[name] = slice(start, start + sizes[name])
        start += sizes[name]
    return moments, columns


def _by_pattern(rows: MultimodalRows) -> Iterator[tuple[Pattern, Int64[Tensor, " chosen"], Tensor]]:
    """Yield each set of modalities, the numbers of the rows that have just these, and their values side by side."""
    names = sorted(rows.data)
    if len(names) == 0 or _num_rows(rows) == 0:
        return
    masks = Batch(rows.data, getattr(rows, "masks", None)).masks or {}
    everywhere = torch.ones(_num_rows(rows), dtype=torch.bool)
    present = torch.stack([masks[name].cpu() if name in masks else everywhere for name in names], dim=1)
    patterns, place = torch.unique(present, dim=0, return_inverse=True)
    for number, here in enumerate(patterns.tolist()):
        pattern = tuple(name for name, has in zip(names, here, strict=True) if has)
        if not pattern:
            continue
        chosen = (place == number).nonzero().squeeze(1)
        yield pattern, chosen, torch.cat([_values(rows, name, chosen) for name in pattern], dim=1)


def _values(rows: MultimodalRows, name: str, chosen: Int64[Tensor, " chosen"]) -> Float[Tensor, "chosen feature"]:
    values = rows.data[name]
    if not values.is_floating_point():
        raise ValueError(f"probabilistic PCA is a density of floating-point values; got {values.dtype} for {name!r}.")
    return values.index_select(0, chosen.to(values.device)).flatten(1).to("cpu", torch.float64)


def _observed_mean(moments: Mapping[Pattern, Moments], columns: Mapping[str, slice]) -> Float[Tensor, " feature"]:
    total = torch.zeros(sum(_size(span) for span in columns.values()), dtype=torch.float64)
    count = torch.zeros_like(total)
    for pattern, part in moments.items():
        index = _index(columns, pattern)
        total[index] += part.total
        count[index] += part.count
    return total / count


def _index(columns: Mapping[str, slice], pattern: Pattern) -> Int64[Tensor, " feature"]:
    return torch.cat([torch.arange(columns[name].start, columns[name].stop) for name in pattern])


def _size(span: slice) -> int:
    return int(span.stop) - int(span.start)


def _num_rows(rows: MultimodalRows) -> int:
    return next((len(values) for values in rows.data.values()), 0)
