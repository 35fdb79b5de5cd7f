"""A likelihood of counts with too many zeros."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dmvae.config.likelihoods import LikelihoodSpec, Param
from dmvae.distributions.likelihoods import Likelihood


class ZeroInflatedPoisson(Likelihood):
    """Independent counts that are 0 with probability p, and else Poisson; the output is (log-mean, logit of p)."""

    spec: ClassVar[LikelihoodSpec] = LikelihoodSpec(
        values="counts", params={"size_factor": Param(), "rate": Param(), "floor": Param(minimum=0)}
    )
    support = "whole numbers of 0 or more"

    def __init__(
        self, shape: tuple[int, ...], size_factor: float = 1.0, rate: float = 1.0, floor: float = 1e-6
    ) -> None:
        super().__init__(shape)
        self.floor, self.output_shape = floor, (*shape, 2)

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        """Return the log-probability in nats, summed over the modality's elements."""
        log_mean, logit = output.unbind(-1)
        mean = log_mean.exp() + self.floor
        poisson = value * mean.log() - mean - torch.lgamma(value + 1)
        zero = torch.logaddexp(F.logsigmoid(logit), F.logsigmoid(-logit) - mean)
        return self._sum(torch.where(value == 0, zero, F.logsigmoid(-logit) + poisson))

    def mean(self, output: Tensor) -> Tensor:
        """Return (1 - p) mu."""
        log_mean, logit = output.unbind(-1)
        return torch.sigmoid(-logit) * (log_mean.exp() + self.floor)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts."""
        log_mean, logit = output.unbind(-1)
        drawn = torch.poisson(log_mean.exp() + self.floor, generator=generator)
        return drawn * torch.bernoulli(torch.sigmoid(-logit), generator=generator)

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is a whole number of 0 or more."""
        return bool(((value >= 0) & (value == value.floor())).all())
