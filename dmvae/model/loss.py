"""The training objective: one evidence lower bound per source of the shared latent, and its named terms.

The sources are the joint posterior and, depending on the configuration, each modality or random subsets of what a row
has. The objective is a pure function of posteriors, decoders, rows and noise. Missing values are neither decoded nor
read, be it a modality of a row or a cell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from dmvae.config.model import DMVAEConfig
from dmvae.distributions.gaussian import DiagGaussian, product_of_experts
from dmvae.distributions.likelihoods import Likelihood, log_prob_each, stack
from dmvae.nn.batched import decode_each, decoder_layout, group_by_layout

Decode = Callable[[Tensor], Tensor]
"""From [z_shared, z_private] `(rows, dims)` to the parameters of a likelihood `(rows, *output_shape)`."""
_DECODED_NUMBERS = 3 * 2**17
"""Decoder outputs per call on a CPU, at most twice as many: larger tensors take fresh memory, which costs time."""


@dataclass(frozen=True, eq=False)
class Observed:
    """The rows of a batch that have one modality, and their posteriors.

    Attributes:
        present: which rows of the batch have the modality.
        rows: their positions in the batch; None: all rows, in order.
        values: `(observed, *shape)`, as `Likelihood.observe` returns them.
        shared: q(z_s | x_m), observed rows only.
        private: q(z_p | x_m), observed rows only.
        cells: `(observed, *shape)`, which values are observed; None: all of them.
    """

    present: Bool[Tensor, " row"]
    rows: Int64[Tensor, " observed"] | None
    values: Tensor
    shared: DiagGaussian
    private: DiagGaussian
    cells: Tensor | None = None

    def scatter(self, compact: Float[Tensor, "observed *rest"]) -> Float[Tensor, "row *rest"]:
        """Scatter observed rows to their positions in the batch, with zeros elsewhere."""
        if self.rows is None:
            return compact
        dense = compact.new_zeros((len(self.present), *compact.shape[1:]))
        return dense.index_copy(0, self.rows, compact)


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard-normal noise of one batch, independent for every source (the joint posterior, then the others).

    Attributes:
        shared: of the shared latent.
        private: of each private latent.
        subsets: selects the random subsets: a score per modality, then the size; None without random subsets.
    """

    shared: Float[Tensor, "source row shared"]
    private: Mapping[str, Float[Tensor, "source row _"]]
    subsets: Float[Tensor, "draw row choice"] | None = None

    @staticmethod
    def width(config: DMVAEConfig) -> int:
        """Return how many normals one row needs."""
        choices = _num_subset_draws(config) * (1 + len(config.modalities))
        return len(config.source_names) * (config.latent_dim + sum(config.private_dims.values())) + choices

    @classmethod
    def from_normals(cls, normals: Float[Tensor, "row width"], config: DMVAEConfig) -> "Noise":
        """Split the normals of each row into the noise of every source and latent."""
        dims, num = {"": config.latent_dim, **config.private_dims}, len(config.source_names)
        latents, choices = normals.tensor_split([num * sum(dims.values())], dim=1)
        sources = latents.reshape(len(normals), num, sum(dims.values())).transpose(0, 1)
        shared, *private = torch.split(sources, list(dims.values()), dim=-1)
        subsets = None
        if config.sources == "subsets":
            shape = len(normals), _num_subset_draws(config), 1 + len(config.modalities)
            subsets = choices.reshape(shape).transpose(0, 1)
        return cls(shared=shared, private=dict(zip(config.modalities, private, strict=True)), subsets=subsets)


def _num_subset_draws(config: DMVAEConfig) -> int:
    if config.sources != "subsets":
        return 0
    return -(-config.num_subsets // 2) if config.cross == "prior" else config.num_subsets


@dataclass(frozen=True, eq=False)
class TermSums:
    """Named terms as sums over rows and numbers of rows, which add over batches and workers.

    Terms of sources (`joint`, and the modalities or `subset_1` and so on) count every row, so that their means add up
    to the loss. Divergences and log-likelihoods count the rows that have them.
    """

    names: tuple[str, ...]
    total: Float[Tensor, " term"]
    count: Float[Tensor, " term"]

    def __add__(self, other: "TermSums") -> "TermSums":
        assert self.names == other.names
        return TermSums(self.names, self.total + other.total, self.count + other.count)

    def means(self) -> dict[str, Tensor]:
        """Return the mean of each term in nats per row that has it; 0 if no row has it."""
        means = self.total / self.count.clamp(min=1)
        return dict(zip(self.names, means.unbind(), strict=True))

    def observed_means(self) -> dict[str, float]:
        """Return the means of the terms that some row has: not those of a source that no row has."""
        counts = dict(zip(self.names, self.count.tolist(), strict=True))
        means = {name: float(mean) for name, mean in self.means().items()}
        return {name: mean for name, mean in means.items() if counts.get(f"kl_shared/{name}", counts[name])}


@dataclass(frozen=True, eq=False)
class LossOutput:
    """The objective of a batch: the sum of the negative ELBOs of each row, in nats, and the named terms."""

    row_loss: Float[Tensor, " row"]
    terms: TermSums


def multimodal_elbo_loss(
    config: DMVAEConfig,
    observed: Mapping[str, Observed],
    decoders: Mapping[str, Decode],
    likelihoods: Mapping[str, Likelihood],
    noise: Noise,
    divergence_weight: float = 1.0,
) -> LossOutput:
    """Compute the objective of every row.

        ELBO_s   = sum_{i in A} lambda_i log p(x_i | z_s, z_pi) - beta KL(q_s || p) - sum_{i in P} beta_i KL(q_pi || p)
        row loss = -(ELBO_joint + sum_{j in A} ELBO_j)   or   -(ELBO_joint + sum_k ELBO_{S_k})   or   -ELBO_joint

    A is what the row has. The joint source is the product of the experts in A and the prior, source j is the raw
    q(z_s | x_j), and source S_k is the product of the experts in a random subset of A and the prior.
    Private latents are drawn independently for each source: from q(z_pi | x_i) for i in P, else from their prior.
    With `cross="posterior"` P is A. With `cross="prior"` P is the source's members: what the decoder knows of a
    modality outside the source comes from z_s alone. Subsets then come in pairs, each with its complement. With all
    weights 1, each ELBO_s is a lower bound of log p(x_A) for any choice of q. A row without any modality has loss 0.

    Args:
        config: weights and dimensions.
        observed: the rows of each modality that at least one row has.
        decoders: per modality.
        likelihoods: per modality.
        noise: of this batch.
        divergence_weight: factor on beta and every beta_i, for warm-up.

    Source: Lee & Pavlovic 2021, with the shared divergence counted once per source.
    """
    shared, members, present = _sources(config, observed, noise)
    here = members.any(1)
    kl_shared = shared.kl_from_prior()  # 0 where there is no source: the prior stands in its place
    z_shared = shared.sample(noise.shared)
    is_complete = len(observed) == len(config.modalities) and all(part.rows is None for part in observed.values())
    kl_private, log_p, names = [], [], list[str]()
    for family in _families(observed, decoders):
        parts = [observed[name] for name in family]
        mean = stack([part.scatter(part.private.mean) for part in parts])
        private = DiagGaussian(mean, stack([part.scatter(part.private.log_var) for part in parts]))
        kl_private.append(private.kl_from_prior())  # 0 where the row has no such modality
        own_noise = stack([noise.private[name] for name in family])
        z_private = DiagGaussian(mean.unsqueeze(1), private.log_var.unsqueeze(1)).sample(own_noise)
        if config.cross == "prior":
            inside = torch.stack([members[:, config.modalities.index(name)] for name in family])
            z_private = torch.where(inside.unsqueeze(-1), z_private, own_noise)  # the noise is a draw from the prior
        z = torch.cat((z_shared.expand(len(family), *z_shared.shape), z_private), dim=-1)
        pairs = None if is_complete else here & parts[0].present
        functions = [decoders[name] for name in family], [likelihoods[name] for name in family]
        log_p.append(_log_likelihood(parts, pairs, z, *functions))
        names += family
    order = [*names, *(name for name in config.modalities if name not in observed)]
    kl_privates = _in_order(kl_private, order, config, kl_shared[0])
    log_ps = _in_order(log_p, order, config, kl_shared).transpose(0, 1)
    pairs = here.unsqueeze(1) & present
    paid = members if config.cross == "prior" else pairs  # a draw from the prior has no divergence
    betas, weights = config.private_betas, config.reconstruction_weights
    kl_weights = kl_shared.new_tensor([[betas[name] * divergence_weight] for name in config.modalities])
    log_p_weights = kl_shared.new_tensor([[weights[name]] for name in config.modalities])
    cost = (
        config.beta * divergence_weight * kl_shared
        + (paid * (kl_weights * kl_privates)).sum(1)
        - (log_p_weights * log_ps).sum(1)
    )
    return LossOutput(
        row_loss=cost.sum(0),
        terms=_sum_over_rows(
            term_names(config),
            totals=(cost, kl_shared, kl_privates, log_ps),
            counts=(torch.ones_like(here), here, pairs[0], pairs),
        ),
    )


def term_names(config: DMVAEConfig) -> tuple[str, ...]:
    """Return the names of the terms, in their fixed order."""
    sources, modalities = config.source_names, config.modalities
    return (
        *sources,
        *(f"kl_shared/{source}" for source in sources),
        *(f"kl_private/{name}" for name in modalities),
        *(f"log_likelihood/{source}/{name}" for source in sources for name in modalities),
    )


def _sources(
    config: DMVAEConfig, observed: Mapping[str, Observed], noise: Noise
) -> tuple[DiagGaussian, Bool[Tensor, "source modality row"], Bool[Tensor, "modality row"]]:
    """Return the shared posterior of every source `(source, row, dim)`, its members, and who has what.

    A source without members does not exist; the prior, or what an encoder says of nothing, stands in its place.
    """
    zeros = torch.zeros_like(noise.shared[0])
    nowhere = torch.zeros(zeros.shape[0], dtype=torch.bool, device=zeros.device)
    parts = [observed.get(name) for name in config.modalities]
    means = torch.stack([zeros if part is None else part.scatter(part.shared.mean) for part in parts])
    log_vars = torch.stack([zeros if part is None else part.scatter(part.shared.log_var) for part in parts])
    present = torch.stack([nowhere if part is None else part.present for part in parts])
    joint = product_of_experts(means, log_vars, present)
    if config.sources == "joint":
        return DiagGaussian(joint.mean[None], joint.log_var[None]), present[None], present
    if config.sources == "subsets":
        assert noise.subsets is not None
        subsets = choose_subsets(noise.subsets, present)
        if config.cross == "prior":
            subsets = with_complements(subsets, present)[: config.num_subsets]
        products = [joint, *(product_of_experts(means, log_vars, subset) for subset in subsets)]
        means, log_vars = torch.stack([p.mean for p in products]), torch.stack([p.log_var for p in products])
        return DiagGaussian(means, log_vars), torch.cat((present[None], subsets)), present
    alone = torch.eye(len(present), dtype=torch.bool, device=present.device).unsqueeze(-1) & present
    shared = DiagGaussian(torch.cat((joint.mean[None], means)), torch.cat((joint.log_var[None], log_vars)))
    return shared, torch.cat((present[None], alone)), present


def choose_subsets(
    normals: Float[Tensor, "subset row choice"], present: Bool[Tensor, "modality row"]
) -> Bool[Tensor, "subset modality row"]:
    """Return random subsets of the modalities that each row has.

    The size of a subset is uniform in 1, ..., max(1, |A| - 1), and its members are uniform given the size, so that
    prediction from one modality and from all but one are trained equally. A row with one modality always has that
    subset, a row without any the empty one. The result depends only on the row's own normals.
    """
    scores, number = normals[..., :-1].permute(0, 2, 1), torch.special.ndtr(normals[..., -1])
    ranks = scores.masked_fill(~present, -math.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    largest = (present.sum(0) - 1).clamp(min=1)
    # in float32 the distribution function of the largest normals is 1
    size = 1 + (number * largest).floor().long().clamp(max=largest - 1)
    chosen: Tensor = (ranks < size.unsqueeze(1)) & present
    return chosen


def with_complements(
    chosen: Bool[Tensor, "subset modality row"], present: Bool[Tensor, "modality row"]
) -> Bool[Tensor, "both modality row"]:
    """Put after each subset what it leaves of a row: every modality is inside one of the two and outside the other.

    A row with one modality has nothing to predict, and no subsets.
    """
    some = chosen & (present.sum(0) > 1)
    return torch.stack((some, present & some.any(1, keepdim=True) & ~some), dim=1).flatten(0, 1)


def _families(observed: Mapping[str, Observed], decoders: Mapping[str, Decode]) -> list[tuple[str, ...]]:
    """Group complete modalities whose decoders can be batched."""
    return group_by_layout(
        {name: decoder_layout(decoders[name]) if part.rows is None else None for name, part in observed.items()}
    )


def _log_likelihood(
    parts: Sequence[Observed],
    pairs: Bool[Tensor, "source row"] | None,
    z: Float[Tensor, "member source row latent"],
    decoders: Sequence[Decode],
    likelihoods: Sequence[Likelihood],
) -> Float[Tensor, "member source row"]:
    """Return log p(x_i | z_s, z_pi) of every pair of a source and a row, 0 for pairs that do not exist.

    Only existing pairs are decoded (None: all exist), in one call for all sources and members of a group unless the
    result is too large.
    """
    grid, values, cells = z.shape[:3], [part.values for part in parts], [part.cells for part in parts]
    z = z.flatten(1, 2)
    if pairs is None and _num_pieces(z, likelihoods[0]) == 1:
        output = decode_each(decoders, z)
        return log_prob_each(
            likelihoods,
            output.reshape(*grid, *output.shape[2:]),
            [value.unsqueeze(0) for value in values],
            [mask if mask is None else mask.unsqueeze(0) for mask in cells],
        )
    chosen = torch.arange(z.shape[1], device=z.device) if pairs is None else pairs.flatten().nonzero().squeeze(1)
    place = parts[0].present.cumsum(0) - 1  # of a row of the batch among the observed ones
    z, rows = z.index_select(1, chosen), place[chosen % len(place)]
    num = _num_pieces(z, likelihoods[0])
    found = []
    for own_z, own_rows in zip(z.tensor_split(num, dim=1), rows.tensor_split(num), strict=True):
        output = decode_each(decoders, own_z)
        own_values = [part.index_select(0, own_rows) for part in values]
        own_cells = [mask if mask is None else mask.index_select(0, own_rows) for mask in cells]
        found.append(log_prob_each(likelihoods, output, own_values, own_cells))
    log_p = torch.cat(found, dim=1)
    return log_p.new_zeros(grid[0], grid[1] * grid[2]).index_copy(1, chosen, log_p).view(grid)


def _num_pieces(z: Float[Tensor, "member pair latent"], likelihood: Likelihood) -> int:
    """Return the number of calls to decode latents in; 1 unless the device is the CPU."""
    numbers = z.shape[0] * z.shape[1] * math.prod(likelihood.output_shape)
    return max(1, numbers // _DECODED_NUMBERS) if z.device.type == "cpu" else 1


def _in_order(found: list[Tensor], names: list[str], config: DMVAEConfig, like: Tensor) -> Tensor:
    """Put the tables `(member, ...)` of groups in the order of the modalities, with zeros for absent modalities."""
    absent = len(names) - sum(len(table) for table in found)
    table = torch.cat([*found, torch.zeros_like(like).expand(absent, *like.shape)])
    if names == list(config.modalities):
        return table
    return table[torch.tensor([names.index(name) for name in config.modalities], device=table.device)]


def _sum_over_rows(names: tuple[str, ...], totals: tuple[Tensor, ...], counts: tuple[Tensor, ...]) -> TermSums:
    """Sum tables `(..., row)` over rows without gradients, in float64 to keep the precision of long sums."""

    def add_up(tables: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([table.detach().flatten(0, -2) for table in tables]).sum(-1, dtype=torch.float64)

    return TermSums(names, add_up(totals), add_up(counts))
