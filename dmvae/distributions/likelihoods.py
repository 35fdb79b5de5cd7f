"""log p(x_m | z) of each kind of modality: normalised densities or probabilities, in nats."""

import math
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.config.model import DMVAEConfig

_OF_ANY_MODULE = frozenset(vars(nn.Module()))


class Likelihood(nn.Module):
    """The distribution of one modality given its decoder's output.

    Leading dimensions are free and broadcast: a decoder's output `(sources, rows, *output_shape)` may meet
    values `(rows, *shape)`.

    Attributes:
        shape: shape of one row of the modality.
        output_shape: what a decoder has to return for one row.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.output_shape = shape

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return log p(value | output) in nats, summed over the modality's elements."""
        raise NotImplementedError

    @property
    def kind(self) -> Hashable | None:
        """What likelihoods that are the same function have in common; None for one with tensors of its own."""
        facts = {name: value for name, value in vars(self).items() if name not in _OF_ANY_MODULE}
        plain = all(isinstance(value, int | float | str | tuple | None) for value in facts.values())
        holds = self._parameters or self._buffers or self._modules
        return (type(self), *facts.items()) if plain and not holds else None

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | output] on the data's scale."""
        raise NotImplementedError

    def mean_at(self, output: Float[Tensor, "..."], size_factors: Float[Tensor, " row"]) -> Tensor:
        """Return E[x | output] for an output `(..., row, *shape)` of rows with these size factors (of counts)."""
        return self.mean(output)

    def observe(self, value: Tensor, size_factors: Tensor | None) -> Tensor:
        """Return observed rows as `log_prob`, `score` and `information` are given them: their values, as a rule."""
        return value

    def is_density(self, value: Tensor) -> bool:
        """Tell whether `log_prob` of these values is a log-density or log-probability."""
        return True

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is one that the distribution can give, or at least judge."""
        return True

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return d log p(value | output) / d output, smoothed where the density has a kink.

        By automatic differentiation unless the likelihood knows it.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(leaf, value).sum(), leaf)
        return score

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' F J of each row's tangents J of the output, F being the Fisher information in the output.

        Unless the likelihood knows F this is the curvature of -log p at the value, by differentiating twice, with
        directions of negative curvature left out.
        """
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            (score,) = torch.autograd.grad(self.log_prob(leaf, value).sum(), leaf, create_graph=True)
            if not score.requires_grad:
                return tangents.new_zeros(*tangents.shape[:2], tangents.shape[1])
            curved = [
                torch.autograd.grad(score, leaf, tangent, retain_graph=True, materialize_grads=True)[0]
                for tangent in tangents.unbind(1)
            ]
        product = -tangents.flatten(2) @ torch.stack(curved, dim=1).flatten(2).mT
        values, vectors = torch.linalg.eigh(0.5 * (product + product.mT).nan_to_num())
        kept: Tensor = (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mT
        return kept

    def _sum(self, elements: Tensor) -> Tensor:
        return elements.flatten(-len(self.shape)).sum(-1)


class _LocationScale(Likelihood):
    """A location from the decoder and one scale for the whole modality, fixed or learned."""

    def __init__(self, shape: tuple[int, ...], scale: float | int | str = 1.0) -> None:
        super().__init__(shape)
        # a fixed scale stays a Python number, exact in every dtype
        learned = scale == "learned"
        self.log_scale: Tensor | float = nn.Parameter(torch.zeros(())) if learned else math.log(float(scale))

    def mean(self, output: Tensor) -> Tensor:
        """Return the location, which is the mean."""
        return output

    def _log_density(self, distance: Tensor, power: int, log_normaliser: float) -> Tensor:
        """-distance / (power s^power) - size (log s + log_normaliser), for a distance summed over elements."""
        log_scale = self.log_scale
        precision = torch.exp(-power * log_scale) if isinstance(log_scale, Tensor) else math.exp(-power * log_scale)
        return distance * precision * (-1.0 / power) - math.prod(self.shape) * (log_scale + log_normaliser)

    @property
    def _scale(self) -> Tensor | float:
        return torch.exp(self.log_scale) if isinstance(self.log_scale, Tensor) else math.exp(self.log_scale)


class Normal(_LocationScale):
    """Independent normals: -0.5 ((x - y) / s)^2 - log s - 0.5 log(2 pi)."""

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return the log-density in nats, summed over the modality's elements."""
        return self._log_density(self._sum(_squares(output, value)), 2, 0.5 * math.log(2 * math.pi))

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return (x - y) / s^2."""
        return (value - output) / self._scale**2

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' J / s^2."""
        return _gram(tangents / self._scale)


class Laplace(_LocationScale):
    """Independent Laplace distributions: -|x - y| / s - log(2 s)."""

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return the log-density in nats, summed over the modality's elements."""
        return self._log_density(self._sum((value - output).abs()), 1, math.log(2))

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return (x - y) / (s r), the score of the density smoothed near its kink; r as in `information`."""
        return (value - output) * self._weight(output, value)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(1 / (s r)) J with r = sqrt((x - y)^2 + (s / 2)^2): iteratively reweighted least squares.

        The Fisher information 1 / s^2 is the mean curvature, but at a value the curvature is 0 almost everywhere: a
        Gaussian with it is far too narrow where x - y is large.
        """
        return _gram(tangents * self._weight(output, value).sqrt().unsqueeze(1))

    def _weight(self, output: Tensor, value: Tensor) -> Tensor:
        scale = self._scale
        return 1 / (scale * torch.sqrt((value - output).square() + 0.25 * scale**2))


class Bernoulli(Likelihood):
    """Independent Bernoulli variables with the decoder's output as logits.

    Grey values in [0, 1] are accepted (binary cross entropy); for them this is no density.
    """

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return x log p + (1 - x) log(1 - p), summed over the modality's elements."""
        return self._sum(value * output - F.softplus(output))

    def mean(self, output: Tensor) -> Tensor:
        """Return the probabilities of 1."""
        return torch.sigmoid(output)

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value lies in [0, 1]."""
        return bool(((value >= 0) & (value <= 1)).all())

    def is_density(self, value: Tensor) -> bool:
        """Tell whether every value is 0 or 1."""
        return bool(((value == 0) | (value == 1)).all())

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return x - p."""
        return value - torch.sigmoid(output)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(p (1 - p)) J."""
        p = torch.sigmoid(output)
        return _gram(tangents * torch.sqrt(p * (1 - p)).unsqueeze(1))


class Counts(Likelihood):
    """Counts 0, 1, 2, ... with the decoder's output as the logarithm of their mean at size factor 1.

    Observed rows carry their size factor: `observe` makes `(rows, size + 1)` of them, the flattened counts and the
    size factor's logarithm, which is added to the output. Counts by themselves are taken with their total.

    Attributes:
        size_factor: of rows for which none is known, because they lack the modality.
        start: what a decoder had best give before it is trained: the logarithm of an element's mean at size factor 1.
            Far from it training takes long, and stays in a worse place.
    """

    def __init__(self, shape: tuple[int, ...], size_factor: float = 1.0, rate: float | None = None) -> None:
        super().__init__(shape)
        self.size_factor = float(size_factor)
        self.start = -math.log(math.prod(shape)) if rate is None else math.log(rate)

    def observe(self, value: Tensor, size_factors: Tensor | None) -> Tensor:
        """Return the counts and the logarithm of the size factor; None or NaN: the row's total, or 1 of only zeros."""
        counts = value.flatten(1)
        sizes = counts.sum(1).clamp(min=1)
        if size_factors is not None:
            sizes = torch.where(size_factors.isnan(), sizes, size_factors)
        return torch.cat((counts, sizes.log().unsqueeze(1)), dim=1)

    def mean(self, output: Tensor) -> Tensor:
        """Return the mean at the size factor of rows for which none is known."""
        return self.size_factor * output.exp()

    def mean_at(self, output: Float[Tensor, "..."], size_factors: Float[Tensor, " row"]) -> Tensor:
        """Return the size factor times exp of the output."""
        return output.exp() * size_factors.view(-1, *(1 for _ in self.shape))

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is a whole number of 0 or more."""
        return bool(((value >= 0) & (value == value.floor()) & value.isfinite()).all())

    def _split(self, output: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return flat counts and the logarithm of their means."""
        size = math.prod(self.shape)
        if value.shape[-1] != size + 1:
            leading = value.shape[: value.dim() - len(self.shape)]
            value = self.observe(value.reshape(-1, *self.shape).to(output.dtype), None).view(*leading, size + 1)
        return value[..., :-1], output.flatten(-len(self.shape)) + value[..., -1:]


class Poisson(Counts):
    """Independent Poisson counts: x log mu - mu - log x!."""

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over the modality's elements."""
        counts, log_mean = self._split(output, value)
        # of the rows, not of every draw: cheap even in float64, where sums of large terms keep their digits
        normaliser = torch.lgamma(counts.double() + 1).sum(-1).to(output.dtype)
        return (counts * log_mean - log_mean.exp()).sum(-1) - normaliser

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return x - mu."""
        counts, log_mean = self._split(output, value)
        return (counts - log_mean.exp()).view_as(output)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(mu) J."""
        _, log_mean = self._split(output, value)
        return _gram(tangents.flatten(2) * torch.exp(0.5 * log_mean).unsqueeze(1))


class NegativeBinomial(Counts):
    """Independent negative binomial counts of mean mu and variance mu + mu^2 / r, with dispersion r.

        log p = log Gamma(x + r) / (Gamma(r) r^x x!) + x log mu - (x + r) log(1 + mu / r)

    Poisson counts are the limit of large r.

    Args:
        shape: of one row.
        dispersion: r, a number, or "learned" for one of each element.
        size_factor: of rows for which none is known.
        rate: an element's mean at size factor 1, about; None: its share of the total if all are alike.

    Source: Lopez et al. 2018 (scVI), whose inverse dispersion theta is r.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dispersion: float | int | str = "learned",
        size_factor: float = 1.0,
        rate: float | None = None,
    ) -> None:
        super().__init__(shape, size_factor, rate)
        learned = dispersion == "learned"
        self.log_dispersion: Tensor | float = (
            nn.Parameter(torch.zeros(math.prod(shape))) if learned else math.log(float(dispersion))
        )

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over the modality's elements."""
        counts, log_mean = self._split(output, value)
        log_r = torch.as_tensor(self.log_dispersion, dtype=torch.float64, device=output.device)
        normaliser = _log_normaliser(counts, log_r.expand(counts.shape[-1])).to(output.dtype)
        log_r = log_r.to(output.dtype)
        return (counts * log_mean - (counts + log_r.exp()) * F.softplus(log_mean - log_r)).sum(-1) + normaliser

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return (x - mu) r / (mu + r)."""
        counts, log_mean = self._split(output, value)
        r = self._dispersion(output)
        return (counts - (counts + r) * torch.sigmoid(log_mean - r.log())).view_as(output)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' diag(mu r / (mu + r)) J."""
        _, log_mean = self._split(output, value)
        r = self._dispersion(output)
        weight = r * torch.sigmoid(log_mean - r.log())
        return _gram(tangents.flatten(2) * weight.sqrt().unsqueeze(1))

    def _dispersion(self, output: Tensor) -> Tensor:
        return torch.as_tensor(self.log_dispersion, dtype=output.dtype, device=output.device).exp()


def _log_normaliser(counts: Float[Tensor, "*row size"], log_r: Float[Tensor, " size"]) -> Float[Tensor, "*row"]:
    """Return log Gamma(x + r) / (Gamma(r) r^x x!) in float64, summed over elements; where x = 0 it is 0."""
    flat = counts.reshape(-1, counts.shape[-1])
    row, element = flat.nonzero(as_tuple=True)  # few of cells' counts, and the gamma function is dear
    x, r = flat[row, element].double(), log_r.exp()
    terms = torch.lgamma(x + r[element]) - torch.lgamma(r)[element] - x * log_r[element] - torch.lgamma(x + 1)
    return terms.new_zeros(len(flat)).index_add(0, row, terms).view(counts.shape[:-1])


class Categorical(Likelihood):
    """Independent categories, int64 in [0, classes), with logits in the output's last dimension.

    Elements of the class `pad` fill up a row that is shorter than others: they are no observations, and no element
    has that class with any probability.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, pad: int | None = None) -> None:
        super().__init__(shape)
        self.classes, self.pad = classes, pad
        self.output_shape = (*shape, classes)

    def log_prob(self, output: Tensor, value: Tensor) -> Float[Tensor, "..."]:
        """Return the log-probability in nats, summed over the modality's elements."""
        log_p = torch.log_softmax(self._without_pad(output), dim=-1)
        place = value.unsqueeze(-1) + torch.zeros_like(log_p[..., :1], dtype=torch.int64)
        elements = log_p.expand(*place.shape[:-1], self.classes).gather(-1, place)
        if self.pad is not None:
            elements = elements.masked_fill(place == self.pad, 0.0)
        return self._sum(elements.squeeze(-1))

    def in_support(self, value: Tensor) -> bool:
        """Tell whether every value is one of the classes."""
        return bool(((value >= 0) & (value < self.classes)).all())

    def mean(self, output: Tensor) -> Tensor:
        """Return the probabilities of the classes, in the last dimension."""
        return torch.softmax(self._without_pad(output), dim=-1)

    def likeliest(self, output: Tensor, value: Tensor | None = None) -> Tensor:
        """Return the likeliest class of every element; padding where `value` has it."""
        found = self._without_pad(output).argmax(-1)
        return found if self.pad is None or value is None else torch.where(value == self.pad, self.pad, found)

    def score(self, output: Float[Tensor, "row ..."], value: Tensor) -> Float[Tensor, "row ..."]:
        """Return onehot(x) - p, and 0 for padding."""
        score = F.one_hot(value, self.classes) - self.mean(output)
        return score if self.pad is None else score.masked_fill((value == self.pad).unsqueeze(-1), 0.0)

    def information(
        self, tangents: Float[Tensor, "row tangent ..."], output: Float[Tensor, "row ..."], value: Tensor
    ) -> Float[Tensor, "row tangent tangent"]:
        """Return J' (diag(p) - p p') J, which is the covariance of the rows of J under p."""
        p = self.mean(output).unsqueeze(1)
        if self.pad is not None:
            p = p.masked_fill((value == self.pad).unsqueeze(1).unsqueeze(-1), 0.0)
        centred = tangents - (p * tangents).sum(-1, keepdim=True)
        return _gram(centred * p.sqrt())

    def _without_pad(self, output: Tensor) -> Tensor:
        if self.pad is None:
            return output
        return output.index_fill(-1, torch.tensor([self.pad], device=output.device), -math.inf)


def log_prob_each(
    likelihoods: Sequence[Likelihood], output: Float[Tensor, "member ..."], values: Sequence[Tensor]
) -> Float[Tensor, "member ..."]:
    """Return what `log_prob` of each likelihood returns for its output and its values, at once where they are alike."""
    kinds = {likelihood.kind for likelihood in likelihoods}
    if len(likelihoods) == 1 or (len(kinds) == 1 and None not in kinds):
        return likelihoods[0].log_prob(output, stack(values))
    alone = zip(likelihoods, output.unbind(), values, strict=True)
    return torch.stack([likelihood.log_prob(own, value) for likelihood, own, value in alone])


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _squares(output: Tensor, value: Tensor) -> Tensor:
    # one kernel each way
    output, value = torch.broadcast_tensors(output, value)  # type: ignore[no-untyped-call]
    return F.mse_loss(output, value, reduction="none")


def _gram(tangents: Float[Tensor, "row tangent ..."]) -> Float[Tensor, "row tangent tangent"]:
    flat = tangents.flatten(2)
    return flat @ flat.mT


_REGISTRY: dict[str, Callable[..., Likelihood]] = {
    "normal": Normal,
    "laplace": Laplace,
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}


def register(name: str, likelihood: Callable[..., Likelihood]) -> None:
    """Make `likelihood(shape, **decoder_dist_params)` known as `name` in `decoders_dist`."""
    if name in _REGISTRY:
        raise ValueError(f"a likelihood's name is registered once; got {name!r} again. Choose another.")
    _REGISTRY[name] = likelihood


def build(config: DMVAEConfig, modality: str) -> Likelihood:
    """Build the likelihood that `config` names for `modality`.

    Raises:
        ValueError: if no likelihood of that name is registered, or what is registered makes no `Likelihood`.
    """
    dist = config.distributions[modality]
    if dist not in _REGISTRY:
        raise ValueError(
            f"decoders_dist names a known likelihood; got {dist!r} for {modality!r}. Known: {', '.join(_REGISTRY)}."
        )
    built = _REGISTRY[dist](config.shapes[modality], **config.dist_params(modality))
    if not isinstance(built, Likelihood):
        raise ValueError(
            "a registered likelihood returns a dmvae.distributions.likelihoods.Likelihood; got "
            f"{type(built).__name__} for {dist!r}."
        )
    return built
