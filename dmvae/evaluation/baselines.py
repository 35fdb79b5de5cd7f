"""Probabilistic PCA of incomplete rows: the linear model that a DMVAE of the same latent size has to beat.

    z ~ N(0, I),   x = W z + mu + e,   e ~ N(0, s2 I),   x_A ~ N(mu_A, W_A W_A' + s2 I)

x is all modalities of a row, flattened and joined; A is the set of modalities that the row has. All that the fit
needs of the rows with the same A is the sum of [x_A, 1] [x_A, 1]', which adds over batches.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dmvae.data.batch import Batch

Pattern = tuple[str, ...]
"""The modalities that a row has, sorted; never empty."""
Moments = Mapping[Pattern, Float[Tensor, "_ _"]]
"""Per pattern the sum over its rows of [x_A, 1] [x_A, 1]': second moments, sums, the number of rows in the corner."""


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
        rows: Batch | Iterable[Batch],
        latent_dim: int,
        max_steps: int = 1000,
        tolerance: float = 1e-4,
    ) -> "ProbabilisticPCA":
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
        moments, columns = _gather([rows] if isinstance(rows, Batch) else rows)
        num_features = _index(columns, tuple(columns)).numel()
        if not 1 <= latent_dim < num_features:
            raise ValueError(f"latent_dim is at least 1 and below the {num_features} features; got {latent_dim}.")
        # moments about the mean keep the digits of features whose mean is large
        origin, moments = _centre(moments, columns)
        model = cls._begin(moments, columns, latent_dim)
        history = [model._log_likelihood(moments)]
        for _ in range(max_steps):
            model = model._step(moments)
            history.append(model._log_likelihood(moments))
            if history[-1] - history[-2] < tolerance:
                break
        converged = len(history) > 1 and history[-1] - history[-2] < tolerance
        return replace(model, mean=origin + model.mean, history=tuple(history), converged=converged)

    def log_prob(self, rows: Batch) -> Float[Tensor, " row"]:
        """Return the exact log-density of what each row has, in nats; 0 for a row with nothing.

        With M = s2 I + W_A' W_A, r = x_A - mu_A, and d the number of observed features:

            log|C| = (d - q) log s2 + log|M|
            r' C^-1 r = (|r|^2 - r' W_A M^-1 W_A' r) / s2

        Raises:
            ValueError: for a modality that the fit did not have, or had with another size.
        """
        log_p = torch.zeros(len(rows), dtype=torch.float64)
        for pattern, chosen, values in _by_pattern(rows):
            stray = sorted(set(pattern) - set(self.columns))
            if stray:
                raise ValueError(f"rows hold modalities of the fit, {sorted(self.columns)}; got {stray}.")
            weight, mean, factor = self._observed(pattern)
            if values.shape[1] != len(mean):
                raise ValueError(f"{list(pattern)} have {len(mean)} features in the fit; got {values.shape[1]}.")
            residual = values - mean
            explained = torch.linalg.solve_triangular(factor, weight.T @ residual.T, upper=False)
            distance = residual.square().sum(1) - explained.square().sum(0)
            log_p[chosen] = -0.5 * (distance / self.noise_variance + self._log_normaliser(factor, len(mean)))
        return log_p

    def predict(self, rows: Batch, modality: str) -> Float[Tensor, "row ..."]:
        """Return the conditional mean of a modality given the others that each row has, in the modality's shape.

            E[x_m | x_A] = mu_m + W_m M^-1 W_A' (x_A - mu_A)

        A row with nothing else has the mean.

        Raises:
            ValueError: for a modality that the fit did not have.
        """
        if modality not in self.columns:
            raise ValueError(f"modalities of the fit are {sorted(self.columns)}; got {modality!r}.")
        span = self.columns[modality]
        predicted = self.mean[span].expand(len(rows), -1).clone()
        others = {name: values for name, values in rows.data.items() if name != modality}
        masks = {name: mask for name, mask in (rows.masks or {}).items() if name != modality}
        for pattern, chosen, values in _by_pattern(Batch(others, masks)):
            weight, mean, factor = self._observed(pattern)
            latent = torch.cholesky_solve(weight.T @ (values - mean).T, factor)
            predicted[chosen] += (self.weight[span] @ latent).T
        return predicted

    @classmethod
    def _begin(cls, moments: Moments, columns: Mapping[str, slice], latent_dim: int) -> "ProbabilisticPCA":
        """Solve for the leading eigenvectors of covariances over the rows that have both features."""
        num_features = _index(columns, tuple(columns)).numel()
        products = torch.zeros(num_features, num_features, dtype=torch.float64)
        pairs = torch.zeros_like(products)
        for pattern, part in moments.items():
            index = _index(columns, pattern)
            products[index[:, None], index] += part[:-1, :-1]
            pairs[index[:, None], index] += part[-1, -1]
        eigenvalues, vectors = torch.linalg.eigh(products / pairs.clamp(min=1))
        # covariances of different rows need not be positive definite together: the start stays inside
        noise = max(float(eigenvalues[:-latent_dim].mean()), 1e-3 * float(eigenvalues.mean()))
        weight = vectors[:, -latent_dim:] * torch.sqrt((eigenvalues[-latent_dim:] - noise).clamp(min=0))
        return cls(columns, weight, torch.zeros(num_features, dtype=torch.float64), noise)

    def _step(self, moments: Moments) -> "ProbabilisticPCA":
        """Return the model after one step of EM.

        Expectation, with z~ = [z, 1] and x~ = [x_A, 1]:

            <z> = M^-1 W_A' [I, -mu_A] x~,   <z~ z~'> = <z~><z~>' + s2 [M^-1, 0; 0, 0]

        Maximisation, for each modality m over the rows that have it:

            [W_m, mu_m] = (sum x_m <z~>') (sum <z~ z~'>)^-1
            s2          = sum_m sum <|x_m - [W_m, mu_m] z~|^2> / (number of observed values)

        and z ~ N(m, S) is fitted too and taken into W and mu, without which EM is slow where s2 is small
        (parameter expansion, Liu, Rubin & Wu 1998).
        """
        latent_dim = self.weight.shape[1]
        cross = torch.zeros(len(self.mean), latent_dim + 1, dtype=torch.float64)
        total = torch.zeros(latent_dim + 1, latent_dim + 1, dtype=torch.float64)
        latent = {name: torch.zeros_like(total) for name in self.columns}
        squares, num_values = 0.0, 0.0
        for pattern, part in moments.items():
            weight, mean, factor = self._observed(pattern)
            z = torch.cat((torch.cholesky_solve(_against(weight, mean), factor) @ part, part[-1:]))
            cross[_index(self.columns, pattern)] += z[:, :-1].T
            second = torch.cat((z @ _against(weight, mean).T @ torch.cholesky_inverse(factor), z[:, -1:]), dim=1)
            second[:-1, :-1] += part[-1, -1] * self.noise_variance * torch.cholesky_inverse(factor)
            total += second
            for name in pattern:
                latent[name] += second
            squares += float(part[:-1, :-1].trace())
            num_values += float(part[-1, -1]) * len(mean)
        solution = torch.cat([torch.linalg.solve(latent[name], cross[span].T).T for name, span in self.columns.items()])
        noise = (squares - float((solution * cross).sum())) / num_values
        if noise <= 1e-10 * squares / num_values:  # float64 cannot tell less from nothing
            raise ValueError(f"rows vary in more directions than latent_dim; got latent_dim={latent_dim}. Lower it.")
        weight, mean = solution[:, :-1], solution[:, -1]
        z_mean, z_square = total[-1, :-1] / total[-1, -1], total[:-1, :-1] / total[-1, -1]
        z_factor = torch.linalg.cholesky(z_square - torch.outer(z_mean, z_mean))
        return replace(self, weight=weight @ z_factor, mean=mean + weight @ z_mean, noise_variance=noise)

    def _log_likelihood(self, moments: Moments) -> float:
        """Return the mean log-density in nats per row."""
        total = 0.0
        for pattern, part in moments.items():
            weight, mean, factor = self._observed(pattern)
            squares = part[:-1, :-1].trace() - 2 * mean @ part[-1, :-1] + part[-1, -1] * mean.square().sum()
            project = _against(weight, mean)
            explained = torch.cholesky_solve(project @ part @ project.T, factor).trace()
            normaliser = part[-1, -1] * self._log_normaliser(factor, len(mean))
            total -= 0.5 * float((squares - explained) / self.noise_variance + normaliser)
        return total / sum(float(part[-1, -1]) for part in moments.values())

    def _observed(self, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_A, mu_A and the Cholesky factor of M = s2 I + W_A' W_A."""
        index = _index(self.columns, pattern)
        weight = self.weight[index]
        noise = self.noise_variance * torch.eye(weight.shape[1], dtype=torch.float64)
        return weight, self.mean[index], torch.linalg.cholesky(noise + weight.T @ weight)

    def _log_normaliser(self, factor: Float[Tensor, "latent latent"], num_features: int) -> float:
        """Return d log(2 pi) + log|C|."""
        log_det = (num_features - len(factor)) * math.log(self.noise_variance)
        return num_features * math.log(2 * math.pi) + log_det + 2 * float(factor.diagonal().log().sum())


def _against(weight: Float[Tensor, "feature latent"], mean: Float[Tensor, " feature"]) -> Float[Tensor, "latent _"]:
    """Return W' [I, -mu], which takes [x, 1] to W' (x - mu)."""
    return torch.cat((weight.T, -(weight.T @ mean)[:, None]), dim=1)


def _gather(batches: Iterable[Batch]) -> tuple[Moments, dict[str, slice]]:
    """Add up the moments of each set of modalities, and lay the modalities out side by side."""
    moments: dict[Pattern, Tensor] = {}
    sizes: dict[str, int] = {}
    for batch in batches:
        for pattern, _, values in _by_pattern(batch):
            for name in pattern:
                size = math.prod(batch.data[name].shape[1:])
                if sizes.setdefault(name, size) != size:
                    raise ValueError(f"a modality keeps its size; got {name!r} with {sizes[name]} and {size} features.")
            extended = torch.cat((values, torch.ones_like(values[:, :1])), dim=1)
            moments[pattern] = moments.get(pattern, 0.0) + extended.T @ extended
    names = sorted(sizes)
    ends = torch.tensor([sizes[name] for name in names]).cumsum(0).tolist()
    return moments, {name: slice(end - sizes[name], end) for name, end in zip(names, ends, strict=True)}


def _centre(moments: Moments, columns: Mapping[str, slice]) -> tuple[Float[Tensor, " feature"], Moments]:
    """Return each feature's observed mean, and the moments about it."""
    sums, counts = torch.zeros(2, _index(columns, tuple(columns)).numel(), dtype=torch.float64)
    for pattern, part in moments.items():
        sums[_index(columns, pattern)] += part[-1, :-1]
        counts[_index(columns, pattern)] += part[-1, -1]
    origin = sums / counts
    centred = {}
    for pattern, part in moments.items():
        shift = torch.cat((origin[_index(columns, pattern)], origin.new_zeros(1)))
        part = part - torch.outer(shift, part[-1])
        centred[pattern] = part - torch.outer(part[:, -1], shift)
    return origin, centred


def _by_pattern(rows: Batch) -> Iterator[tuple[Pattern, Int64[Tensor, " chosen"], Float[Tensor, "chosen _"]]]:
    """Yield each set of modalities, the numbers of the rows that have just these, and their values side by side."""
    names, masks, everywhere = sorted(rows.data), rows.masks or {}, torch.ones(len(rows), dtype=torch.bool)
    for name in names:
        if not rows.data[name].is_floating_point():
            raise ValueError(f"a density is one of floating-point values; got {rows.data[name].dtype} for {name!r}.")
    if not names:
        return
    present = torch.stack([masks[name].cpu() if name in masks else everywhere for name in names], dim=1)
    patterns, place = torch.unique(present, dim=0, return_inverse=True)
    for number, here in enumerate(patterns.tolist()):
        pattern = tuple(name for name, has in zip(names, here, strict=True) if has)
        if pattern:
            chosen = (place == number).nonzero().squeeze(1)
            values = [rows.data[name][chosen.to(rows.data[name].device)].flatten(1) for name in pattern]
            yield pattern, chosen, torch.cat(values, dim=1).to("cpu", torch.float64)


def _index(columns: Mapping[str, slice], pattern: Pattern) -> Int64[Tensor, " feature"]:
    spans = [torch.arange(columns[name].start, columns[name].stop) for name in pattern]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *spans])
