"""Write a dataset atomically: shards to a temporary folder, then the manifest, then one rename."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc

from dmvae.config.data import Scaling
from dmvae.data.errors import DatasetError
from dmvae.data.files import flush
from dmvae.data.format.manifest import MANIFEST_NAME, save_manifest
from dmvae.data.format.schema import Columns
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.rows import Rows

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_dataset(
    path: str | Path,
    splits: Mapping[str, Rows],
    *,
    scaling: Mapping[str, Scaling] | None = None,
    likelihood: Mapping[str, str] | None = None,
    classes: Mapping[str, int] | None = None,
    origin: Mapping[str, Any] | None = None,
    shard_bytes: int = 256 << 20,
    record_batch_rows: int | None = None,
    replace: bool = False,
) -> Path:
    """Write rows, in the given order, as the dataset `path`, and return `path`; on an error nothing is written.

    A process that is killed leaves a hidden folder `.NAME.*.part` beside the target, which can be deleted.

    Args:
        path: the folder to create.
        splits: rows by split, all with the same columns.
        scaling: see `build_manifest`, also for `likelihood`, `classes` and `origin`.
        likelihood: the likelihood to suggest, by modality.
        classes: the number of classes, by categorical modality.
        origin: how the dataset was made.
        shard_bytes: the size, about, at which a shard is closed.
        record_batch_rows: None chooses a power of two that makes about 1 MiB.
        replace: overwrite an existing dataset.

    Raises:
        DatasetError: if the target exists, the rows are invalid, the disk is full, or permission is denied.
    """
    target = Path(path)
    with new_dataset(target, replace) as part:
        for name, rows in splits.items():
            with SplitWriter(part / name, rows.columns, shard_bytes, record_batch_rows) as writer:
                writer.write(rows)
        save_manifest(
            build_manifest(part, scaling=scaling, likelihood=likelihood, classes=classes, origin=origin), part
        )
    return target


@contextmanager
def new_dataset(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder, which is renamed to `target` if it is filled without an exception.

    Raises:
        DatasetError: if the target exists, the disk is full, or permission is denied.
    """
    check_target(target, replace)
    target = target.resolve() if target.is_symlink() else target
    with _part_folder(target) as part:
        yield part
        for folder in (*(path for path in part.iterdir() if path.is_dir()), part):
            flush(folder)
        _rename(part, target, replace)


class SplitWriter:
    """Writes the rows of one split, in the order they come, to a new folder of shards.

    It holds less than a record batch of rows in memory. It is a context manager: the last rows are written on exit.
    """

    def __init__(self, folder: Path, columns: Columns, shard_bytes: int, record_batch_rows: int | None = None) -> None:
        self._folder, self._schema = folder, columns.arrow_schema()
        self._group_rows = record_batch_rows or columns.record_batch_rows
        self._groups_per_shard = max(1, round(shard_bytes / (self._group_rows * columns.row_bytes)))
        self._rest: list[Rows] = []
        self._groups = 0
        self._shard = ExitStack()
        self._writer: pa.ipc.RecordBatchFileWriter | None = None

    def __enter__(self) -> "SplitWriter":
        self._folder.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._shard:
            if kind is None and (self._rest or not self._groups):
                self._write_group(Rows.join(self._rest) if self._rest else None)

    def write(self, rows: Rows) -> None:
        """Write rows."""
        held = sum(map(len, self._rest))
        if held + len(rows) < self._group_rows:
            self._rest += [rows] if len(rows) else []
            return
        stop = self._group_rows - held
        self._write_group(Rows.join([*self._rest, rows.take(slice(0, stop))]))
        while stop + self._group_rows <= len(rows):
            self._write_group(rows.take(slice(stop, stop + self._group_rows)))
            stop += self._group_rows
        self._rest = [rows.take(slice(stop, len(rows)))] if stop < len(rows) else []

    def _write_group(self, rows: Rows | None) -> None:
        """Write a record batch, in a new shard if the last one is full; None makes a shard without rows."""
        if self._groups % self._groups_per_shard == 0:
            self._shard.close()
            file = self._shard.enter_context(self._new_file(self._groups // self._groups_per_shard))
            self._writer = self._shard.enter_context(pa.ipc.new_file(file, self._schema))
        assert self._writer is not None
        if rows is not None:
            self._writer.write_batch(rows.record_batch(self._schema))
        self._groups += 1

    @contextmanager
    def _new_file(self, number: int) -> Iterator[BinaryIO]:
        with (self._folder / f"part-{number:05d}.arrow").open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


def check_target(target: Path, replace: bool) -> None:
    """Check that a dataset may be written to `target`.

    Raises:
        DatasetError: if a dataset exists there and `replace` is false, or something else exists.
    """
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST_NAME).is_file():
        raise DatasetError(f"Cannot write a dataset to {target}: it exists and is not a dataset. Choose another name.")
    if not replace:
        raise DatasetError(
            f"Dataset {target} already exists. Choose another name, or set replace = true to overwrite it."
        )


@contextmanager
def _part_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, and remove it in the end unless it was renamed."""
    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        part.chmod(0o777 & ~_umask())
        yield part
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DatasetError(
                f"Disk full while writing {target}: {error.strerror}. Free some space, or choose another folder; "
                f"nothing was left behind."
            ) from error
        raise DatasetError(f"Cannot write {target}: {error}. Choose another folder.") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _rename(part: Path, target: Path, replace: bool) -> None:
    check_target(target, replace)
    old = None
    if target.is_dir() and any(target.iterdir()):
        # a folder cannot be renamed over one that is not empty
        old = part.with_name(part.name.removesuffix(".part") + ".old")
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        if old is not None and not target.exists():
            old.rename(target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    flush(target.parent)
