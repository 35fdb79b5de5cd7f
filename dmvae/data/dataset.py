"""A dataset opened for reading: its manifest compared with its files, and its splits."""

from pathlib import Path
from typing import Any

import numpy as np

from dmvae.data.error import DatasetError
from dmvae.data.manifest import Manifest, ShardInfo, load_manifest
from dmvae.data.schema import Columns, read_columns
from dmvae.data.shard import open_reader
from dmvae.data.split import Split as Split

Array = np.ndarray[Any, np.dtype[Any]]


class Dataset:
    """A folder of shards and its manifest; made by `open_dataset`."""

    def __init__(self, path: Path, manifest: Manifest, verify_on_use: bool) -> None:
        self.path = path
        self.manifest = manifest
        self._verify_on_use = verify_on_use

    def split(self, name: str) -> Split:
        """Open a split for use.

        Raises:
            DatasetError: if there is no such split, or it has no rows.
        """
        info = self.manifest.splits.get(name)
        known = ", ".join(f"{split} ({other.rows} rows)" for split, other in self.manifest.splits.items())
        if info is None:
            raise DatasetError(f"{self.path}: no split {name!r}. The dataset has {known}: choose one of them.")
        if not info.rows:
            raise DatasetError(f"{self.path}: the split {name!r} has no rows. The dataset has {known}: choose another.")
        return Split(self.path, self.manifest, name, self._verify_on_use)

    def verify(self) -> tuple[str, ...]:
        """Check everything anew, remembering nothing: what `Split.verify` does, ids, and rows with nothing observed.

        Returns:
            Remarks on what is no error but should be known: ids that several splits have in common.

        Raises:
            DatasetError: if a check fails.
        """
        ids: dict[str, Array] = {}
        for name, info in self.manifest.splits.items():
            if info.rows:
                split = self.split(name)
                split.verify(full=True)
                ids[name] = split.ids()
        names = list(ids)
        pairs = [(first, other) for place, first in enumerate(names) for other in names[place + 1 :]]
        shared = {pair: len(np.intersect1d(ids[pair[0]], ids[pair[1]])) for pair in pairs}
        return tuple(f"{count} ids are in both {a} and {b}" for (a, b), count in shared.items() if count)


def open_dataset(path: str | Path, *, verify_on_use: bool = True) -> Dataset:
    """Open the dataset in folder `path` and compare its files with the manifest: columns, record batches, sizes.

    Args:
        path: the folder.
        verify_on_use: also check a shard's SHA-256 and values before its first row is read, unless the unchanged file
            was checked before by this user.

    Raises:
        DatasetError: if it is no dataset, or a shard is absent, cut short, foreign or outside the folder.
    """
    folder = Path(path)
    manifest = load_manifest(folder)
    modalities = {name: info.column for name, info in manifest.modalities.items()}
    columns = Columns(manifest.id_type, manifest.has_label, modalities, manifest.size_factor)
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_shard(folder, shard, columns)
    return Dataset(folder, manifest, verify_on_use)


def _check_shard(folder: Path, info: ShardInfo, columns: Columns) -> None:
    path = folder / info.path
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"{path}: a shard lies in the dataset's folder; this one leads out of it. Copy it there.")
    if not path.is_file():
        raise DatasetError(f"{path}: the manifest lists this shard; it does not exist. Copy it, or prepare again.")
    size = path.stat().st_size
    if size != info.bytes:
        raise DatasetError(
            f"{path}: the manifest says {info.bytes} bytes; got {size}. It was cut short or altered: copy it again, or "
            f"prepare the dataset again."
        )
    reader, _ = open_reader(path)
    found = read_columns(reader.schema, str(path))
    if found != columns:
        raise DatasetError(f"{path}: the manifest says {columns}; got {found}. Copy it again, or prepare again.")
    groups = -(-info.rows // info.record_batch_rows)
    if reader.num_record_batches != groups:
        raise DatasetError(
            f"{path}: the manifest says {groups} record batches; got {reader.num_record_batches}. Copy it again."
        )
