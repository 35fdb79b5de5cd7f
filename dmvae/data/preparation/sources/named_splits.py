"""Read splits from the names of files and folders, such as `train-00000-of-00002.parquet` or `test/cat/7.png`."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from dmvae.data.errors import DatasetError

_NAMES = re.compile(r"(train|training|val|valid|validation|dev|test|testing)(?=$|[-_.\d])")


def find_splits(paths: Sequence[str], where: str) -> list[str] | None:
    """Return the split that the path of each row or file names; None if they name fewer than two.

    Raises:
        DatasetError: if only some paths name one, because the others might then land in any split.
    """
    names = [_split_of(path) for path in paths]
    if len(set(names) - {None}) < 2:
        return None
    if None in names:
        named = next(path for path, name in zip(paths, names, strict=True) if name is not None)
        raise DatasetError(
            f"Only some names in {where} tell a split: {named!r} does, but {paths[names.index(None)]!r} does not. "
            f"Rename the files, or say the split of each row in a column (source.split)."
        )
    return [name for name in names if name is not None]


def _split_of(path: str) -> str | None:
    """Return the split that a folder or else the file is named after."""
    for part in PurePosixPath(path.replace("\\", "/")).parts:
        found = _NAMES.match(part.lower())
        if found is not None:
            return found[1]
    return None
