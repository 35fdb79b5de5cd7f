"""The negative log-likelihood of a split under a model, in one process or spread over a cluster's."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmvae.comparison import coherence, compare_with_pca
from dmvae.config.evaluation import EvaluateConfig, EvaluationConfig
from dmvae.data.dataset import Dataset, open_dataset
from dmvae.model import DMVAE
from dmvae.platform.cluster import local_cluster, resources

BLOCK_ROWS = 64
"""Rows of the unit of work: a row's figures come from the same arithmetic whoever computes its block."""
_COLUMNS = ("nll", "se", "ess", "khat", "trusted")


@dataclass(frozen=True, eq=False)
class NLLTable:
    """Per-row estimates of a split, in its order.

    Attributes:
        columns: `id`, and of each row `nll` and its Monte Carlo error `se` in nats, `ess`, `khat`, `trusted`.
        is_density: whether every observed value has a density under the model; false for grey Bernoulli values.
        proposal: where latents were drawn from.
    """

    columns: dict[str, np.ndarray]
    is_density: bool
    proposal: str

    @property
    def name(self) -> str:
        """`nll`, or `bce` where the figure is a binary cross entropy and no likelihood."""
        return "nll" if self.is_density else "bce"

    def summary(self) -> dict[str, float]:
        """Return the mean per row in nats, its errors (over rows; Monte Carlo alone), and the draws' quality."""
        nll, se = self.columns["nll"], self.columns["se"]
        rows = len(nll)
        return {
            self.name: float(nll.mean()),
            f"{self.name}_se": float(nll.std(ddof=1) / math.sqrt(rows)) if rows > 1 else math.nan,
            f"{self.name}_mc_se": float(np.sqrt(np.square(se).sum()) / rows),
            f"{self.name}_ess": float(np.median(self.columns["ess"])),
            f"{self.name}_untrusted": float(1 - self.columns["trusted"].mean()),
        }


def evaluate_nll(
    model_dir: Path,
    dataset: str,
    config: EvaluationConfig,
    workers: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NLLTable:
    """Estimate the joint NLL of every row of a split over what the row has.

    A row's estimate depends on the model, the seed and its id alone.

    Args:
        model_dir: a model's or a checkpoint's folder.
        dataset: a dataset's folder.
        config: split, draws, proposal, seed.
        workers: with more than one, Ray actors on the cluster that is already connected.
        progress: called with (blocks done, blocks in all).
    """
    total = -(-len(open_dataset(dataset).split(config.split)) // BLOCK_ROWS)
    blocks: dict[int, _Block] = {}
    for number, block in _estimates((str(model_dir), str(Path(dataset).absolute()), config), workers, total):
        blocks[number] = block
        progress(len(blocks), total)
    parts = [blocks[number] for number in range(total)]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in ("id", *_COLUMNS)}
    return NLLTable(columns, all(part.is_density for part in parts), parts[0].proposal)


@dataclass(frozen=True, eq=False)
class _Block:
    columns: dict[str, np.ndarray]
    is_density: bool
    proposal: str


class _Evaluator:
    """A process's model and rows; the unit of work is a block of rows."""

    def __init__(self, model_dir: str, dataset: str, config: EvaluationConfig) -> None:
        self._model = DMVAE.load(model_dir)
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._split, self._config = open_dataset(dataset).split(config.split), config

    def estimate(self, number: int) -> tuple[int, _Block]:
        """Return the figures of block `number`."""
        model, config = self._model, self._config
        rows = np.arange(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self._split)))
        batch = self._split.read(rows, model.dtype)
        estimate = model.joint_nll(batch, config.num_draws, config.chunk, config.seed, proposal=config.proposal)
        masks = batch.masks or {}
        density = all(
            model.likelihoods[name].is_density(values[masks[name]] if name in masks else values)
            for name, values in batch.data.items()
        )
        columns = {name: getattr(estimate, name).cpu().numpy() for name in _COLUMNS}
        return number, _Block({"id": np.asarray(batch.ids), **columns}, density, str(estimate.proposal))


def _estimates(args: tuple[str, str, EvaluationConfig], workers: int, total: int) -> Iterator[tuple[int, _Block]]:
    if workers == 1:
        yield from map(_Evaluator(*args).estimate, range(total))
        return
    import ray
    from ray.util import ActorPool

    has_gpus = resources().get("GPU", 0) >= workers
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(_Evaluator)
    pool = ActorPool([actor.remote(*args) for _ in range(min(workers, total))])
    yield from pool.map_unordered(lambda evaluator, number: evaluator.estimate.remote(number), list(range(total)))


def judge(
    model_dir: Path,
    dataset: Dataset,
    config: EvaluationConfig,
    train_split: str,
    workers: int,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Return the NLL of a split and, if asked for, rivals and coherence; every name begins with the split's.

    Args:
        model_dir: a model's or a checkpoint's folder.
        dataset: with the model's modalities.
        config: split, draws, proposal, seed, rivals.
        train_split: what rivals are fitted to.
        workers: as in `evaluate_nll`.
        progress: gets lines for a person.
    """
    split = dataset.split(config.split)
    progress(f"NLL of {config.split}: {len(split):,} rows, {config.num_draws} draws each")
    table = evaluate_nll(model_dir, str(dataset.path), config, workers, Progress(progress, f"NLL of {config.split}"))
    figures = table.summary()
    if config.compare:
        progress("fitting rivals and classifiers")
        model, train = DMVAE.load(model_dir), dataset.split(train_split)
        figures |= compare_with_pca(model, train, split, table.columns["nll"]) if table.is_density else {}
        figures |= coherence(model, train, split)
    return {f"{config.split}/{name}": value for name, value in figures.items()}


def evaluate(config: EvaluateConfig, progress: Callable[[str], None]) -> dict[str, float]:
    """Run `jobs.evaluate`.

    Raises:
        ValueError: if model and dataset do not fit, or the split does not exist.
    """
    dataset = open_dataset(config.dataset)
    check_fit(DMVAE.load(config.model), dataset)
    for name, info in dataset.manifest.modalities.items():
        if info.log_jacobian:
            progress(f"{name}: add {info.log_jacobian:.3f} nats a row that has it for the NLL of the stored values")
    with local_cluster(config.workers) if config.workers > 1 else nullcontext():
        return judge(Path(config.model), dataset, config.evaluation, config.train_split, config.workers, progress)


def check_fit(model: DMVAE, dataset: Dataset) -> None:
    """Check that a model has the modalities and shapes of a dataset.

    Raises:
        ValueError: saying what differs.
    """
    found, own = dict(dataset.manifest.input_dims), model.config.shapes
    if found != own:
        raise ValueError(f"a model is judged on data of its own modalities {own}; {dataset.path} has {found}.")


class Progress:
    """Tell a person how far a loop has come, every few seconds, with the time left."""

    def __init__(self, say: Callable[[str], None], what: str) -> None:
        self._say, self._what = say, what
        self._start = self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` units are done."""
        now = time.monotonic()
        if now - self._said > 5 and done < total:
            left = int((now - self._start) / done * (total - done))
            self._say(f"{self._what}  {done / total:4.0%}  {left // 60}:{left % 60:02d} left")
            self._said = now
