"""Embed a dataset: write the latents of every row, and imputations on request, as Parquet files."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dmvae.config.registry import EmbedConfig
from dmvae.data.batch import Batch, has, has_cells
from dmvae.data.files import sha256_of
from dmvae.data.progress import Progress
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.distributions.likelihoods.columns import Columns
from dmvae.evaluation.metrics import generator_of
from dmvae.model.dmvae import DMVAE
from dmvae.model.named_values import written
from dmvae.model.predictor import QUANTILES, UNITS, ModalitySpec, Predictor
from dmvae.model.serialization import MODEL_PRIOR, MODEL_WEIGHTS
from dmvae.platform.cluster import local_cluster
from dmvae.platform.evaluate.checks import check_fit
from dmvae.platform.evaluate.worker_pool import map_on_workers, torch_device
from dmvae.platform.serve.registry import downloaded

_BLOCK_ROWS = 1024
_DRAWS = 100  # of imputed values
_MOST_COLUMNS = 1000
"""Features that get an imputed column each, at most; of more, a row's values are one list."""
_KEY = b"dmvae.made_by"


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a split, and the file that their latents are written to."""

    split: str
    first: int
    rows: int
    file: str


@dataclass(frozen=True)
class EmbedSummary:
    """What was embedded: all rows, the rows that this call embedded (`fresh`), and its speed."""

    output: Path
    rows: int
    fresh: int
    rows_per_second: float


def embed(config: EmbedConfig, progress: Callable[[str], None]) -> EmbedSummary:
    """Embed every row of a dataset once; finished shards are kept.

    Raises:
        ValueError: if the model does not fit the dataset, or the output belongs to another model or dataset.
        RegistryError: if MLflow cannot be reached, has no such model, or lacks its files.
    """
    dataset, output = open_dataset(config.dataset), Path(config.output)
    with _model_folder(config) as folder:
        check_fit(DMVAE.load(folder, trust=config.trust), dataset)
        key = _key(folder, dataset, config)
        shards = list(_shards(dataset, config.split))
        todo = [shard for shard in shards if not _is_finished(output / shard.file, shard, key)]
        total, fresh = sum(s.rows for s in shards), sum(s.rows for s in todo)
        done = total - fresh
        if done:
            progress(f"{done:,} of {total:,} rows are already embedded")
        report, start = Progress(progress, "embedded", total, already_done=done), time.monotonic()
        args = (str(folder), dataset.where, str(output.absolute()), config, key)
        with local_cluster(config.workers) if min(config.workers, len(todo)) > 1 else nullcontext():
            for shard in map_on_workers(Embedder, args, Embedder.write, todo, config.workers):
                done += shard.rows
                report.update(done)
    return EmbedSummary(output, total, fresh, fresh / max(time.monotonic() - start, 1e-9))


@contextmanager
def _model_folder(config: EmbedConfig) -> Iterator[Path]:
    """Yield the folder of the model that `config` names: a registered one, a run's best, or its own."""
    if config.model.startswith("models:/"):
        with downloaded(config.model, config.tracking) as folder:
            yield folder
        return
    given = Path(config.model).absolute()
    yield given if (given / MODEL_WEIGHTS).is_file() else given / "best"


def _shards(dataset: Dataset, split: str | None) -> Iterator[Shard]:
    names = dataset.manifest.splits if split is None else {split: dataset.manifest.splits[dataset.split(split).name]}
    for name, info in names.items():
        firsts = itertools.accumulate((shard.rows for shard in info.shards), initial=0)
        for number, (first, shard) in enumerate(zip(firsts, info.shards, strict=False)):
            yield Shard(name, first, shard.rows, f"{name}/part-{number:05d}.parquet")


def _key(folder: Path, dataset: Dataset, config: EmbedConfig) -> str:
    """Identify everything that the output depends on: the model, the dataset, the settings."""
    weights, prior = sha256_of(folder / MODEL_WEIGHTS), folder / MODEL_PRIOR
    fitted = [sha256_of(prior)] if config.impute and prior.is_file() else []
    return json.dumps([weights, dataset.manifest.fingerprint, config.private, config.impute, *fitted])


def _is_finished(file: Path, shard: Shard, key: str) -> bool:
    if not file.is_file():
        return False
    found = pq.read_metadata(file)
    if (found.metadata or {}).get(_KEY) != key.encode():
        raise ValueError(f"{file} belongs to another model, dataset or other settings. Choose another output.")
    return bool(found.num_rows == shard.rows)


class Embedder:
    """The model and the dataset of one process; the unit of work is a shard."""

    def __init__(self, folder: str, dataset: str, output: str, config: EmbedConfig, key: str) -> None:
        torch.set_num_threads(1)
        self._dataset, self._output, self._config, self._key = open_dataset(dataset), Path(output), config, key
        self._model = DMVAE.load(folder, trust=config.trust)
        self._model.to(torch_device())
        self._stored = {
            name: ModalitySpec.model_validate(info.model_dump())
            for name, info in self._dataset.manifest.modalities.items()
        }
        has_specs = Path(folder, UNITS).is_file()
        self._trained = Predictor.load(Path(folder), config.trust).units if has_specs else self._stored

    def write(self, shard: Shard) -> Shard:
        """Embed a shard; its file appears once it is complete."""
        file = self._output / shard.file
        file.parent.mkdir(parents=True, exist_ok=True)
        draft, writer = file.with_name(f".{file.name}.partial"), None
        split = self._dataset.split(shard.split)
        for first in range(0, shard.rows, _BLOCK_ROWS):
            rows = np.arange(shard.first + first, shard.first + min(first + _BLOCK_ROWS, shard.rows))
            table = self._table(split.read(rows, self._model.dtype)).replace_schema_metadata({_KEY: self._key.encode()})
            _check_finite(table, shard)
            writer = writer or pq.ParquetWriter(draft, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
            draft.replace(file)
        return shard

    def _table(self, batch: Batch) -> pa.Table:
        batch = self._rescaled(batch)
        with torch.no_grad():
            shared, private = self._model.posteriors(batch)
        columns: dict[str, pa.Array] = {"id": pa.array(np.asarray(batch.ids))}
        columns |= {f"observed/{name}": pa.array(has(batch, name).numpy()) for name in self._trained}
        columns |= {"shared_mean": _lists(shared.mean), "shared_log_var": _lists(shared.log_var)}
        if self._config.private:
            for name, part in private.items():
                observed = has(batch, name).numpy()
                columns[f"private_mean/{name}"] = _lists(part.mean, observed)
                columns[f"private_log_var/{name}"] = _lists(part.log_var, observed)
        if self._config.impute:
            generator = generator_of(self._model, batch, 0)
            if self._model.config.missing_cells:
                latents = self._model.draw_posterior(batch, _DRAWS)
                means = {name: draws.mean(0) for name, draws in latents.modalities_z.items()}
                best = self._model.decode({"z": latents.z.mean(0), "modalities_z": means})
                drawn = self._model.decode(latents)
            else:
                best = self._model.predict(batch, return_mean=True)
                drawn = self._model.predict(batch, N=_DRAWS, generator=generator)
            for name, spec in self._trained.items():
                values = spec.show(self._model.means(best[name], name, batch).float().cpu())
                columns |= self._imputed(name, spec, values, best[name], batch)
                if spec.classes is None:
                    columns |= self._spread(name, spec, drawn[name], batch, generator)
        return pa.table(columns)

    def _spread(
        self, name: str, spec: ModalitySpec, output: torch.Tensor, batch: Batch, generator: torch.Generator
    ) -> dict[str, pa.Array]:
        """Return standard deviation and quantiles of draws of the values that rows lack, of columns without classes."""
        output = output.reshape(_DRAWS, len(batch), *output.shape[2:])
        draws = spec.show(self._model.draw_values(output, name, batch, generator).float().cpu())
        found = self._columns("imputed_sd", name, spec, draws.std(0), batch, as_written=False)
        for share in (QUANTILES[0], QUANTILES[-1]):
            values = draws.quantile(share, dim=0, interpolation="nearest")
            found |= self._columns(f"imputed_q{share:.2f}", name, spec, values, batch)
        classes = {
            feature for feature, column in zip(spec.features or (), spec.columns or (), strict=False) if column.classes
        }
        return {key: cells for key, cells in found.items() if key.rpartition("/")[2] not in classes}

    def _columns(
        self, what: str, name: str, spec: ModalitySpec, values: torch.Tensor, batch: Batch, as_written: bool = True
    ) -> dict[str, pa.Array]:
        """Return values of a modality that rows lack: a column for each feature that has a name, else one of lists.

        A column is null where a row has the cell. A list has all cells of a row that lacks some; those that the row has
        keep their values, with deviation 0. It is null for other rows.
        """
        known = has_cells(batch, name)
        if spec.features is None or len(spec.features) > _MOST_COLUMNS:
            if spec.classes is not None:
                given = torch.nn.functional.one_hot(batch.data[name].cpu(), spec.classes).to(values)
                filled = torch.where(known.unsqueeze(-1), given, values)
            else:
                given = spec.show(batch.data[name].cpu().to(values)) if as_written else torch.zeros_like(values)
                filled = torch.where(known, given, values)
            return {f"{what}/{name}": _lists(filled.flatten(1), ~known.flatten(1).all(1).numpy())}
        found: dict[str, pa.Array] = {}
        for place, feature in enumerate(spec.features):
            cells: Any = values[:, place].numpy()
            if spec.columns is not None and as_written:
                cells = [written(number, spec.columns[place]) for number in cells.tolist()]
            found[f"{what}/{name}/{feature}"] = pa.array(cells, mask=known[:, place].numpy())
        return found

    def _imputed(
        self, name: str, spec: ModalitySpec, values: torch.Tensor, output: torch.Tensor, batch: Batch
    ) -> dict[str, pa.Array]:
        """Return the imputed values of a modality, and the probabilities of classes."""
        found, known = self._columns("imputed", name, spec, values, batch), has_cells(batch, name)
        likelihood = self._model.likelihoods[name]
        if spec.columns is None or spec.features is None or not isinstance(likelihood, Columns):
            return found
        for place, p in sorted(likelihood.probabilities(output).items()):
            for cls, share in zip(spec.columns[place].classes, p.float().cpu().numpy().T, strict=True):
                mask = known[:, place].numpy()
                found[f"probability/{name}/{spec.features[place]}/{cls}"] = pa.array(share, mask=mask)
        return found

    def _rescaled(self, batch: Batch) -> Batch:
        """Bring values that this dataset scales differently to the scale that the model was trained on."""
        data = {
            name: values
            if self._stored[name] == self._trained[name]
            else self._trained[name].read(self._stored[name].show(values.double())).to(values.dtype)
            for name, values in batch.data.items()
        }
        return replace(batch, data=data)


def _check_finite(table: pa.Table, shard: Shard) -> None:
    for name in table.column_names:
        column = table[name].combine_chunks()
        if not pa.types.is_list(column.type) or not len(column.values):
            continue
        wrong = ~np.isfinite(column.values.to_numpy().reshape(len(column), -1)).all(axis=1)
        wrong &= column.is_valid().to_numpy(zero_copy_only=False)
        if wrong.any():
            raise ValueError(
                f"{name} is not finite for {int(wrong.sum())} rows of split {shard.split!r}, the first with id "
                f"{table['id'][int(wrong.argmax())]}. Its values or the model's weights are far outside of those in "
                f"training. Check the dataset with jobs.inspect."
            )


def _lists(values: torch.Tensor, valid: np.ndarray | None = None) -> pa.Array:
    """Return `(rows, dim)` as a column of lists, null where `valid` is false."""
    flat = values.detach().float().cpu().numpy()
    offsets = pa.array(np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1])
    mask = None if valid is None else pa.array(~valid)
    return pa.ListArray.from_arrays(offsets, pa.array(flat.reshape(-1)), mask=mask)
