"""Open a dataset: read its manifest, compare it with the files, and open its splits."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import Manifest
from dmvae.data.reading.split import Split as Split
from dmvae.data.storage.location import DatasetLocation, locate

Array = np.ndarray[Any, np.dtype[Any]]


class Dataset:
    """A dataset opened for reading; made by `open_dataset`.

    Attributes:
        where: the absolute folder or the URI; other processes can open it.
        name: its last part.
    """

    def __init__(self, location: DatasetLocation, manifest: Manifest, verify_on_use: bool) -> None:
        self.where, self.name = location.where, location.name
        self.manifest = manifest
        self._location = location
        self._verify_on_use = verify_on_use

    def split(self, name: str) -> Split:
        """Open a split.

        Raises:
            DatasetError: if the split does not exist, or has no rows.
        """
        info = self.manifest.splits.get(name)
        known = ", ".join(f"{split} ({other.rows} rows)" for split, other in self.manifest.splits.items())
        if info is None:
            raise DatasetError(f"Unknown split {name!r} in {self.where}. Choose one of {known}.")
        if not info.rows:
            raise DatasetError(f"Split {name!r} of {self.where} has no rows. Choose another of {known}.")
        return Split(self._location, self.manifest, name, self._verify_on_use)

    def verify(self) -> tuple[str, ...]:
        """Check every split in full (see `Split.verify`), whether or not it was checked before.

        Returns:
            Remarks on the number of ids that two splits have in common, which is not an error.

        Raises:
            DatasetError: if a check fails.
        """
        ids: dict[str, Array] = {}
        for name, info in self.manifest.splits.items():
            if info.rows:
                split = self.split(name)
                split.verify(full=True)
                ids[name] = split.ids()
        pairs = list(combinations(ids, 2))
        shared = {pair: len(np.intersect1d(ids[pair[0]], ids[pair[1]])) for pair in pairs}
        return tuple(f"{count} ids are in both {a} and {b}" for (a, b), count in shared.items() if count)


def open_dataset(path: str | Path, *, verify_on_use: bool = True) -> Dataset:
    """Open the dataset at `path`, and compare columns, record batches and sizes of its files with the manifest.

    For a dataset in an object store, only the sizes are compared now, and the rest when a shard is downloaded.

    Args:
        path: a folder, or a URI such as `s3://BUCKET/NAME`, `gs://...`, `file://...`.
        verify_on_use: also check a shard's SHA-256 and values before its first row is read, unless this node has
            verified the same content before; then compare each record batch with its recorded sum when it is first
            read.

    Raises:
        DatasetError: if `path` is not a dataset, a shard is absent, truncated, outside the folder or does not match the
            manifest, or the object store does not respond.
    """
    location = locate(path)
    manifest = location.manifest()
    location.check(manifest)
    return Dataset(location, manifest, verify_on_use)
