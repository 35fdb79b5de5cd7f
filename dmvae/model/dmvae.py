"""The model: thin methods around the mathematics in the modules beside it."""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch
from dmvae.data.inputs import Inputs, as_batch
from dmvae.distributions.gaussian import DiagGaussian
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.distributions.likelihoods import Likelihood
from dmvae.model.assembly import Fixed, assemble, check_own_code, own_code_of
from dmvae.model.encoding import Modalities, check_observed, combine, conform, observe, present, select, size_factors
from dmvae.model.generation import decode_latents, draw_latents, draw_seed, inference_mode, sample_latents
from dmvae.model.loss import Decode, Noise, Observed, multimodal_elbo_loss
from dmvae.model.nll.estimate import NLLEstimate, joint_nll
from dmvae.model.nll.posterior_draws import posterior_draws
from dmvae.model.outputs import DMVAEOutput, ModelOutput
from dmvae.model.serialization import MODEL_CONFIG as MODEL_CONFIG
from dmvae.model.serialization import MODEL_WEIGHTS as MODEL_WEIGHTS
from dmvae.model.serialization import check_header, read_config, read_prior, read_weights, write_folder
from dmvae.nn.batched import Decoder
from dmvae.nn.own_networks import encoder_shapes

Density = FittedPrior | Literal["own"] | None
"""A fitted prior of latents, the model's own (the standard normal if none was fitted), or None: the standard normal."""
_OF_OTHER_TRAINERS = {"epoch", "dataset_size", "uses_ddp"}


class DMVAE(nn.Module):
    """The Private-Shared Disentangled Multimodal VAE.

    Every modality has a private latent z_p, and all share z_s. The posterior of z_s is the product of the experts of
    the modalities that a row has, and the prior. Any modality of a row may be missing.

    Args:
        model_config: with `input_dims`.
        encoders: networks for some modalities, in place of the configured architecture. The output of an encoder
            must have `embedding`, `log_covariance`, `style_embedding` and `style_log_covariance`.
        decoders: likewise. A decoder takes [z_s, z_p], and its output must have `reconstruction`.

    Code that the config names by import path is imported and called.

    Attributes:
        fitted_prior: of the latents, fitted after training by `fit_density`; saved and loaded with the model. Training
            and the NLL always have the standard normal. None: predictions and samples have it too.

    Raises:
        ValueError: if the config lacks shapes, names an unknown architecture or likelihood, or networks are
            given for a modality that it does not have.

    Source: Lee & Pavlovic 2021.
    """

    def __init__(
        self,
        model_config: DMVAEConfig,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model_config, DMVAEConfig):
            raise TypeError(f"model_config must be a DMVAEConfig, but got {type(model_config).__name__}.")
        parts = assemble(model_config, encoders, decoders)
        self.config = model_config.model_copy(
            # a loaded model keeps the versions that it was trained with
            update={"custom_architectures": parts.custom, "packages": parts.packages | model_config.packages}
        )
        self._by_kind: dict[str, Fixed[Any]] = {}
        self.fitted_prior: FittedPrior | None = None
        # torch finds modules here. ModuleDict refuses names such as `type`, which are legal for modalities, hence the
        # prefix; and its items are slow to get, hence the mappings beside it
        for kind in ("likelihoods", "encoders", "decoders"):
            modules = getattr(parts, kind)
            self._by_kind[kind] = Fixed(modules)
            setattr(self, f"_{kind}", nn.ModuleDict({f"modality_{name}": module for name, module in modules.items()}))
        shared_dim, private_dims = model_config.latent_dim, model_config.private_dims
        self._encoder_shapes = {name: encoder_shapes(shared_dim, dim) for name, dim in private_dims.items()}
        self._owner = next(
            (module, name)
            for module in self.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.is_floating_point()
        )

    @property
    def encoders(self) -> Mapping[str, nn.Module]:
        """Network per modality; none can be replaced."""
        return self._by_kind["encoders"]

    @property
    def decoders(self) -> Mapping[str, nn.Module]:
        """Network per modality; none can be replaced."""
        return self._by_kind["decoders"]

    @property
    def likelihoods(self) -> Mapping[str, Likelihood]:
        """Distribution per modality; none can be replaced."""
        return self._by_kind["likelihoods"]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        return self._parameter.dtype

    @property
    def model_config(self) -> DMVAEConfig:
        """The settings, `config`, under the seed's name."""
        return self.config

    @property
    def latent_dim(self) -> int:
        """Dimension of the shared latent."""
        return self.config.latent_dim

    @property
    def style_dims(self) -> dict[str, int]:
        """Dimension of each private latent."""
        return self.config.private_dims

    @property
    def beta(self) -> float:
        """Weight of the shared KL divergence."""
        return self.config.beta

    @property
    def private_betas(self) -> dict[str, float]:
        """Weight of each private KL divergence."""
        return self.config.private_betas

    @property
    def _parameter(self) -> nn.Parameter:
        # asked several times a step, and torch walks all modules to list parameters: hence the one of a fixed module
        module, name = self._owner
        parameter = module._parameters.get(name)
        if parameter is None:  # a parametrisation, such as a spectral norm, has taken it
            parameter = next(parameter for parameter in self.parameters() if parameter.is_floating_point())
        return parameter

    def forward(
        self, inputs: Inputs, noise: Noise | None = None, divergence_weight: float = 1.0, **ignored: Any
    ) -> DMVAEOutput:
        """Compute the training objective of a batch.

        Args:
            inputs: rows, complete or not.
            noise: for the reparameterised samples; None draws it from torch's global generator.
            divergence_weight: factor on every beta, for warm-up.
            ignored: what trainers written for MultiVae pass: `epoch`, `dataset_size`, `uses_ddp`.

        Raises:
            ValueError: if the rows do not fit the model.
        """
        unknown = sorted(ignored.keys() - _OF_OTHER_TRAINERS)
        if unknown:
            raise TypeError(f"Unknown arguments {unknown}. Available: inputs, noise, divergence_weight.")
        batch = self._conformed(inputs)
        if noise is None:
            width = Noise.width(self.config)
            noise = Noise.from_normals(
                torch.randn(len(batch), width, dtype=self.dtype, device=self.device), self.config
            )
        bound = multimodal_elbo_loss(
            self.config,
            observe(batch, self.encoders, self.likelihoods, self._encoder_shapes, self.config.missing_cells),
            self.decode_functions,
            self.likelihoods,
            noise,
            divergence_weight,
        )
        row_loss = bound.row_loss
        if not math.isfinite(float(row_loss.detach().sum())):
            check_observed(batch)
        if torch.is_grad_enabled() and not row_loss.requires_grad:
            # without any value to learn from, this worker must still reduce gradients with the others, as zeros; and it
            # must do so here, inside the module that DDP wraps
            row_loss = row_loss + 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()
        return DMVAEOutput(row_loss.sum() / max(len(batch), 1), row_loss, bound.terms)

    def initialize_likelihoods(self, rows: Inputs) -> None:
        """Start what likelihoods learn at the values of training rows: scales at the features' deviations."""
        batch = self._batch(rows)
        for name, values in batch.data.items():
            here, cells = present(batch, name), (batch.cells or {}).get(name)
            arguments = (values[here],) if cells is None else (values[here], cells[here])
            self.likelihoods[name].initialize(*arguments)

    def observe(self, inputs: Inputs, modalities: Modalities = "all") -> dict[str, Observed]:
        """Encode each modality of the rows that have it; modalities that no row has are left out."""
        names = self._names(modalities, "modalities")
        encoders = {name: self.encoders[name] for name in names}
        cells = self.config.missing_cells
        return observe(self._batch(inputs), encoders, self.likelihoods, self._encoder_shapes, cells)

    @property
    def decode_functions(self) -> dict[str, Decode]:
        """Functions from [z_s, z_p] to the parameters of the likelihood, per modality."""
        return {
            name: Decoder(decoder, name, self.likelihoods[name].output_shape) for name, decoder in self.decoders.items()
        }

    def posteriors(self, inputs: Inputs, cond_mod: Modalities = "all") -> tuple[DiagGaussian, dict[str, DiagGaussian]]:
        """Return q(z_s | x_A), A being what a row has of `cond_mod`, and each q(z_p | x_m), the prior if m is missing.

        Unlike `encode`, it keeps gradients and the mode.
        """
        batch = self._batch(inputs)
        return self.combine(self.observe(batch, self._names(cond_mod, "cond_mod")), len(batch))

    def combine(self, observed: Mapping[str, Observed], num_rows: int) -> tuple[DiagGaussian, dict[str, DiagGaussian]]:
        """Return the shared and the private posteriors of all rows from the result of `observe`."""
        zeros = torch.zeros(num_rows, self.config.latent_dim, dtype=self.dtype, device=self.device)
        return combine(observed, zeros, self.config.private_dims)

    def encode(
        self,
        inputs: Inputs,
        cond_mod: Modalities = "all",
        N: int = 1,  # noqa: N803 (the seed's name)
        return_mean: bool = False,
        flatten: bool = False,
        generator: torch.Generator | None = None,
        density: Density = "own",
    ) -> ModelOutput:
        """Sample latents given the modalities of `cond_mod` that each row has, or return the posterior means.

        Private latents of the other modalities are drawn from the prior. With a fitted prior they are drawn from
        p(z_p | z_s), and the shared latent of a row without any modality from p(z_s).

        Returns:
            `.z` and `.modalities_z[m]`: `(rows, dim)` for N=1, `(N, rows, dim)` for N>1, `(N * rows, dim)` with
            `flatten`; `.one_latent_space` is False.

        Raises:
            ValueError: for an unknown or empty set of modalities, or N below 1.
        """
        if N < 1:
            raise ValueError(f"N must be at least 1, but got N={N}.")
        batch = self._batch(inputs)
        with inference_mode(self):
            observed = self.observe(batch, self._names(cond_mod, "cond_mod"))
            shared, private = self.combine(observed, len(batch))
        present = {name: part.present for name, part in observed.items()}
        return draw_latents(shared, private, present, N, return_mean, flatten, generator, self._fitted(density))

    def draw_posterior(self, inputs: Inputs, num_draws: int, seed: int = 0) -> ModelOutput:
        """Draw latents from a fit to each row's posterior given all that it has; see `dmvae.model.nll.posterior_draws`.

        Slower than `encode`, which draws from the encoders' posteriors, and closer.

        Returns:
            `.z` and `.modalities_z[m]`, `(num_draws, rows, dim)`.
        """
        batch = self._batch(inputs)
        with inference_mode(self):
            return posterior_draws(self, batch, num_draws, seed)

    def decode(self, embedding: Mapping[str, Any], modalities: Modalities = "all") -> ModelOutput:
        """Decode latents as `encode` and `generate_from_prior` return them.

        Returns:
            the decoder's output per modality (logits for bernoulli and categorical, log-means for counts), with the
            leading dimensions of the latents; `means` converts it to the data's scale.
        """
        with inference_mode(self):
            return decode_latents(self._decode_functions_of(modalities, "modalities"), embedding)

    def predict(
        self,
        inputs: Inputs,
        cond_mod: Modalities = "all",
        gen_mod: Modalities = "all",
        N: int = 1,  # noqa: N803 (the seed's name)
        flatten: bool = False,
        return_mean: bool = False,
        generator: torch.Generator | None = None,
        density: Density = "own",
    ) -> ModelOutput:
        """Generate `gen_mod` from the modalities of `cond_mod` that each row has: `encode`, then `decode`."""
        wanted = self._names(gen_mod, "gen_mod")
        embedding = self.encode(inputs, cond_mod, N, return_mean, flatten, generator, density)
        return self.decode(embedding, wanted)

    def means(self, output: Tensor, modality: str, inputs: Inputs | None = None) -> Tensor:
        """Return E[x_m | output] on the data's scale, for a decoder's output `(..., *output_shape)`.

        Means of counts are proportional to a size factor, by default the likelihood's. With `inputs`, whose rows the
        output `(..., rows, *output_shape)` belongs to, it is the row's own: as given, or the total of its counts.
        """
        likelihood = self.likelihoods[modality]
        if inputs is None or not likelihood.are_counts:
            return likelihood.mean(output)
        return likelihood.mean_at(output, size_factors(self._batch(inputs), modality, likelihood.size_factor, output))

    def draw_values(
        self, output: Tensor, modality: str, inputs: Inputs | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x_m given a decoder's output `(..., rows, *output_shape)`: its mean is `means`, its spread the noise."""
        likelihood = self.likelihoods[modality]
        with torch.no_grad():
            if inputs is None or not likelihood.are_counts:
                return likelihood.sample(output, generator)
            sizes = size_factors(self._batch(inputs), modality, likelihood.size_factor, output)
            return likelihood.sample_at(output, sizes, generator)

    def generate_from_prior(
        self, n_samples: int, generator: torch.Generator | None = None, density: Density = "own"
    ) -> ModelOutput:
        """Sample all latents `(n_samples, dim)` from the prior; `decode` takes them."""
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, but got {n_samples}.")
        return sample_latents(self.config, n_samples, self.dtype, self.device, generator, self._fitted(density))

    def joint_nll(
        self,
        inputs: Inputs,
        K: int = 1000,  # noqa: N803 (the seed's name)
        batch_size_K: int = 100,  # noqa: N803 (the seed's name)
        seed: int = 0,
        modalities: Modalities = "all",
        proposal: str = "refined",
    ) -> NLLEstimate:
        """Estimate -log p(x_A) of every row, A being what it has of `modalities`, with its Monte Carlo error.

        A row's estimate depends only on the seed and its id (without ids, its position in the batch). Latents are
        drawn from a fit to the row's posterior, or with `proposal="encoder"` from the posteriors of the encoders.
        """
        batch = self._batch(inputs)
        with inference_mode(self):
            return joint_nll(self, batch, K, batch_size_K, seed, self._names(modalities, "modalities"), proposal)

    def compute_joint_nll(
        self,
        inputs: Inputs,
        K: int = 1000,  # noqa: N803 (the seed's name)
        batch_size_K: int = 100,  # noqa: N803 (the seed's name)
        generator: torch.Generator | None = None,
        proposal: str = "refined",
    ) -> Float[Tensor, ""]:
        """Return the estimated joint negative log-likelihood summed over rows, in nats."""
        return self.joint_nll(inputs, K, batch_size_K, seed=draw_seed(generator), proposal=proposal).nll.sum()

    def compute_cond_nll(
        self,
        inputs: Inputs,
        subset: Modalities,
        pred_mods: Modalities,
        K: int = 1000,  # noqa: N803 (the seed's name)
        batch_size_K: int = 100,  # noqa: N803 (the seed's name)
        generator: torch.Generator | None = None,
        proposal: str = "refined",
    ) -> dict[str, Tensor]:
        """Estimate -log p(x_m | x_S) in nats, for each m of `pred_mods` alone.

        S is what a row has of `subset`; if it is empty, this is the marginal. The mean is over the rows that have m,
        and NaN if no row has it.

        Raises:
            ValueError: if `subset` and `pred_mods` overlap, or either is unknown or empty.
        """
        given, wanted = self._names(subset, "subset"), self._names(pred_mods, "pred_mods")
        overlap = [name for name in wanted if name in given]
        if overlap:
            raise ValueError(f"subset and pred_mods must not overlap, but both contain {overlap}.")
        batch, seed = self._batch(inputs), draw_seed(generator)
        if batch.ids is None:
            batch = replace(batch, ids=torch.arange(len(batch)))
        results = {}
        for name in wanted:
            rows = batch[present(batch, name)]
            with_it = self.joint_nll(rows, K, batch_size_K, seed, (*given, name), proposal).nll
            results[name] = (with_it - self.joint_nll(rows, K, batch_size_K, seed, given, proposal).nll).mean()
        return results

    def save(self, dir: str | Path) -> None:  # noqa: A002 (the seed's name)
        """Write the configuration, the weights and the fitted prior, if any, into a folder, each atomically."""
        write_folder(Path(dir), self.config, self.state_dict(), self.fitted_prior)

    @classmethod
    def load(
        cls,
        dir: str | Path,  # noqa: A002 (the seed's name)
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
        trust: Collection[str] = (),
    ) -> "DMVAE":
        """Load a model from its folder or from a checkpoint, onto the CPU and in eval mode.

        Args:
            dir: the folder.
            encoders: networks that were given by hand.
            decoders: likewise.
            trust: packages, modules or import paths of own code that the folder may name; others are not imported.

        Raises:
            FileNotFoundError: if the folder has no model.
            ValueError: if a file cannot be read, networks that were given by hand are missing, the folder names code
                that is not trusted, or the weights do not belong to the config.
        """
        config = read_config(Path(dir))
        check_own_code(config, trust, Path(dir))
        if not (encoders or decoders or own_code_of(config)):  # sizes must fit before memory is asked for
            check_header(Path(dir), _state_on_meta(cls, config, Path(dir)))
        with torch.random.fork_rng(devices=[]):  # loading leaves the caller's random numbers alone
            model = cls(config, encoders, decoders)
        own = model.state_dict()
        # tensors of a file differ from those of a model in alignment and layout, on which the last bits of sums depend
        tensors = read_weights(Path(dir), own)
        copies = {name: torch.empty_like(own[name], dtype=t.dtype).copy_(t) for name, t in tensors.items()}
        model.load_state_dict(copies, assign=True)
        model.fitted_prior = read_prior(Path(dir))
        return model.eval()

    def _fitted(self, density: Density) -> FittedPrior | None:
        return self.fitted_prior if density == "own" else density

    def _batch(self, inputs: Inputs) -> Batch:
        batch = self._conformed(inputs)
        check_observed(batch)
        return batch

    def _conformed(self, inputs: Inputs) -> Batch:
        return conform(as_batch(inputs, self.config.shapes), self.config, self.likelihoods, self.dtype, self.device)

    def _names(self, modalities: Modalities, argument: str) -> tuple[str, ...]:
        return select(self.config.modalities, modalities, argument)

    def _decode_functions_of(self, modalities: Modalities, argument: str) -> dict[str, Decode]:
        functions = self.decode_functions
        return {name: functions[name] for name in self._names(modalities, argument)}


def _state_on_meta(cls: type[DMVAE], config: DMVAEConfig, folder: Path) -> dict[str, Tensor]:
    try:
        with torch.device("meta"):
            return cls(config).state_dict()
    except (ValueError, RuntimeError) as error:  # torch raises RuntimeError for sizes that overflow
        raise ValueError(f"Cannot build the model of {folder / MODEL_CONFIG}: {error}") from error
