"""A dataset opened for reading: its manifest compared with its files, and its splits."""

from pathlib import Path
from typing import Any

import numpy as np

from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import Manifest
from dmvae.data.reading.split import Split as Split
from dmvae.data.storage.location import Place, locate

Array = np.ndarray[Any, np.dtype[Any]]


class Dataset:
    """Shards and their manifest; made by `open_dataset`.

    Attributes:
        where: the absolute folder or the URI, with which other processes can open it.
        name: the last part of it.
    """

    def __init__(self, place: Place, manifest: Manifest, verify_on_use: bool) -> None:
        self.where, self.name = place.where, place.name
        self.manifest = manifest
        self._place = place
        self._verify_on_use = verify_on_use

    def split(self, name: str) -> Split:
        """Open a split for use.

        Raises:
            DatasetError: if there is no such split, or it has no rows.
        """
        info = self.manifest.splits.get(name)
        known = ", ".join(f"{split} ({other.rows} rows)" for split, other in self.manifest.splits.items())
        if info is None:
            raise DatasetError(f"{self.where}: no split {name!r}. The dataset has {known}: choose one of them.")
        if not info.rows:
            raise DatasetError(
                f"{self.where}: the split {name!r} has no rows. The dataset has {known}: choose another."
            )
        return Split(self._place, self.manifest, name, self._verify_on_use)

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
    """Open the dataset at `path` and compare its files with the manifest: columns, record batches, sizes.

    Of a dataset in an object store, the sizes are compared now and the rest when a shard is staged.

    Args:
        path: a folder, or a URI: `s3://BUCKET/NAME`, `gs://...`, `file://...`.
        verify_on_use: also check a shard's SHA-256 and values before its first row is read, unless the unchanged file
            was checked before by this user.

    Raises:
        DatasetError: if it is no dataset, or a shard is absent, cut short, foreign or outside the folder, or the
            object store does not answer.
    """
    place = locate(path)
    manifest = place.manifest()
    place.check(manifest)
    return Dataset(place, manifest, verify_on_use)
