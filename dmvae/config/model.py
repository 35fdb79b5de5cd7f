"""The settings of a model, validated and frozen."""

import math
from typing import Any, Literal, TypeVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from dmvae.config.likelihoods import SPECS
from dmvae.config.own_code import ImportPath, NameOrPath, is_import_path
from dmvae.config.section import Count, ModalityName, Section, Size

Shape = tuple[Size, ...]
Parameter = NonNegativeInt | NonNegativeFloat | str | tuple[NonNegativeInt | NonNegativeFloat | str, ...]
Value = bool | int | float | str | None | list[Any] | dict[str, Any]
"""What TOML and JSON can hold."""
T = TypeVar("T", int, float)

DEFAULT_SUBSETS = 2


class ArchitectureConfig(Section):
    """The networks of one modality: an architecture and its sizes, or your own code and its parameters."""

    name: NameOrPath = "mlp"
    """`mlp` (a perceptron), `skip_mlp` (a perceptron with a linear skip connection, normalised layers and SiLU), `conv`
    (images of 32x32 or 28x28), `residual` (images of any size), `series` (channels, time), `sequence` and `transformer`
    (of classes), a name that you registered or that an installed package announces, or the import path of your own
    code: `mypackage.nets:ResNet`, called with (dimensions, **params), must return the pair (encoder, decoder)."""
    encoder: ImportPath | None = None
    """Import path of the encoder alone, called with (dimensions, **params). None: the encoder of `name`."""
    decoder: ImportPath | None = None
    """Likewise of the decoder."""
    params: dict[str, Value] = Field(default_factory=dict)
    """Arguments of your own code."""
    hidden_dims: Shape | None = None
    """Widths of the hidden layers in the order of the encoder; empty: one linear map. Default: (256,) for `mlp`,
    (64, 64) for `sequence` and `transformer`, channels from the size for `residual` and `series`. `conv` has fixed
    widths."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check(self) -> "ArchitectureConfig":
        given = [part for part in ("encoder", "decoder") if getattr(self, part) is not None]
        if given and is_import_path(self.name):
            raise ValueError(
                f"name={self.name!r} gives both networks, so {' and '.join(given)} cannot be set. Remove one of them."
            )
        if len(given) == 2 and self.name != "mlp":
            raise ValueError(f"name={self.name!r} has no effect with both encoder and decoder. Remove it.")
        if (is_import_path(self.name) or len(given) == 2) and (self.hidden_dims is not None or self.dropout):
            raise ValueError("hidden_dims and dropout have no effect on your own code. Pass them in params.")
        return self

    @property
    def has_own_code(self) -> bool:
        """Whether an import path gives one of the networks."""
        return is_import_path(self.name) or self.encoder is not None or self.decoder is not None


class DMVAEConfig(Section):
    """The settings of a DMVAE: modalities, sizes of latents, likelihoods, networks and weights of the objective.

    A dict has an entry per modality; a single number applies to all of them.

    Raises:
        ValidationError: (a ValueError) for an unknown field or modality, a dimension below 1, a negative weight, or a
            setting without effect.

    Source: Lee & Pavlovic 2021; names of the MultiVae documentation.
    """

    n_modalities: Size | None = None
    """The number of modalities; optional with `input_dims`."""
    latent_dim: Size = 10
    """Dimension of the shared latent."""
    input_dims: dict[ModalityName, Shape] | None = None
    """Shape of one row of each modality; training takes it from the dataset."""
    modalities_specific_dim: dict[ModalityName, Count] | Count = 2
    """Dimension of the private latents; 0: the modality has none."""
    decoders_dist: dict[ModalityName, NameOrPath] | None = None
    """Likelihood per modality: `normal` (default), `laplace`, `bernoulli`, `categorical`, `poisson`,
    `negative_binomial`, `columns` (a table whose columns differ in kind), a name that you registered or that an
    installed package announces, or the import path of your own class. For counts, the decoder returns the log-mean at
    size factor 1."""
    decoder_dist_params: dict[ModalityName, dict[str, Parameter]] | None = None
    """Parameters of the likelihoods. normal, laplace: `scale`, a number (default 1), "learned_per_feature" or
    "learned_per_modality", which start at the standard deviation of the training rows and stay above `scale_floor`
    times it (default 0.05; 0: no floor), or "learned", one scale per modality that starts at 1 without a floor.
    categorical: `classes`, and `pad`, the class that fills up short rows and is ignored (default: none).
    negative_binomial: `dispersion` r of the variance mu + mu^2 / r, a number or "learned" per feature (default).
    Counts: `size_factor` for rows without one (default 1), and `rate`, the mean of an element at size factor 1, at
    which the decoder starts (default 1 / elements); training takes both from the training rows. columns: `kinds`, that
    of each column (`real`, `positive`, `count`, `binary`, `category`), `classes` of each category, `rates`, the mean of
    each column of counts, all from the dataset, and `scale_floor`."""
    missing_cells: tuple[ModalityName, ...] = ()
    """Modalities of which a row may have some cells and lack others. Their encoders read which are observed; training
    adds the modalities that the dataset says."""
    uses_likelihood_rescaling: bool = False
    rescale_factors: dict[ModalityName, NonNegativeFloat] | None = None
    """The paper's lambda per modality, with `uses_likelihood_rescaling`. Default: max_dim / prod(shape)."""
    beta: NonNegativeFloat = 1.0
    """Weight of the shared KL divergence of every source."""
    modalities_specific_betas: dict[ModalityName, NonNegativeFloat] | NonNegativeFloat | None = None
    """Weights of the private KL divergences. Default: 1. Modalities without a private latent have none."""
    sources: Literal["unimodal", "subsets", "joint"] = "unimodal"
    """Sources of the objective beside the joint posterior: each modality alone, as in the paper; random subsets of
    what a row has, new in every step, which train prediction from several modalities; or with `joint` none, for
    density and for cells that are predicted from everything else in their row."""
    num_subsets: Size = DEFAULT_SUBSETS
    """Number of random subsets, with `sources="subsets"`."""
    cross: Literal["posterior", "prior"] = "posterior"
    """Where a source takes the private latents of modalities outside it from: their `posterior`, as in the paper, which
    lets a value reach its own reconstruction without z_s; or their `prior`, so that z_s has to predict the value."""
    architectures: dict[ModalityName, ArchitectureConfig] = Field(default_factory=dict)
    """Networks per modality. Default: an MLP with one hidden layer of 256."""
    custom_architectures: tuple[str, ...] = ()
    """Networks that were given by hand, as `encoders.image`; the model sets it."""
    packages: dict[str, str] = Field(default_factory=dict)
    """Versions of the packages of your own code; the model sets it."""

    @model_validator(mode="after")
    def _check(self) -> "DMVAEConfig":
        if self.rescale_factors is not None and not self.uses_likelihood_rescaling:
            raise ValueError(
                "rescale_factors have no effect with uses_likelihood_rescaling=False. Set it to True, or remove them."
            )
        if self.num_subsets != DEFAULT_SUBSETS and self.sources != "subsets":
            raise ValueError(
                f'num_subsets has no effect with sources={self.sources!r}. Set sources="subsets", or remove it.'
            )
        if self.cross == "prior" and self.sources == "joint":
            raise ValueError('cross="prior" has no effect with sources="joint". Remove one of them.')
        if self.input_dims is None:
            return self
        if self.cross == "prior" and len(self.input_dims) == 1:
            raise ValueError(
                f'cross="prior" needs two or more modalities, but got one: {list(self.input_dims)}. Remove cross.'
            )
        if not self.input_dims:
            raise ValueError("input_dims must have at least one modality, but got {}.")
        if any(len(shape) == 0 for shape in self.input_dims.values()):
            raise ValueError(
                f"Shapes in input_dims need at least one dimension, but got {self.input_dims}. Write (1,) for scalars."
            )
        if self.n_modalities not in (None, len(self.input_dims)):
            raise ValueError(
                f"n_modalities must be the number of entries of input_dims, {len(self.input_dims)}, but got "
                f"{self.n_modalities}. Leave it out."
            )
        self._check_names()
        self._check_private()
        for name, dist in self.distributions.items():
            self._check_params(name, dist)
        return self

    def _check_names(self) -> None:
        assert self.input_dims is not None
        for field in (
            "modalities_specific_dim", "decoders_dist", "decoder_dist_params", "rescale_factors",
            "modalities_specific_betas", "architectures", "missing_cells",
        ):  # fmt: skip
            value = getattr(self, field)
            stray = sorted(set(value) - self.input_dims.keys()) if isinstance(value, dict | tuple) else []
            if stray:
                raise ValueError(f"Unknown modalities in {field}: {stray}. Available: {sorted(self.input_dims)}.")
        for field in ("modalities_specific_dim", "modalities_specific_betas", "rescale_factors"):
            value = getattr(self, field)
            needed = set(self.input_dims)
            if field == "modalities_specific_betas":
                needed = {name for name, dim in self.private_dims.items() if dim}
            absent = sorted(needed - value.keys()) if isinstance(value, dict) else []
            if absent:
                raise ValueError(f"{field} is missing entries for {absent}.")

    def _check_private(self) -> None:
        betas = self.modalities_specific_betas
        without = sorted(name for name, dim in self.private_dims.items() if dim == 0)
        idle = [name for name in without if isinstance(betas, dict) and name in betas]
        if idle or (betas is not None and len(without) == len(self.modalities)):
            raise ValueError(
                f"modalities_specific_betas weighs private latents, but {idle or without} have none "
                "(modalities_specific_dim is 0). Remove their betas, or give them a dimension."
            )

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
            raise ValueError("input_dims is missing: a model needs the shapes of its modalities.")
        return dict(self.input_dims)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names of the modalities, in the model's order."""
        return tuple(self.shapes)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources: the joint posterior, then the modalities, the random subsets, or nothing."""
        if self.sources == "joint":
            return ("joint",)
        if self.sources == "unimodal":
            return ("joint", *self.modalities)
        return ("joint", *(f"subset_{number}" for number in range(1, self.num_subsets + 1)))

    @property
    def private_dims(self) -> dict[str, int]:
        """Dimension of each private latent."""
        return self._per_modality(self.modalities_specific_dim)

    @property
    def private_betas(self) -> dict[str, float]:
        """Weight of each private divergence; 1 where there is no private latent."""
        betas = self.modalities_specific_betas
        if isinstance(betas, dict):
            return {name: betas.get(name, 1.0) for name in self.modalities}
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
