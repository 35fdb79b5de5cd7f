"""Estimate the NLLs of one block of rows: joint, marginal, conditional, and with modalities removed."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dmvae.config.evaluation import EvaluationConfig
from dmvae.data.batch import Batch, has
from dmvae.evaluation.elbo import negative_elbo
from dmvae.evaluation.masking import Removal, mask_modalities
from dmvae.model.dmvae import DMVAE
from dmvae.model.nll.estimate import NLLEstimate
from dmvae.platform.evaluate.row_store import Columns

_ESTIMATE_COLUMNS = ("nll", "se", "ess", "khat", "trusted")

Subsets = Bool[Tensor, "row modality"]
"""A subset of the modalities for every row."""


class BlockNLL:
    """Estimates the columns of a block of rows; a joint NLL that two columns need is estimated once.

    Args:
        model: in eval mode.
        batch: the rows, with ids.
        config: which NLLs to estimate, and how.
        removal: also estimate the NLLs of what is left when modalities are removed.
    """

    def __init__(self, model: DMVAE, batch: Batch, config: EvaluationConfig, removal: Removal | None) -> None:
        self._model, self._batch, self._config, self._removal = model, batch, config, removal
        self._names = config.modalities or model.config.modalities
        self._present = self._presence(batch)
        self._joint = self._estimate(batch, self._names)
        # NLL and error of every row by subset of modalities (a bit mask); NaN where not estimated yet
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._remember(self._bit_masks(self._present), np.arange(len(batch)), self._joint)

    def columns(self) -> Columns:
        """Return the columns that `NLLTable` describes."""
        model, batch, joint, config = self._model, self._batch, self._joint, self._config
        columns: Columns = {"id": np.asarray(batch.ids)}
        columns |= {name: getattr(joint, name).cpu().numpy() for name in _ESTIMATE_COLUMNS}
        evaluated = mask_modalities(batch, *(name for name in batch.data if name not in self._names))
        columns["bound"] = negative_elbo(model, evaluated, seed=config.seed).cpu().numpy()
        columns["proposal"] = np.full(len(batch), joint.proposal)
        columns["is_density"] = np.full(len(batch), self._is_density)
        if config.each_modality:
            for index, name in enumerate(self._names):
                columns |= self._marginal(index, name)
                others = _without(self._present, index)
                columns |= self._conditional(index, name, others, "", others.any(1))
        return columns | self._after_removal()

    def _after_removal(self) -> Columns:
        """Return the joint NLL of what each removal leaves, and each modality's NLL given the other modalities left."""
        columns: Columns = {}
        for prefix, remove in self._removal.each() if self._removal is not None else ():
            left = self._presence(remove(self._batch))
            columns[f"{prefix}/nll"], columns[f"{prefix}/nll_se"] = self._nll(left)
            every_row = torch.ones(len(left), dtype=torch.bool)
            for index, name in enumerate(self._names):
                columns |= self._conditional(index, name, _without(left, index), f"{prefix}/", every_row)
        return columns

    def _marginal(self, index: int, name: str) -> Columns:
        alone = torch.zeros_like(self._present)
        alone[:, index] = self._present[:, index]
        nll, se = self._nll(alone)
        absent = ~self._present[:, index].numpy()
        nll[absent] = se[absent] = math.nan
        return {f"marginal/{name}": nll, f"marginal_se/{name}": se}

    def _conditional(self, index: int, name: str, given: Subsets, prefix: str, rows: Bool[Tensor, " row"]) -> Columns:
        """Return the NLL of a modality given others, NaN for rows that lack it or are not in `rows`."""
        chosen = rows & self._present[:, index]
        given = given & chosen.unsqueeze(1)
        both = given.clone()
        both[:, index] = chosen
        (with_it, with_se), (without_it, without_se) = self._nll(both), self._nll(given)
        # with nothing given this is the marginal and its error: the NLL of no modality is exactly 0
        nll, se = with_it - without_it, np.hypot(with_se, without_se)
        nll[~chosen.numpy()] = se[~chosen.numpy()] = math.nan
        return {f"{prefix}conditional/{name}": nll, f"{prefix}conditional_se/{name}": se}

    def _nll(self, subsets: Subsets) -> tuple[np.ndarray, np.ndarray]:
        """Return every row's joint NLL over its subset of modalities, and its error; 0 for the empty subset."""
        nll, se = np.zeros((2, len(subsets)))
        bit_masks = self._bit_masks(subsets)
        for bits in np.unique(bit_masks[bit_masks > 0]):
            rows = np.flatnonzero(bit_masks == bits)
            cached = self._cache.get(int(bits))
            missing = rows if cached is None else rows[np.isnan(cached[0][rows])]
            if len(missing):
                names = [name for index, name in enumerate(self._names) if bits >> index & 1]
                estimate = self._estimate(self._batch[torch.from_numpy(missing)], names)
                self._remember(bit_masks, missing, estimate)
            values, errors = self._cache[int(bits)]
            nll[rows], se[rows] = values[rows], errors[rows]
        return nll, se

    def _presence(self, batch: Batch) -> Subsets:
        return torch.stack([has(batch, name) for name in self._names], dim=1)

    def _bit_masks(self, subsets: Subsets) -> np.ndarray:
        powers = 2 ** torch.arange(len(self._names))
        bit_masks: np.ndarray = (subsets * powers).sum(1).numpy()
        return bit_masks

    def _remember(self, bit_masks: np.ndarray, rows: np.ndarray, estimate: NLLEstimate) -> None:
        nll, se = estimate.nll.cpu().numpy(), estimate.se.cpu().numpy()
        for bits in np.unique(bit_masks[rows]):
            mine = bit_masks[rows] == bits
            empty = np.full((2, len(self._batch)), math.nan)
            values, errors = self._cache.setdefault(int(bits), (empty[0], empty[1]))
            values[rows[mine]], errors[rows[mine]] = nll[mine], se[mine]

    def _estimate(self, batch: Batch, modalities: Sequence[str]) -> NLLEstimate:
        config = self._config
        return self._model.joint_nll(
            batch, config.num_draws, config.chunk, config.seed, tuple(modalities), config.proposal
        )

    @property
    def _is_density(self) -> bool:
        masks = self._batch.masks or {}
        return all(
            self._model.likelihoods[name].is_density(values[masks[name]] if name in masks else values)
            for name, values in self._batch.data.items()
            if name in self._names
        )


def _without(subsets: Subsets, index: int) -> Subsets:
    others = subsets.clone()
    others[:, index] = False
    return others
