"""Estimate the NLL of every row of a split, block by block, in one process or on a cluster."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from dmvae.config.evaluation import Device, EvaluationConfig
from dmvae.data.progress import Progress
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.masking import Removal
from dmvae.model.dmvae import DMVAE
from dmvae.platform.evaluate.block_nll import BlockNLL
from dmvae.platform.evaluate.row_store import BLOCK_ROWS, Columns, RowStore
from dmvae.platform.evaluate.worker_pool import map_on_workers, torch_device
from dmvae.platform.remote_fs import local


@dataclass(frozen=True)
class Task:
    """What every process needs to evaluate a split.

    Attributes:
        model_dir: the folder of a model or a checkpoint, or its URI.
        dataset: a folder or URI.
        config: the split, and how its NLL is estimated.
        device: where to compute.
        removal: also evaluate what is left when modalities are removed.
        trust: packages whose code the model may import.
    """

    model_dir: str
    dataset: str
    config: EvaluationConfig
    device: Device = "auto"
    removal: Removal | None = None
    trust: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class NLLTable:
    """Per-row estimates of a split, in its order.

    Attributes:
        columns: for each row `id`, `nll` and its Monte Carlo error `se` in nats, `ess`, `khat`, `trusted`,
            `proposal`, `bound` (the negative joint ELBO) and `is_density`; with `each_modality` also `marginal/M`,
            `conditional/M` and their errors `marginal_se/M`, `conditional_se/M`, NaN if the row lacks M or, for
            the conditional, has no other modality. A removal adds `missing/HOW/RATE/nll`, the joint NLL of what is
            left, and `missing/HOW/RATE/conditional/M`, that of M given what is left of the others, with their errors.
    """

    columns: Columns

    @property
    def is_density(self) -> bool:
        """Whether every observed value has a density under the model; false for Bernoulli values between 0 and 1."""
        return bool(self.columns["is_density"].all())

    @property
    def proposal(self) -> str:
        """The proposal distribution of the latents."""
        return str(self.columns["proposal"][0])

    @property
    def name(self) -> str:
        """`nll`, or `bce` if the values have no density and the result is a binary cross entropy."""
        return "nll" if self.is_density else "bce"

    def summary(self) -> dict[str, float]:
        """Return the mean NLL in nats per row, its standard errors, and the quality of the draws.

        `_se` is the error over rows, `_mc_se` that of the Monte Carlo estimate alone. `_ess_p05` and `_khat_p95` are
        percentiles over rows. `_untrusted` is the share of rows with an unreliable error, `_untrusted_rows` their
        count. `bound_gap` is the mean distance from the NLL up to the negative joint ELBO.
        """
        nll, name = self.columns["nll"], self.name
        gap = self.columns["bound"] - nll
        metrics = _mean(name, "", nll, self.columns["se"])
        metrics |= {f"{name}_ess": float(np.median(self.columns["ess"]))}
        metrics |= {f"{name}_ess_p{q:02d}": float(np.percentile(self.columns["ess"], q)) for q in (5, 25)}
        khat = self.columns["khat"][np.isfinite(self.columns["khat"])]
        metrics |= {f"{name}_khat_p{q}": float(np.percentile(khat, q)) for q in (50, 95) if len(khat)}
        untrusted = ~self.columns["trusted"].astype(bool)
        metrics |= {f"{name}_untrusted": float(untrusted.mean()), f"{name}_untrusted_rows": float(untrusted.sum())}
        metrics |= {f"{name}_bound_gap": float(gap.mean()), f"{name}_rows": float(len(nll))}
        return metrics | self._means_of_parts()

    def _means_of_parts(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for key, values in sorted(self.columns.items()):
            if (parts := _parse(key)) is not None:
                prefix, kind, end, error = parts
                here = np.isfinite(values)
                metrics |= _mean(f"{prefix}{self.name}{kind}", end, values[here], self.columns[error][here])
        return metrics


def _parse(column: str) -> tuple[str, str, str, str] | None:
    """Return a column's metric prefix, kind and modality, and the column of its error; None if it is not averaged."""
    *path, kind, last = ["", *column.split("/")]
    prefix = "".join(f"{part}/" for part in path if part)
    if kind in ("marginal", "conditional"):
        return prefix, f"_{kind}", f"/{last}", f"{prefix}{kind}_se/{last}"
    return (column.removesuffix("nll"), "", "", f"{column}_se") if column.endswith("/nll") else None


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
    progress: Callable[[str], None] = lambda line: None,
    store: RowStore | None = None,
) -> NLLTable:
    """Estimate the joint NLL of every row of a split over the modalities that the row has.

    A row's estimate depends only on the model, the seed and the row's id.

    Args:
        task: the model, the dataset and what to estimate.
        workers: with more than one, Ray actors on the connected cluster.
        progress: called with a line every few seconds.
        store: keeps finished blocks on disk; blocks that it holds already are not estimated again.

    Raises:
        ValueError: if a GPU is requested and none is visible, or an estimate is not finite.
    """
    split = open_dataset(task.dataset).split(task.config.split)
    total = -(-len(split) // BLOCK_ROWS)
    blocks: dict[int, Columns] = {} if store is None else store.blocks()
    todo = [number for number in range(total) if number not in blocks]
    done = sum(len(block["id"]) for block in blocks.values())
    report = Progress(progress, f"NLL of {split.name}:", len(split), already_done=done)
    try:
        for number, block in map_on_workers(Evaluator, (task,), Evaluator.estimate, todo, workers, task.device):
            _check_finite(block, split.name)
            blocks[number] = block
            if store is not None:
                store.add(number, block)
            done += len(block["id"])
            report.update(done)
    finally:
        if store is not None:
            store.flush()
    columns = {name: np.concatenate([blocks[number][name] for number in range(total)]) for name in blocks[0]}
    if store is not None and todo:
        store.finish(columns)
    return NLLTable(columns)


def _check_finite(block: Columns, split: str) -> None:
    wrong = block["id"][~np.isfinite(block["nll"])]
    if len(wrong):
        raise ValueError(
            f"NLL is not finite for {len(wrong)} rows of a block of split {split!r}, the first with id {wrong[0]}. Its "
            f"values or the model's weights are far outside of those in training. Check the dataset with jobs.inspect, "
            f"and the model on another split."
        )


class Evaluator:
    """The model and the rows of one process."""

    def __init__(self, task: Task) -> None:
        self._task = task
        with local(task.model_dir) as folder:
            self._model = DMVAE.load(folder, trust=task.trust)
        self._model.to(torch_device(task.device))
        self._split = open_dataset(task.dataset).split(task.config.split)

    def estimate(self, number: int) -> tuple[int, Columns]:
        """Return `number` and the columns of that block."""
        # the last bits of a product depend on the number of threads, and Ray gives an actor one
        with _one_thread():
            rows = np.arange(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self._split)))
            batch = self._split.read(rows, self._model.dtype)
            return number, BlockNLL(self._model, batch, self._task.config, self._task.removal).columns()


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
