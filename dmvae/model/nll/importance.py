"""A stream of importance weights per row: its log-mean, standard error, effective sample size and Pareto shape.

Weights arrive as logs and in chunks. Memory does not grow with their number.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MIN_TRUSTED_DRAWS = 256
"""Fewer weights than this say nothing about the tail of their distribution."""
_MAX_TAIL = 1000  # enough for the shape to about 0.05; bounds memory


def strata(counts: tuple[int, ...], start: int, num: int, device: torch.device) -> Int64[Tensor, " {num}"]:
    """Return the stratum of draws `start` to `start + num`, strata of `counts` draws following one another."""
    ends = torch.tensor(counts, device=device).cumsum(0)
    return torch.bucketize(torch.arange(start, start + num, device=device), ends[:-1], right=True)


def pieces(num: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Cut `num` draws into pieces (start, length) of at most `chunk`."""
    return ((start, min(chunk, num - start)) for start in range(0, num, chunk))


class WeightSummary:
    """Running sums of every row's weights and of their squares per stratum, and the largest weights overall."""

    def __init__(self, rows: int, counts: tuple[int, ...], device: torch.device) -> None:
        self.counts = counts
        self.num_draws = sum(counts)
        self.seen = 0
        tail = min(int(0.2 * self.num_draws), int(3 * math.sqrt(self.num_draws)), _MAX_TAIL)
        self.sum = torch.zeros(rows, len(counts), dtype=torch.float64, device=device)  # of exp(log_w - max)
        self.sum_squares = torch.zeros_like(self.sum)
        # finite, so that weights of 0 have a distance from it
        self.max = torch.full_like(self.sum[:, 0], torch.finfo(torch.float64).min)
        self.largest = self.max.unsqueeze(1).expand(rows, tail + 1)

    def add(self, log_w: Float[Tensor, "row draw"]) -> None:
        """Add the next draws of every row."""
        log_w = log_w.double()
        stratum = strata(self.counts, self.seen, log_w.shape[1], log_w.device)
        self.seen += log_w.shape[1]
        new_max = torch.maximum(self.max, log_w.amax(1))
        shrink = torch.exp(self.max - new_max).unsqueeze(1)
        scaled = torch.exp(log_w - new_max.unsqueeze(1))
        self.sum = (self.sum * shrink).index_add(1, stratum, scaled)
        self.sum_squares = (self.sum_squares * shrink.square()).index_add(1, stratum, scaled.square())
        self.max = new_max
        self.largest = torch.cat((self.largest, log_w), dim=1).topk(self.largest.shape[1], dim=1).values

    def log_mean(self) -> Float[Tensor, " row"]:
        """Return the log of the weights' mean."""
        return self.max + torch.log(self.sum.sum(1)) - math.log(self.num_draws)

    def effective_sample_size(self) -> Float[Tensor, " row"]:
        """Return (sum w)^2 / sum w^2."""
        return self.sum.sum(1).square() / self.sum_squares.sum(1)

    def standard_error(self) -> Float[Tensor, " row"]:
        """Return the delta-method standard error of the log of the mean, variances being those within strata.

        se = sqrt(sum_c n_c Var_c(w)) / sum w
        """
        n = torch.tensor(self.counts, dtype=torch.float64, device=self.sum.device)
        variance = (self.sum_squares - self.sum.square() / n).clamp(min=0) / (n - 1)
        return (n * variance).sum(1).sqrt() / self.sum.sum(1)

    def khat(self) -> Float[Tensor, " row"]:
        """Return the Pareto shape of the largest weights; NaN with fewer than 256 draws."""
        if self.num_draws < MIN_TRUSTED_DRAWS:
            return torch.full_like(self.max, math.nan)
        weights = torch.exp(self.largest - self.largest[:, :1])
        return pareto_shape(weights[:, :-1] - weights[:, -1:])


def pareto_shape(exceedances: Float[Tensor, "row tail"]) -> Float[Tensor, " row"]:
    """Fit a generalised Pareto distribution to each row's exceedances and return its shape k.

    Weakly regularised towards 0.5, as Pareto-smoothed importance sampling does. All exceedances 0: shape 0.

    Source: Zhang and Stephens 2009; Vehtari et al. 2024, appendix.
    """
    x = exceedances.sort(dim=1).values
    n = x.shape[1]
    constant = x[:, -1] <= 0
    x = torch.where(constant.unsqueeze(1), 1.0, x)
    num = 30 + int(math.sqrt(n))
    grid = 1 - torch.sqrt(num / (torch.arange(1, num + 1, dtype=x.dtype, device=x.device) - 0.5))
    # the tiny floor: most weights of a row may be the same to the last bit
    quartile = x[:, max(int(n / 4 + 0.5) - 1, 0)].clamp(min=1e-12 * x[:, -1])
    theta = grid / (3 * quartile.unsqueeze(1)) + 1 / x[:, -1:]
    shape = torch.stack([torch.log1p(-candidate.unsqueeze(1) * x).mean(1) for candidate in theta.unbind(1)], dim=1)
    log_like = n * (torch.log(-theta / shape) - shape - 1)
    posterior = torch.softmax(log_like.nan_to_num(nan=-math.inf), dim=1)
    best = (theta * posterior).sum(1, keepdim=True)
    shape = torch.log1p(-best * x).mean(1)
    return torch.where(constant, 0.0, (n * shape + 5) / (n + 10))
