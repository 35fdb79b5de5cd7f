"""The location of a dataset: a folder, or an object store from which shards are copied when rows are read."""

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

RETRY_SECONDS = 120.0
"""How long a request to an object store is retried."""
_OPEN_RETRY_SECONDS = 20.0
_BLOCK_BYTES = 8 << 20
_PERMANENT_ERRORS = (
    "ACCESS_DENIED",
    "NO_SUCH_BUCKET",
    "INVALID_ACCESS_KEY_ID",
    "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_SIGNATURE",
)

Answer = TypeVar("Answer")


def is_uri(path: str | Path) -> bool:
    """Return whether `path` is a URI rather than a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(path)) is not None


def absolute(path: str) -> str:
    """Return an absolute path, which other processes can open; return a URI unchanged."""
    return path if is_uri(path) else str(Path(path).absolute())


def file_system(uri: str) -> tuple[pa.fs.FileSystem, str]:
    """Return the file system of a URI, with credentials from the environment, and the path in it.

    Raises:
        DatasetError: if the URI holds credentials, or its scheme is unknown.
    """
    if "@" in uri.partition("://")[2].partition("/")[0] or has_password(uri):
        raise DatasetError(
            "Dataset URI must not hold credentials, because it is recorded with the run. Remove them, and set them in "
            "the environment (AWS_ACCESS_KEY_ID, an instance role, ...)."
        )
    try:
        # this asks the store for the region of the bucket
        system, path = _retry(lambda: pa.fs.FileSystem.from_uri(uri), uri, _OPEN_RETRY_SECONDS)
    except (pa.ArrowException, ValueError) as error:
        raise DatasetError(
            f"Cannot open {uri}: {error}. Set dataset to a folder, or to a URI that pyarrow.fs supports, such as "
            f"s3://BUCKET/NAME."
        ) from error
    return system, path.rstrip("/")


class LocalDataset:
    """A dataset in a local or mounted folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where, self.name = str(folder.absolute()), folder.name

    def manifest(self) -> Manifest:
        """Read the manifest."""
        return load_manifest(self.folder)

    def check(self, manifest: Manifest) -> None:
        """Compare every shard's size, columns and record batches with the manifest.

        Raises:
            DatasetError: if a shard is absent, truncated, outside the folder, or does not match the manifest.
        """
        for split in manifest.splits.values():
            for shard in split.shards:
                self._check_shard(shard, manifest.columns)

    def fetch(self, info: ShardInfo) -> ShardFile:
        """Return the file of a shard."""
        path = self.folder / info.path
        return ShardFile(path, str(path))

    def holds(self, num_bytes: int) -> bool:
        """Return whether `num_bytes` of shards fit on this node; local shards always do."""
        return True

    def _check_shard(self, info: ShardInfo, columns: Columns) -> None:
        path = self.folder / info.path
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise DatasetError(f"Shard {path} is a link out of the dataset's folder. Copy the file into the folder.")
        if not path.is_file():
            raise DatasetError(
                f"Shard not found: {path} is in the manifest, but does not exist. Copy it, or prepare the dataset "
                f"again."
            )
        size = path.stat().st_size
        if size != info.bytes:
            raise DatasetError(
                f"Size mismatch in {path}: expected {info.bytes} bytes, got {size}. The shard was truncated or "
                f"altered: copy it again, or prepare the dataset again."
            )
        reader, _ = open_reader(path)
        found = read_columns(reader.schema, str(path))
        if found != columns:
            raise DatasetError(
                f"Columns of {path} do not match the manifest: expected {columns}, got {found}. Copy the shard again, "
                f"or prepare the dataset again."
            )
        groups = -(-info.rows // info.record_batch_rows)
        if reader.num_record_batches != groups:
            raise DatasetError(
                f"Record batches of {path} do not match the manifest: expected {groups}, got "
                f"{reader.num_record_batches}. Copy the shard again, or prepare the dataset again."
            )


class RemoteDataset:
    """A dataset in an object store; shards are cached on this node."""

    def __init__(self, uri: str, system: pa.fs.FileSystem, path: str) -> None:
        self.where, self.name = uri.rstrip("/"), PurePosixPath(path).name
        self._system, self._path = system, path
        self._cache = ShardCache(cache_folder() / "shards")

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            DatasetError: if it is absent or is not a manifest, or the store does not respond.
        """
        where = self._uri_of(MANIFEST_NAME)
        return parse_manifest(_retry(self._read_manifest, where, _OPEN_RETRY_SECONDS), where)

    def check(self, manifest: Manifest) -> None:
        """Compare every object's size with the manifest; columns are compared once a shard is cached.

        Raises:
            DatasetError: if a shard is absent or truncated, or the store does not respond.
        """
        selector = pa.fs.FileSelector(self._path, recursive=True)
        listed = _retry(lambda: self._system.get_file_info(selector), self.where, _OPEN_RETRY_SECONDS)
        sizes = {entry.path: entry.size for entry in listed if entry.is_file}
        for shard in (shard for split in manifest.splits.values() for shard in split.shards):
            size = sizes.get(f"{self._path}/{shard.path}")
            if size != shard.bytes:
                where = self._uri_of(shard.path)
                what = (
                    f"Shard not found: {where} is in the manifest, but does not exist"
                    if size is None
                    else f"Size mismatch in {where}: expected {shard.bytes} bytes, got {size}"
                )
                raise DatasetError(f"{what}. Upload the dataset again, the manifest last.")

    def fetch(self, info: ShardInfo) -> ShardFile:
        """Return the file of a shard, downloaded to the cache if necessary; it stays there as long as it is held.

        Raises:
            DatasetError: if the store does not respond, the cache is full, or the object does not match the manifest.
        """
        where = self._uri_of(info.path)
        cached = self._cache.get(info, where, lambda file: self._copy(info, where, file))
        return ShardFile(cached.path, where, is_verified=cached.is_fresh, hold=cached)

    def holds(self, num_bytes: int) -> bool:
        """Return whether `num_bytes` of shards fit in the cache."""
        return num_bytes <= self._cache.limit

    def _uri_of(self, path: str) -> str:
        base, mark, query = self.where.partition("?")
        return f"{base}/{path}{mark}{query}"

    def _read_manifest(self) -> bytes:
        with self._system.open_input_file(f"{self._path}/{MANIFEST_NAME}") as file:
            return bytes(file.read())

    def _copy(self, info: ShardInfo, where: str, file: BinaryIO) -> None:
        """Copy an object block by block, so that a lost connection costs one block."""
        source = _retry(lambda: self._system.open_input_file(f"{self._path}/{info.path}"), where)
        with source:
            for start in range(0, info.bytes, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, info.bytes - start)
                file.write(_retry(partial(source.read_at, length, start), where))


DatasetLocation = LocalDataset | RemoteDataset
"""Reads the manifest, compares it with the files, and fetches shards; `where` is a folder or URI for any process."""


def locate(path: str | Path) -> DatasetLocation:
    """Return the location of a folder or a URI (`s3://`, `gs://`, `file://` and others that `pyarrow.fs` supports).

    Raises:
        DatasetError: if the scheme of the URI is unknown, or it holds credentials.
    """
    if not is_uri(path):
        return LocalDataset(Path(path))
    system, inner = file_system(str(path))
    return (
        LocalDataset(Path(inner))
        if isinstance(system, pa.fs.LocalFileSystem)
        else RemoteDataset(str(path), system, inner)
    )


def _retry(request: Callable[[], Answer], where: str, seconds: float | None = None) -> Answer:
    """Repeat a request until it succeeds, with growing pauses, for `seconds` (default `RETRY_SECONDS`)."""
    begun, pause = time.monotonic(), 0.25
    while True:
        try:
            return request()
        except FileNotFoundError as error:
            raise DatasetError(
                f"Not found: {where}. Correct the URI, or prepare the dataset with jobs.prepare."
            ) from error
        except OSError as error:
            waited = time.monotonic() - begun
            is_permanent = any(reason in str(error) for reason in _PERMANENT_ERRORS)
            if is_permanent or waited + pause > (RETRY_SECONDS if seconds is None else seconds):
                raise DatasetError(
                    f"Cannot reach {where} after {waited:.0f} seconds: {error}. Check the URI, the credentials in the "
                    f"environment and, for a store other than Amazon S3, AWS_ENDPOINT_URL."
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def upload(folder: Path, uri: str, replace: bool = False) -> None:
    """Copy the dataset in `folder` to an object store, the manifest last.

    With `replace`, the existing manifest is deleted first, so that no reader opens a mixture of both.

    Raises:
        DatasetError: if a dataset exists there and `replace` is false, or the upload fails.
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
        raise DatasetError(f"Cannot upload to {uri}: {error}. Check the bucket and your permissions.") from error


def check_free(uri: str, replace: bool) -> None:
    """Check that a dataset may be written to a URI.

    Raises:
        DatasetError: if a dataset exists there and `replace` is false, or the store does not respond.
    """
    system, path = file_system(uri)
    found = _retry(lambda: system.get_file_info(f"{path}/{MANIFEST_NAME}"), uri, _OPEN_RETRY_SECONDS)
    if found.is_file and not replace:
        raise DatasetError(f"Dataset {uri} already exists. Choose another name, or set replace = true to overwrite it.")
