"""Where a dataset lies: in a folder, or in an object store, whose shards are copied to this node when rows are read."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.fs

from dmvae.config.section import has_password
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo, load_manifest, parse_manifest
from dmvae.data.format.schema import Columns, read_columns
from dmvae.data.format.shard import ShardFile, open_reader
from dmvae.data.storage.shard_cache import ShardCache, cache_folder

PATIENCE_SECONDS = 120.0
"""An object store is asked again for so long after it last gave anything."""
_OPENING_SECONDS = 20.0
_BLOCK_BYTES = 8 << 20
_FOR_GOOD = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_SIGNATURE",
)

Found = TypeVar("Found")


def is_uri(path: str | Path) -> bool:
    """Return whether `path` is a URI and not a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)) is not None


def absolute(path: str) -> str:
    """Make a folder hold in processes that start elsewhere; a URI does."""
    return path if is_uri(path) else str(Path(path).absolute())


def file_system(uri: str) -> tuple[pa.fs.FileSystem, str]:
    """Return the file system of a URI, with credentials from the environment, and the path in it."""
    if "@" in uri.partition("://")[2].partition("/")[0] or has_password(uri):
        raise DatasetError(
            "credentials come from the environment (AWS_ACCESS_KEY_ID, an instance's role, ...), as a dataset's URI is "
            "recorded with the run; got a URI that holds some. Leave them out."
        )
    try:
        # which asks for the region of a bucket
        system, path = _patiently(lambda: pa.fs.FileSystem.from_uri(uri), uri, _OPENING_SECONDS)
    except (pa.ArrowException, ValueError) as error:
        raise DatasetError(f"a dataset is a folder or a URI that pyarrow.fs knows; got {uri!r}: {error}") from error
    return system, path.rstrip("/")


class LocalDataset:
    """A dataset in a folder of this machine, or one that is mounted here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where, self.name = str(folder.absolute()), folder.name

    def manifest(self) -> Manifest:
        """Read the manifest."""
        return load_manifest(self.folder)

    def check(self, manifest: Manifest) -> None:
        """Compare every shard's size, columns and record batches with the manifest.

        Raises:
            DatasetError: if a shard is absent, cut short, foreign or outside the folder.
        """
        for split in manifest.splits.values():
            for shard in split.shards:
                self._check_shard(shard, manifest.columns)

    def fetch(self, info: ShardInfo) -> ShardFile:
        """Return a shard."""
        path = self.folder / info.path
        return ShardFile(path, str(path))

    def holds(self, num_bytes: int) -> bool:
        """Return True: the shards are here."""
        return True

    def _check_shard(self, info: ShardInfo, columns: Columns) -> None:
        path = self.folder / info.path
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DatasetError(
                f"{path}: a shard lies in the dataset's folder; this one leads out of it. Copy it there."
            )
        if not path.is_file():
            raise DatasetError(f"{path}: the manifest lists this shard; it does not exist. Copy it, or prepare again.")
        size = path.stat().st_size
        if size != info.bytes:
            raise DatasetError(
                f"{path}: the manifest says {info.bytes} bytes; got {size}. It was cut short or altered: copy it "
                f"again, or prepare the dataset again."
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


class RemoteDataset:
    """A dataset in an object store; shards are staged on this node."""

    def __init__(self, uri: str, system: pa.fs.FileSystem, path: str) -> None:
        self.where, self.name = uri.rstrip("/"), PurePosixPath(path).name
        self._system, self._path = system, path
        self._cache = ShardCache(cache_folder() / "shards")

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            DatasetError: if there is none, it is no manifest, or the store does not answer.
        """
        where = self._inside(MANIFEST_NAME)
        return parse_manifest(_patiently(self._read_manifest, where, _OPENING_SECONDS), where)

    def check(self, manifest: Manifest) -> None:
        """Compare every object's size with the manifest; its columns are compared when it is here.

        Raises:
            DatasetError: if a shard is absent or was cut short, or the store does not answer.
        """
        selector = pa.fs.FileSelector(self._path, recursive=True)
        listed = _patiently(lambda: self._system.get_file_info(selector), self.where, _OPENING_SECONDS)
        sizes = {entry.path: entry.size for entry in listed if entry.is_file}
        for shard in (shard for split in manifest.splits.values() for shard in split.shards):
            size = sizes.get(f"{self._path}/{shard.path}")
            if size != shard.bytes:
                found = "it does not exist" if size is None else f"got {size}"
                raise DatasetError(
                    f"{self._inside(shard.path)}: the manifest says {shard.bytes} bytes; {found}. Upload it again, the "
                    f"manifest last."
                )

    def fetch(self, info: ShardInfo) -> ShardFile:
        """Stage a shard, and hold it here.

        Raises:
            DatasetError: if the store does not answer, the cache has no room, or the object is not the manifest's.
        """
        where = self._inside(info.path)
        staged = self._cache.get(info, where, lambda file: self._copy(info, where, file))
        return ShardFile(staged.path, where, is_summed=True, hold=staged)

    def holds(self, num_bytes: int) -> bool:
        """Return whether the cache may hold so many bytes."""
        return num_bytes <= self._cache.bound

    def _inside(self, path: str) -> str:
        base, mark, query = self.where.partition("?")
        return f"{base}/{path}{mark}{query}"

    def _read_manifest(self) -> bytes:
        with self._system.open_input_file(f"{self._path}/{MANIFEST_NAME}") as file:
            return bytes(file.read())

    def _copy(self, info: ShardInfo, where: str, file: BinaryIO) -> None:
        """Copy an object by blocks: what came before a connection was cut is not copied again."""
        source = _patiently(lambda: self._system.open_input_file(f"{self._path}/{info.path}"), where)
        with source:
            for start in range(0, info.bytes, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, info.bytes - start)
                file.write(_patiently(partial(source.read_at, length, start), where))


Place = LocalDataset | RemoteDataset
"""What reads a manifest, compares it with the files, and fetches shards; `where` is a folder or URI for any process."""


def locate(path: str | Path) -> Place:
    """Return the place that a folder or URI (`s3://`, `gs://`, `file://`, what `pyarrow.fs` knows) names.

    Raises:
        DatasetError: if no file system has such a URI, or it holds credentials.
    """
    if not is_uri(path):
        return LocalDataset(Path(path))
    system, inner = file_system(str(path))
    return (
        LocalDataset(Path(inner))
        if isinstance(system, pa.fs.LocalFileSystem)
        else RemoteDataset(str(path), system, inner)
    )


def _patiently(ask: Callable[[], Found], where: str, seconds: float | None = None) -> Found:
    """Ask until there is an answer, with growing pauses, for `PATIENCE_SECONDS` unless told otherwise."""
    begun, pause = time.monotonic(), 0.25
    while True:
        try:
            return ask()
        except FileNotFoundError as error:
            raise DatasetError(
                f"{where}: no such object. Correct the URI, or make the dataset with jobs.prepare."
            ) from error
        except OSError as error:
            waited = time.monotonic() - begun
            is_final = any(reason in str(error) for reason in _FOR_GOOD)
            if is_final or waited + pause > (PATIENCE_SECONDS if seconds is None else seconds):
                raise DatasetError(
                    f"{where}: an object store answers; got, after {waited:.0f} seconds: {error}. Check the URI, the "
                    f"credentials in the environment and, for a store that is not Amazon's, AWS_ENDPOINT_URL."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def upload(folder: Path, uri: str, replace: bool = False) -> None:
    """Copy the dataset in `folder` to an object store, the manifest last.

    With `replace`, the manifest that is there goes first: nobody opens a mixture of both.

    Raises:
        DatasetError: if a dataset is there and is not to be replaced, or the store does not take it.
    """
    system, path = file_system(uri)
    manifest = load_manifest(folder)
    check_free(uri, replace)
    try:
        if replace and system.get_file_info(f"{path}/{MANIFEST_NAME}").is_file:
            system.delete_file(f"{path}/{MANIFEST_NAME}")
        shards = [shard.path for split in manifest.splits.values() for shard in split.shards]
        for name in (*shards, MANIFEST_NAME):
            pa.fs.copy_files(str(folder / name), f"{path}/{name}", pa.fs.LocalFileSystem(), system)
    except OSError as error:
        raise DatasetError(f"{uri}: an object store takes a dataset; got: {error}. Check bucket and rights.") from error


def check_free(uri: str, replace: bool) -> None:
    """Refuse a URI where a dataset is, unless it is to be replaced.

    Raises:
        DatasetError: if so, or the store does not answer.
    """
    system, path = file_system(uri)
    there = _patiently(lambda: system.get_file_info(f"{path}/{MANIFEST_NAME}"), uri, _OPENING_SECONDS)
    if there.is_file and not replace:
        raise DatasetError(
            f"a dataset is not overwritten unless told to; {uri!r} exists. Choose another name, or set replace."
        )
