"""From a source to a dataset: read and check, divide, shuffle, write; in memory that does not grow with the source."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import (
    CsvSource,
    DigitsSource,
    H5muSource,
    ImagesSource,
    NpzSource,
    ParquetSource,
    PrepareConfig,
    Source,
)
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import save_manifest
from dmvae.data.preparation.build_manifest import survey
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.scan import Scan
from dmvae.data.preparation.sources.csv import read_csv
from dmvae.data.preparation.sources.digits import read_digits
from dmvae.data.preparation.sources.h5mu import read_h5mu
from dmvae.data.preparation.sources.images import read_images
from dmvae.data.preparation.sources.npz import read_npz
from dmvae.data.preparation.sources.parquet import read_parquet
from dmvae.data.preparation.stream import Stream, in_memory
from dmvae.data.preparation.writer import SplitWriter, check_target, new_dataset
from dmvae.data.progress import Progress
from dmvae.data.storage.location import LocalDataset, check_free, locate, upload

Array = np.ndarray[Any, np.dtype[Any]]


def prepare(config: PrepareConfig, progress: Callable[[str], None] = print) -> Path:
    """Make the dataset that `config` describes and return its folder.

    The same configuration and rows give the same bytes. A source is read once; of all its rows a few numbers each are
    held. While it works, the disk holds the rows twice.

    Args:
        config: what to make.
        progress: told, in a line of text each, what is being done and what was found.

    Raises:
        DatasetError: if the folder is taken, the source is not there or breaks a law, or there is no room.
    """
    target = Path(config.dataset)
    check_target(target, config.replace)
    progress(f"reading {config.source.kind}")
    with new_dataset(target, config.replace) as part:
        scratch = part / ".scratch"
        scratch.mkdir()
        stream = read_source(config.source, config.seed, scratch)
        for note in stream.notes:
            progress(note)
        scan = Scan(config, stream, scratch / "rows", progress)
        _write(scan, part, config.shard_megabytes << 20, progress)
        scan.shuffle.remove()
        scratch.rmdir()
        progress("checking what was written")
        origin = config.model_dump(mode="json", exclude={"dataset", "replace"})
        save_manifest(survey(part, scaling=config.scaling, likelihood=config.likelihood, origin=origin), part)
    progress(f"wrote {target}")
    return target


def prepare_and_upload(config: PrepareConfig, progress: Callable[[str], None] = print) -> str:
    """Make the dataset where `config` says, a folder or a URI of an object store, and return that.

    For an object store it is made in a temporary folder and uploaded, the manifest last.

    Raises:
        DatasetError: as `prepare`, or if the store does not take it.
    """
    place = locate(config.dataset)
    if isinstance(place, LocalDataset):
        return str(prepare(config.model_copy(update={"dataset": str(place.folder)}), progress))
    check_free(config.dataset, config.replace)
    with tempfile.TemporaryDirectory(prefix="dmvae-") as scratch:
        folder = prepare(config.model_copy(update={"dataset": f"{scratch}/dataset"}), progress)
        upload(folder, config.dataset, config.replace)
    progress(f"wrote {config.dataset}")
    return config.dataset


def read_source(source: Source, seed: int, scratch: Path) -> Stream:
    """Begin to read a source; `scratch` is a folder for files that are gone when it was read."""
    if isinstance(source, NpzSource):
        return read_npz(source)
    if isinstance(source, ParquetSource):
        return read_parquet(source)
    if isinstance(source, CsvSource):
        return read_csv(source, scratch)
    if isinstance(source, ImagesSource):
        return read_images(source)
    if isinstance(source, H5muSource):
        return read_h5mu(source)
    assert isinstance(source, DigitsSource)
    return in_memory(read_digits(source, seed), "digits")


def _write(scan: Scan, folder: Path, shard_bytes: int, progress: Callable[[str], None]) -> None:
    """Write the rows to the folders of their splits, in the order of the shuffle."""
    means = {name: _training_mean(scan, name) for name in scan.filled}
    observed = {split: dict.fromkeys(scan.columns.modalities, 0) for split in scan.names}
    written, done = Progress(progress, "wrote", len(scan.codes)), 0
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(folder / split, scan.columns, shard_bytes)) for split in scan.names]
        for rows, numbers in scan.shuffle.sorted():
            scan.check_unique(rows, numbers)
            filled, codes = _fill(rows, means), scan.codes[numbers]
            for code, (split, writer) in enumerate(zip(scan.names, writers, strict=True)):
                chosen = filled.take(codes == code)
                writer.write(chosen)
                for name, mask in chosen.present.items():
                    observed[split][name] += int(mask.sum())
            done += len(rows)
            written.update(done)
    for code, (split, counts) in enumerate(observed.items()):
        num = int((scan.codes == code).sum())
        shares = ", ".join(f"{name} in {count / max(num, 1):.1%}" for name, count in counts.items())
        progress(f"{split}: {num} rows, {shares if num else 'empty'}")


def _training_mean(scan: Scan, name: str) -> Array:
    """Return the mean of each feature over the training rows that have a value there, in float64."""
    if "train" not in scan.names:
        raise DatasetError(f"a training mean needs a split 'train'; got {sorted(scan.names)}. Set partial to 'drop'.")
    shape = scan.columns.modalities[name].shape
    count, first, total = np.zeros(shape, dtype=np.int64), np.full(shape, np.nan), np.zeros((1, *shape))
    for rows, numbers in scan.shuffle.sorted(keep=True):
        chosen = (scan.codes[numbers] == scan.names.index("train")) & rows.present[name]
        values = rows.data[name][chosen].astype(np.float64)
        if not len(values):
            continue
        known = ~np.isnan(values)
        count += known.sum(axis=0)
        # from a value of the feature, so that a large mean costs no digits; one by one, so that pieces do not matter
        found = values[known.argmax(axis=0), *np.indices(shape, sparse=True)]
        first = np.where(np.isnan(first), found, first)
        total = np.add.accumulate(np.concatenate((total, np.where(known, values - first, 0))))[-1:]
    if not count.all():
        raise DatasetError(
            f"a training mean needs a training value; got none for {int((count == 0).sum())} features of {name!r}. "
            f"Leave those features out, or set partial to 'drop'."
        )
    return np.asarray(first + total[0] / count)


def _fill(rows: Rows, means: Mapping[str, Array]) -> Rows:
    """Put the training means where an observed row has NaN; rows that miss the modality stay as they are."""
    data = {name: np.where(np.isnan(rows.data[name]), mean, rows.data[name]) for name, mean in means.items()}
    return replace(rows, data={**rows.data, **{name: data[name].astype(rows.data[name].dtype) for name in data}})
