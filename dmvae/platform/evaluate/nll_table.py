"""The NLL of a split's rows, in one process or spread over a cluster's: a block of rows is the unit of work."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dmvae.config.evaluation import Device, EvaluationConfig
from dmvae.data.batch import Batch, has
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.elbo import negative_elbo
from dmvae.evaluation.masking import Removal, mask_modalities
from dmvae.model.dmvae import DMVAE
from dmvae.model.nll.estimate import NLLEstimate
from dmvae.platform.cluster import limits, resources
from dmvae.platform.evaluate.row_store import BLOCK_ROWS, Columns, RowStore
from dmvae.platform.remote_fs import local

_COLUMNS = ("nll", "se", "ess", "khat", "trusted")


@dataclass(frozen=True)
class Task:
    """What every process is told: places (the model's may be a URI), settings, where to compute, what to remove."""

    model_dir: str
    dataset: str
    config: EvaluationConfig
    device: Device = "auto"
    removal: Removal | None = None


@dataclass(frozen=True, eq=False)
class NLLTable:
    """Per-row estimates of a split, in its order.

    Attributes:
        columns: `id`, and of each row `nll` and its Monte Carlo error `se` in nats, `ess`, `khat`, `trusted`,
            `proposal`, `bound` (the negative joint bound) and `is_density`; with `each_modality` also `marginal/M`,
            `conditional/M` and their errors `marginal_se/M`, `conditional_se/M`, NaN where the row lacks M or, for
            the conditional, has nothing else. With a removal `missing/HOW/RATE/` before `nll`, the joint NLL over what
            is left, and before `conditional/M`, that of M given what is left of the others; likewise their errors.
    """

    columns: Columns

    @property
    def is_density(self) -> bool:
        """Whether every observed value has a density under the model; false for grey Bernoulli values."""
        return bool(self.columns["is_density"].all())

    @property
    def proposal(self) -> str:
        """Where latents were drawn from."""
        return str(self.columns["proposal"][0])

    @property
    def name(self) -> str:
        """`nll`, or `bce` where the figure is a binary cross entropy and no likelihood."""
        return "nll" if self.is_density else "bce"

    def summary(self) -> dict[str, float]:
        """Return the mean per row in nats, its errors (over rows; Monte Carlo alone), and the draws' quality.

        `_ess_p05` and `_khat_p95` are percentiles over rows, `_untrusted` is the share and `_untrusted_rows` the count
        of rows whose error is not to be believed, `bound_gap` is how far the joint bound lies above.
        """
        nll, name = self.columns["nll"], self.name
        gap = self.columns["bound"] - nll
        figures = _mean(name, "", nll, self.columns["se"])
        figures |= {f"{name}_ess": float(np.median(self.columns["ess"]))}
        figures |= {f"{name}_ess_p{q:02d}": float(np.percentile(self.columns["ess"], q)) for q in (5, 25)}
        khat = self.columns["khat"][np.isfinite(self.columns["khat"])]
        figures |= {f"{name}_khat_p{q}": float(np.percentile(khat, q)) for q in (50, 95) if len(khat)}
        untrusted = ~self.columns["trusted"].astype(bool)
        figures |= {f"{name}_untrusted": float(untrusted.mean()), f"{name}_untrusted_rows": float(untrusted.sum())}
        figures |= {f"{name}_bound_gap": float(gap.mean()), f"{name}_rows": float(len(nll))}
        for key, values in sorted(self.columns.items()):
            if (parts := _parse(key)) is not None:
                place, kind, end, error = parts
                here = np.isfinite(values)
                figures |= _mean(f"{place}{name}{kind}", end, values[here], self.columns[error][here])
        return figures


def _parse(key: str) -> tuple[str, str, str, str] | None:
    """Return where a column's mean is put, its kind and modality, and the column of its error; None for others."""
    *place, kind, last = ["", *key.split("/")]
    prefix = "".join(f"{part}/" for part in place if part)
    if kind in ("marginal", "conditional"):
        return prefix, f"_{kind}", f"/{last}", f"{prefix}{kind}_se/{last}"
    return (key.removesuffix("nll"), "", "", f"{key}_se") if key.endswith("/nll") else None


def _mean(stem: str, end: str, nll: np.ndarray, se: np.ndarray) -> dict[str, float]:
    rows = len(nll)
    return {
        f"{stem}{end}": float(nll.mean()) if rows else math.nan,
        f"{stem}_se{end}": float(nll.std(ddof=1) / math.sqrt(rows)) if rows > 1 else math.nan,
        f"{stem}_mc_se{end}": float(np.sqrt(np.square(se).sum()) / rows) if rows else math.nan,
    }


def evaluate_nll(
    task: Task,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    store: RowStore | None = None,
) -> NLLTable:
    """Estimate the joint NLL of every row of a split over what the row has.

    A row's estimate depends on the model, the seed and its id alone.

    Args:
        task: a model's or a checkpoint's folder, a dataset's folder, and what is asked for.
        workers: with more than one, Ray actors on the cluster that is already connected.
        progress: called with (blocks done, blocks in all).
        store: keeps blocks as they are done; what it has is not computed again.

    Raises:
        ValueError: if a GPU is asked for and not there.
    """
    total = -(-len(open_dataset(task.dataset).split(task.config.split)) // BLOCK_ROWS)
    blocks: dict[int, Columns] = {} if store is None else store.blocks()
    todo = [number for number in range(total) if number not in blocks]
    try:
        for number, block in _estimates(task, min(workers, len(todo)), todo):
            blocks[number] = block
            if store is not None:
                store.add(number, block)
            progress(len(blocks), total)
    finally:
        if store is not None:
            store.flush()
    columns = {name: np.concatenate([blocks[number][name] for number in range(total)]) for name in blocks[0]}
    if store is not None and todo:
        store.finish(columns)
    return NLLTable(columns)


def _estimates(task: Task, workers: int, todo: Sequence[int]) -> Iterator[tuple[int, Columns]]:
    # an actor that the cluster has no CPU for would be given a block and never answer
    workers = int(min(workers, limits().get("CPU", 1))) if workers > 1 else workers
    if workers <= 1:
        if todo:
            yield from map(Evaluator(task).estimate, todo)
        return
    import ray
    from ray.util import ActorPool

    gpus = (limits() if task.device == "gpu" else resources()).get("GPU", 0)
    has_gpus = task.device != "cpu" and gpus >= workers
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(Evaluator)
    pool = ActorPool([actor.remote(task) for _ in range(workers)])
    yield from pool.map_unordered(lambda evaluator, number: evaluator.estimate.remote(number), list(todo))


def torch_device(device: Device) -> torch.device:
    """Return this process's device of a kind; `auto` is a GPU where it sees one.

    Raises:
        ValueError: if a GPU is asked for and not there.
    """
    there = torch.cuda.is_available()
    if device == "gpu" and not there:
        raise ValueError('device="gpu" needs a GPU, and this process sees none. Use device="auto" or "cpu".')
    return torch.device("cuda" if there and device != "cpu" else "cpu")


class Evaluator:
    """A process's model and rows."""

    def __init__(self, task: Task) -> None:
        self._task = task
        with local(task.model_dir) as folder:
            self._model = DMVAE.load(folder)
        self._model.to(torch_device(task.device))
        self._split = open_dataset(task.dataset).split(task.config.split)

    def estimate(self, number: int) -> tuple[int, Columns]:
        """Return the figures of block `number`."""
        # the last bits of a product depend on the number of threads, and Ray gives an actor one
        with _one_thread():
            rows = np.arange(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self._split)))
            return number, _Block(self._model, self._split.read(rows, self._model.dtype), self._task).columns()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Chosen = Bool[Tensor, "row modality"]
"""Which modalities of which rows are meant."""


class _Block:
    """The figures of a block of rows; a joint NLL that two of them need is estimated once."""

    def __init__(self, model: DMVAE, batch: Batch, task: Task) -> None:
        self._model, self._batch, self._task = model, batch, task
        self._names = task.config.modalities or model.config.modalities
        self._present = torch.stack([has(batch, name) for name in self._names], dim=1)
        self._whole = self._estimate(batch, self._names)
        # per set of modalities, as a binary number, what is known of each row
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._keep(self._codes(self._present), np.arange(len(batch)), self._whole)

    def columns(self) -> Columns:
        """Return all that the task asks for."""
        model, batch, whole, config = self._model, self._batch, self._whole, self._task.config
        columns: Columns = {"id": np.asarray(batch.ids)}
        columns |= {name: getattr(whole, name).cpu().numpy() for name in _COLUMNS}
        counted = mask_modalities(batch, *(name for name in batch.data if name not in self._names))
        columns["bound"] = negative_elbo(model, counted, seed=config.seed).cpu().numpy()
        columns["proposal"] = np.full(len(batch), whole.proposal)
        columns["is_density"] = np.full(len(batch), self._is_density)
        if config.each_modality:
            for place, name in enumerate(self._names):
                columns |= self._marginal(place, name)
                others = self._only_others(self._present, place)
                columns |= self._conditional(place, name, others, "", others.any(1))
        return columns | self._with_less()

    def _with_less(self) -> Columns:
        """Return the NLL of what removals leave, and of each modality given what they leave of the others."""
        columns: Columns = {}
        removal = self._task.removal
        if removal is None:
            return columns
        for prefix, hide in removal.each():
            kept = hide(self._batch)
            left = torch.stack([has(kept, name) for name in self._names], dim=1)
            columns[f"{prefix}/nll"], columns[f"{prefix}/nll_se"] = self._nll(left)
            for place, name in enumerate(self._names):
                others = self._only_others(left, place)
                columns |= self._conditional(place, name, others, f"{prefix}/", torch.ones(len(left), dtype=torch.bool))
        return columns

    def _marginal(self, place: int, name: str) -> Columns:
        alone = torch.zeros_like(self._present)
        alone[:, place] = self._present[:, place]
        nll, se = self._nll(alone)
        absent = ~self._present[:, place].numpy()
        nll[absent] = se[absent] = math.nan
        return {f"marginal/{name}": nll, f"marginal_se/{name}": se}

    def _conditional(self, place: int, name: str, given: Chosen, prefix: str, rows: Bool[Tensor, " row"]) -> Columns:
        """Return the NLL of a modality given others, NaN for rows that lack it or are none of `rows`."""
        chosen = rows & self._present[:, place]
        given = given & chosen.unsqueeze(1)
        both = given.clone()
        both[:, place] = chosen
        (with_it, with_se), (rest, rest_se) = self._nll(both), self._nll(given)
        nll, se = with_it - rest, np.hypot(with_se, rest_se)
        # without anything given it is the marginal, whose error is its own
        nll[~chosen.numpy()] = se[~chosen.numpy()] = math.nan
        return {f"{prefix}conditional/{name}": nll, f"{prefix}conditional_se/{name}": se}

    @staticmethod
    def _only_others(chosen: Chosen, place: int) -> Chosen:
        others = chosen.clone()
        others[:, place] = False
        return others

    def _nll(self, chosen: Chosen) -> tuple[np.ndarray, np.ndarray]:
        """Return every row's joint NLL over its chosen modalities, and its error; 0 for none."""
        nll, se = np.zeros((2, len(chosen)))
        codes = self._codes(chosen)
        for code in np.unique(codes[codes > 0]):
            rows = np.flatnonzero(codes == code)
            known = self._known.get(int(code))
            unknown = rows if known is None else rows[np.isnan(known[0][rows])]
            if len(unknown):
                names = [name for place, name in enumerate(self._names) if code >> place & 1]
                self._keep(codes, unknown, self._estimate(self._batch[torch.from_numpy(unknown)], names))
            values, errors = self._known[int(code)]
            nll[rows], se[rows] = values[rows], errors[rows]
        return nll, se

    def _codes(self, chosen: Chosen) -> np.ndarray:
        powers = 2 ** torch.arange(len(self._names))
        codes: np.ndarray = (chosen * powers).sum(1).numpy()
        return codes

    def _keep(self, codes: np.ndarray, rows: np.ndarray, estimate: NLLEstimate) -> None:
        nll, se = estimate.nll.cpu().numpy(), estimate.se.cpu().numpy()
        for code in np.unique(codes[rows]):
            mine = codes[rows] == code
            nothing = np.full((2, len(self._batch)), math.nan)
            values, errors = self._known.setdefault(int(code), (nothing[0], nothing[1]))
            values[rows[mine]], errors[rows[mine]] = nll[mine], se[mine]

    def _estimate(self, batch: Batch, modalities: Sequence[str]) -> NLLEstimate:
        config = self._task.config
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
