"""The model's settings: the fields of the seed's `DMVAEConfig`, validated and frozen."""

import math
from typing import Any, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from dmvae.config.likelihoods import SPECS
from dmvae.config.section import ModalityName, Section, Size

Shape = tuple[Size, ...]
Parameter = NonNegativeInt | NonNegativeFloat | str
T = TypeVar("T", int, float)

DEFAULT_SUBSETS = 2


class ArchitectureConfig(Section):
    """The encoder and the decoder of one modality: a registered name and its sizes."""

    name: str = "mlp"
    """`mlp`, `conv` (images of 32x32 or 28x28), `sequence` (of classes), or a name registered with
    `dmvae.nn.networks.register`."""
    hidden_dims: Shape | None = None
    """Widths of hidden layers, encoder order; default (256,), of `sequence` (64, 64); empty: one linear map. `conv`
    takes none."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class DMVAEConfig(Section):
    """A DMVAE: which modalities, how large its latents, how each modality is distributed, how terms are weighted.

    A dict names modalities; one number holds for all of them.

    Raises:
        ValidationError: (a ValueError) for a misspelt field, a modality that is not in `input_dims`, a dimension
            below 1, a negative weight, or a setting that would have no effect.

    Source: Lee & Pavlovic 2021; names of the MultiVae documentation.
    """

    n_modalities: Size | None = None
    """May be left out when `input_dims` is given."""
    latent_dim: Size = 10
    """Dimension of the shared latent."""
    input_dims: dict[ModalityName, Shape] | None = None
    """Shape of one row of each modality; a training job fills it from the dataset."""
    modalities_specific_dim: dict[ModalityName, Size] | Size = 2
    """Dimension of the private latents."""
    decoders_dist: dict[ModalityName, str] | None = None
    """`normal` (the default), `laplace`, `bernoulli`, `categorical`, `poisson`, `negative_binomial`, or a registered
    name, per modality. The decoder gives the logarithm of a count's mean at size factor 1."""
    decoder_dist_params: dict[ModalityName, dict[str, Parameter]] | None = None
    """`scale` of normal and laplace: a number (default 1) or "learned"; `classes` of categorical, and `pad`, the class
    of elements that fill up shorter rows and count nowhere (default: none); `dispersion` r of negative_binomial, of
    variance mu + mu^2 / r: a number or "learned" for each feature (the default); of counts also `size_factor` of rows
    for which none is known, because they lack the modality (default 1), and `rate`, an element's mean at size factor
    1, at which the decoder starts (default 1 / elements). Training takes both from the training rows."""
    uses_likelihood_rescaling: bool = False
    rescale_factors: dict[ModalityName, NonNegativeFloat] | None = None
    """The paper's lambda. Default with rescaling on: max_dim / prod(shape)."""
    beta: NonNegativeFloat = 1.0
    """Weight of the shared divergence of every source."""
    modalities_specific_betas: dict[ModalityName, NonNegativeFloat] | NonNegativeFloat | None = None
    """Weights of the private divergences; default 1."""
    sources: Literal["unimodal", "subsets"] = "unimodal"
    """Of the objective, beside the joint posterior: each modality by itself (the seed's), or random subsets of what a
    row has, drawn afresh in every step; these train what prediction from several modalities uses."""
    num_subsets: Size = DEFAULT_SUBSETS
    """How many subsets; of `sources="subsets"` only."""
    architectures: dict[ModalityName, ArchitectureConfig] = Field(default_factory=dict)
    """Network per modality; default an MLP with one hidden layer of 256."""
    custom_architectures: tuple[str, ...] = ()
    """Recorded by the model: networks that were given by hand, as `encoders.image`."""

    @model_validator(mode="after")
    def _check(self) -> "DMVAEConfig":
        if self.rescale_factors is not None and not self.uses_likelihood_rescaling:
            raise ValueError(
                "rescale_factors take effect with uses_likelihood_rescaling=True; got False. Set it, or remove them."
            )
        if self.num_subsets != DEFAULT_SUBSETS and self.sources != "subsets":
            raise ValueError(
                f'num_subsets takes effect with sources="subsets"; got sources={self.sources!r}. Set it, or remove '
                "num_subsets."
            )
        if self.input_dims is None:
            return self
        if not self.input_dims:
            raise ValueError("a model has at least one modality; got input_dims={}. Name the modalities' shapes.")
        if any(len(shape) == 0 for shape in self.input_dims.values()):
            raise ValueError(
                f"a modality's shape has a dimension; got input_dims={self.input_dims}. Write (1,) for a scalar."
            )
        if self.n_modalities not in (None, len(self.input_dims)):
            raise ValueError(
                f"n_modalities is the number of entries of input_dims ({len(self.input_dims)}); "
                f"got n_modalities={self.n_modalities}. Leave it out."
            )
        self._check_names()
        for name, dist in self.distributions.items():
            self._check_params(name, dist)
        return self

    def _check_names(self) -> None:
        assert self.input_dims is not None
        for field in (
            "modalities_specific_dim", "decoders_dist", "decoder_dist_params", "rescale_factors",
            "modalities_specific_betas", "architectures",
        ):  # fmt: skip
            value = getattr(self, field)
            stray = sorted(value.keys() - self.input_dims.keys()) if isinstance(value, dict) else []
            if stray:
                raise ValueError(f"{field} names modalities of input_dims ({sorted(self.input_dims)}); got {stray}.")
        for field in ("modalities_specific_dim", "modalities_specific_betas", "rescale_factors"):
            value = getattr(self, field)
            absent = sorted(self.input_dims.keys() - value.keys()) if isinstance(value, dict) else []
            if absent:
                raise ValueError(f"{field} has an entry for every modality; {absent} have none.")

    def _check_params(self, name: str, dist: str) -> None:
        if dist not in SPECS:
            return  # a likelihood registered without a spec; it is checked when the model is built
        fault = SPECS[dist].fault(self.dist_params(name))
        if fault is not None:
            raise ValueError(f"decoder_dist_params.{name} ({dist}): {fault}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each modality, in the model's order of modalities."""
        if self.input_dims is None:
            raise ValueError("a model needs its modalities' shapes; got input_dims=None. Give input_dims.")
        return dict(self.input_dims)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the model's order."""
        return tuple(self.shapes)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the objective's sources: the joint posterior, then the modalities or the random subsets."""
        if self.sources == "unimodal":
            return ("joint", *self.modalities)
        return ("joint", *(f"subset_{number}" for number in range(1, self.num_subsets + 1)))

    @property
    def private_dims(self) -> dict[str, int]:
        """Dimension of each private latent."""
        return self._per_modality(self.modalities_specific_dim)

    @property
    def private_betas(self) -> dict[str, float]:
        """Weight of each private divergence."""
        betas = self.modalities_specific_betas
        return self._per_modality(1.0 if betas is None else betas)

    @property
    def distributions(self) -> dict[str, str]:
        """Name of each modality's likelihood."""
        return {name: (self.decoders_dist or {}).get(name, "normal") for name in self.modalities}

    @property
    def reconstruction_weights(self) -> dict[str, float]:
        """The paper's lambda of each modality."""
        if not self.uses_likelihood_rescaling:
            return self._per_modality(1.0)
        if self.rescale_factors is not None:
            return dict(self.rescale_factors)
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return {name: max(sizes.values()) / size for name, size in sizes.items()}

    def architecture(self, name: str) -> ArchitectureConfig:
        """The network settings of one modality."""
        return self.architectures.get(name, ArchitectureConfig())

    def dist_params(self, name: str) -> dict[str, Any]:
        """The parameters of one modality's likelihood."""
        return dict((self.decoder_dist_params or {}).get(name, {}))

    def _per_modality(self, value: dict[str, T] | T) -> dict[str, T]:
        return {name: value[name] if isinstance(value, dict) else value for name in self.modalities}
