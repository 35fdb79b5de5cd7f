"""Write a dataset: shards into a temporary folder beside the target, the manifest last, then one rename."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.ipc

from dmvae.data.error import DatasetError
from dmvae.data.manifest import MANIFEST_NAME, save_manifest
from dmvae.data.rows import Rows
from dmvae.data.survey import survey

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_dataset(
    path: str | Path,
    splits: Mapping[str, Rows],
    *,
    scaling: Mapping[str, Literal["none", "standardise"]] | None = None,
    likelihood: Mapping[str, str] | None = None,
    classes: Mapping[str, int] | None = None,
    origin: Mapping[str, Any] | None = None,
    shard_bytes: int = 256 << 20,
    record_batch_rows: int | None = None,
    replace: bool = False,
) -> Path:
    """Write rows, in the order given, as the dataset `path`; whole or not at all, and return `path`.

    A process that is killed leaves a hidden folder `.NAME.*.part` beside the target, which can be deleted.

    Args:
        path: the folder to make.
        splits: rows by split, all with the same columns.
        scaling: see `survey`, as for `likelihood`, `classes` and `origin`.
        likelihood: hints by modality.
        classes: number of classes by categorical modality.
        origin: how the dataset was made.
        shard_bytes: a shard is closed when it has grown to about this size.
        record_batch_rows: None: a power of two for about 1 MiB.
        replace: take the place of a dataset that is there.

    Raises:
        DatasetError: if something is there already, the rows break a law, or there is no room or permission.
    """
    target = Path(path)
    check_target(target, replace)
    with _part_folder(target) as part:
        for name, rows in splits.items():
            _write_split(part / name, rows, shard_bytes, record_batch_rows or rows.columns.record_batch_rows)
        manifest = survey(part, scaling=scaling, likelihood=likelihood, classes=classes, origin=origin)
        save_manifest(manifest, part)
        for folder in (*(part / name for name in splits), part):
            _sync(folder)
        _put_in_place(part, target, replace)
    return target


def check_target(target: Path, replace: bool) -> None:
    """Refuse a target that is taken.

    Raises:
        DatasetError: if there is a dataset and `replace` is false, or something else.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_NAME).is_file():
        raise DatasetError(
            f"a dataset is written to a new folder; {str(target)!r} exists and is no dataset. Choose another name."
        )
    if not replace:
        raise DatasetError(
            f"a dataset is not overwritten unless told to; {str(target)!r} exists. Choose another name, or set replace."
        )


@contextmanager
def _part_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, and remove it unless it was renamed."""
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        part.chmod(0o777 & ~_umask())
        yield part
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DatasetError(
                f"{target}: a dataset needs room on the disk; got: {error.strerror}. Nothing was left behind: free "
                f"some, or choose another folder."
            ) from error
        raise DatasetError(f"{target}: a dataset can be written; got: {error}. Choose another folder.") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_split(folder: Path, rows: Rows, shard_bytes: int, group_rows: int) -> None:
    folder.mkdir()
    schema = rows.columns.arrow_schema()
    groups_per_shard = max(1, round(shard_bytes / (group_rows * rows.columns.row_bytes)))
    starts = range(0, max(len(rows), 1), groups_per_shard * group_rows)
    for number, start in enumerate(starts):
        stop = min(start + groups_per_shard * group_rows, len(rows))
        with (folder / f"part-{number:05d}.arrow").open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                for first in range(start, stop, group_rows):
                    writer.write_batch(rows.take(slice(first, min(first + group_rows, stop))).record_batch(schema))
            file.flush()
            os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, target: Path, replace: bool) -> None:
    check_target(target, replace)
    old = None
    if target.is_dir() and any(target.iterdir()):
        # a folder cannot be renamed over one that is not empty
        old = part.with_name(part.name.removesuffix(".part") + ".old")
        target.rename(old)
    part.rename(target)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
