"""Folders at URIs, such as in an object store: `s3://`, `gs://` and `abfs://` through pyarrow, others through fsspec.

Keys and endpoints come from each node's environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, a machine's own role),
never from a configuration, because configurations are recorded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem, S3FileSystem, copy_files

from dmvae.config.section import has_password
from dmvae.data.storage.location import is_uri
from dmvae.data.storage.shard_cache import cache_folder
from dmvae.training import checkpoint


class StorageError(OSError):
    """A folder at a URI cannot be read or written."""


@dataclass(frozen=True)
class RemoteFolder:
    """A folder, or a file, on a file system that cannot rename: files are written and removed, never changed.

    A checkpoint is complete once its checksums are there, which are written last and removed first.

    Attributes:
        where: its URI.
        filesystem: pyarrow's.
        path: on that file system.
    """

    where: str
    filesystem: Any
    path: str
    replaces = False
    """Whether `put` replaces a folder in one step; else a reader may find it incomplete."""

    @classmethod
    def at(cls, uri: str) -> "RemoteFolder":
        """Return the folder that a URI names.

        Raises:
            ValueError: if no file system handles the URI, or it contains credentials.
        """
        if has_password(uri):
            raise ValueError(
                "The URI contains credentials, and URIs are recorded. Remove them, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment."
            )
        try:
            return cls(uri, *FileSystem.from_uri(uri))
        except pa.ArrowInvalid as error:
            unknown = error
        try:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise ValueError(f"Neither pyarrow nor fsspec can open {uri!r}: {unknown}; {error}.") from None
        return cls(uri, PyFileSystem(FSSpecHandler(filesystem)), path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    def __truediv__(self, name: str) -> "RemoteFolder":
        base, mark, options = self.where.partition("?")  # such as a region
        where = f"{base.rstrip('/')}/{name}{mark}{options}"
        return RemoteFolder(where, self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def make(self) -> None:
        """Create this folder if it does not exist."""
        with self._explained("created"):
            self.filesystem.create_dir(self.path)

    def names(self) -> list[str]:
        """Return the names of the files and folders in this folder, sorted; none if it does not exist."""
        return sorted(PurePosixPath(info.path).name for info in self._entries())

    def read(self) -> str | None:
        """Return the text of this file, None if it does not exist."""
        with self._explained("read"):
            if self.filesystem.get_file_info(self.path).type != FileType.File:
                return None
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read()).decode()

    def write(self, text: str) -> None:
        """Write this file; a reader sees the old text or the new."""
        with self._explained("written"), self.filesystem.open_output_stream(self.path) as stream:
            stream.write(text.encode())

    def put(self, source: Path) -> None:
        """Upload a local folder's files, in place of what is here."""
        self.remove()
        files = sorted(source.iterdir(), key=lambda file: (file.name == checkpoint.CHECKSUMS, file.name))
        self.make()
        with self._explained("written"):
            for file in files:
                # pyarrow's parallel uploads may hang on S3: apache/arrow issue 32372
                copy_files(
                    str(file), f"{self.path}/{file.name}", destination_filesystem=self.filesystem, use_threads=False
                )

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield a path for what `put` stores here: one on this machine, which is removed after the block."""
        with TemporaryDirectory(prefix="dmvae-") as scratch:
            yield Path(scratch, self.name)

    @contextmanager
    def fetch(self) -> Iterator[Path]:
        """Yield a local copy of this folder, which is removed after the block."""
        with TemporaryDirectory(prefix="dmvae-") as scratch:
            folder = Path(scratch, self.name)
            folder.mkdir()
            with self._explained("read"):
                copy_files(self.path, str(folder), source_filesystem=self.filesystem)
            yield folder

    def remove(self) -> None:
        """Remove this folder, its checksums first."""
        with self._explained("removed"):
            if checkpoint.CHECKSUMS in self.names():
                self.filesystem.delete_file(f"{self.path}/{checkpoint.CHECKSUMS}")
            if self.filesystem.get_file_info(self.path).type != FileType.NotFound:
                self.filesystem.delete_dir(self.path)

    def repair(self) -> None:
        """Remove the checkpoints in this folder that a killed process left incomplete."""
        for info in self._entries():
            inner = self / PurePosixPath(info.path).name
            if info.type == FileType.Directory and checkpoint.CHECKSUMS not in inner.names():
                inner.remove()

    def fault(self) -> str:
        """Return nothing: the checksums of a checkpoint at a URI are compared when it is read."""
        return ""

    def _entries(self) -> list[Any]:
        with self._explained("listed"):
            return list(self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True)))

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            hint = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
            keys = f" ({hint})" if isinstance(self.filesystem, S3FileSystem) else ""
            raise StorageError(
                f"{self.where} could not be {done}: {error}. Check that the bucket exists, and check the keys and the "
                f"endpoint in this node's environment{keys}."
            ) from error


@contextmanager
def local(model: str | Path) -> Iterator[Path]:
    """Yield a local folder with a model's files; if the model is at a URI, a copy that is removed after the block.

    Raises:
        ValueError: if the model is at a URI and damaged.
        StorageError: if it cannot be read.
    """
    if not is_uri(model):
        yield Path(model)
        return
    place = RemoteFolder.at(str(model))
    if not place.names():
        raise StorageError(f"Model not found: {model}.")
    with place.fetch() as folder:
        if (folder / checkpoint.RUN_CONFIG).is_file():
            checkpoint.verify(folder)
        yield folder


def cached_run_dir(folder: RemoteFolder) -> Path:
    """Return this machine's folder for a run at a URI: it holds the outbox of its metrics and copies of its models."""
    scheme, _, rest = folder.where.partition("://")
    return cache_folder() / "runs" / scheme / rest.partition("?")[0].strip("/")
