"""A model over a dataset: latents, and imputations, of every row once, as Parquet beside the dataset's shards."""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmvae.config.registry import EmbedConfig
from dmvae.data.batch import Batch, has
from dmvae.data.files import sha256_of
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.model.predictor import UNITS, ModalitySpec, Predictor
from dmvae.model.serialization import MODEL_WEIGHTS
from dmvae.platform.cluster import local_cluster, resources
from dmvae.platform.evaluate.checks import check_fit
from dmvae.platform.serve.registry import download

_BLOCK_ROWS = 1024
_KEY = b"dmvae.made_by"


@dataclass(frozen=True)
class Shard:
    """Some rows of a split, and the file that their latents go to."""

    split: str
    first: int
    rows: int
    file: str


@dataclass(frozen=True)
class EmbedSummary:
    """What was embedded: rows in all, rows done now, and how fast."""

    output: Path
    rows: int
    fresh: int
    rows_per_second: float


def embed(config: EmbedConfig, progress: Callable[[str], None]) -> EmbedSummary:
    """Embed every row of a dataset once; what is finished is not done again.

    Raises:
        ValueError: if model and dataset do not fit, or the output is another model's or dataset's.
        RegistryError: if MLflow has no such model, or its files are gone.
    """
    dataset, output = open_dataset(config.dataset), Path(config.output)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(config, Path(scratch)).absolute()
        check_fit(DMVAE.load(folder), dataset)
        key = _key(folder, dataset, config)
        shards = list(_shards(dataset, config.split))
        todo = [shard for shard in shards if not _is_done(output / shard.file, shard, key)]
        total, fresh = sum(s.rows for s in shards), sum(s.rows for s in todo)
        if fresh < total:
            progress(f"{total - fresh:,} of {total:,} rows are there already")
        begun, done = time.monotonic(), 0
        args = (str(folder), dataset.where, str(output.absolute()), config, key)
        workers = min(config.workers, max(len(todo), 1))
        with local_cluster(workers) if workers > 1 else nullcontext():
            for shard in _run(args, todo, workers):
                done += shard.rows
                speed = done / max(time.monotonic() - begun, 1e-9)
                progress(f"{shard.file}  {total - fresh + done:,}/{total:,} rows  {speed:,.0f} rows/s")
    return EmbedSummary(output, total, fresh, done / max(time.monotonic() - begun, 1e-9))


def model_folder(config: EmbedConfig, scratch: Path) -> Path:
    """Return the folder of the model that `config` names: a registered one, a run's best, or a model's own."""
    if config.model.startswith("models:/"):
        return download(config.model, scratch, config.tracking)
    given = Path(config.model)
    return given if (given / MODEL_WEIGHTS).is_file() else given / "best"


def _shards(dataset: Dataset, split: str | None) -> Iterator[Shard]:
    names = dataset.manifest.splits if split is None else {split: dataset.manifest.splits[dataset.split(split).name]}
    for name, info in names.items():
        firsts = itertools.accumulate((shard.rows for shard in info.shards), initial=0)
        for number, (first, shard) in enumerate(zip(firsts, info.shards, strict=False)):
            yield Shard(name, first, shard.rows, f"{name}/part-{number:05d}.parquet")


def _key(folder: Path, dataset: Dataset, config: EmbedConfig) -> str:
    weights = sha256_of(folder / MODEL_WEIGHTS)
    return json.dumps([weights, dataset.manifest.fingerprint, config.private, config.impute])


def _is_done(file: Path, shard: Shard, key: str) -> bool:
    if not file.is_file():
        return False
    found = pq.read_metadata(file)
    if (found.metadata or {}).get(_KEY) != key.encode():
        raise ValueError(
            f"an output folder holds what one model makes of one dataset with the same settings; {file} is another's. "
            "Choose another output."
        )
    return bool(found.num_rows == shard.rows)


def _run(args: tuple[str, str, str, EmbedConfig, str], todo: Sequence[Shard], workers: int) -> Iterator[Shard]:
    if workers <= 1:
        yield from map(Embedder(*args).write, todo) if todo else ()
        return
    import ray
    from ray.util import ActorPool

    has_gpus = resources().get("GPU", 0) >= workers
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(has_gpus))(Embedder)
    pool = ActorPool([actor.remote(*args) for _ in range(workers)])
    yield from pool.map_unordered(lambda embedder, shard: embedder.write.remote(shard), list(todo))


class Embedder:
    """One process's model and rows; the unit of work is a shard."""

    def __init__(self, folder: str, dataset: str, output: str, config: EmbedConfig, key: str) -> None:
        torch.set_num_threads(1)
        self._dataset, self._output, self._config, self._key = open_dataset(dataset), Path(output), config, key
        self._model = DMVAE.load(folder)
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        self._stored = {
            name: ModalitySpec.model_validate(info.model_dump())
            for name, info in self._dataset.manifest.modalities.items()
        }
        own = Path(folder, UNITS).is_file()
        self._trained = Predictor.load(Path(folder)).units if own else self._stored

    def write(self, shard: Shard) -> Shard:
        """Embed a shard; its file appears when it is whole."""
        file = self._output / shard.file
        file.parent.mkdir(parents=True, exist_ok=True)
        draft, writer = file.with_name(f".{file.name}.partial"), None
        split = self._dataset.split(shard.split)
        for first in range(0, shard.rows, _BLOCK_ROWS):
            rows = np.arange(shard.first + first, shard.first + min(first + _BLOCK_ROWS, shard.rows))
            table = self._table(split.read(rows, self._model.dtype))
            if writer is None:
                schema = table.schema.with_metadata({_KEY: self._key.encode()})
                writer = pq.ParquetWriter(draft, schema)
            writer.write_table(table.replace_schema_metadata({_KEY: self._key.encode()}))
        if writer is not None:
            writer.close()
            draft.replace(file)
        return shard

    def _table(self, batch: Batch) -> pa.Table:
        batch = self._as_trained(batch)
        with torch.no_grad():
            shared, private = self._model.posteriors(batch)
        columns: dict[str, pa.Array] = {"id": pa.array(np.asarray(batch.ids))}
        columns |= {f"observed/{name}": pa.array(has(batch, name).numpy()) for name in self._trained}
        columns |= {"shared_mean": _lists(shared.mean), "shared_log_var": _lists(shared.log_var)}
        if self._config.private:
            for name, part in private.items():
                here = has(batch, name).numpy()
                columns[f"private_mean/{name}"] = _lists(part.mean, here)
                columns[f"private_log_var/{name}"] = _lists(part.log_var, here)
        if self._config.impute:
            outputs = self._model.predict(batch, return_mean=True)
            for name, unit in self._trained.items():
                shown = unit.show(self._model.means(outputs[name], name, batch).float().cpu())
                columns[f"imputed/{name}"] = _lists(shown.flatten(1), ~has(batch, name).numpy())
        return pa.table(columns)

    def _as_trained(self, batch: Batch) -> Batch:
        """Bring values that this dataset scales otherwise to the scale that the model was trained on."""
        data = {
            name: values
            if self._stored[name] == self._trained[name]
            else self._trained[name].read(self._stored[name].show(values.double())).to(values.dtype)
            for name, values in batch.data.items()
        }
        return replace(batch, data=data)


def _lists(values: torch.Tensor, there: np.ndarray | None = None) -> pa.Array:
    """Return `(rows, dim)` as variable lists, null where `there` is false."""
    flat = values.detach().float().cpu().numpy()
    offsets = pa.array(np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1])
    mask = None if there is None else pa.array(~there)
    return pa.ListArray.from_arrays(offsets, pa.array(flat.reshape(-1)), mask=mask)
