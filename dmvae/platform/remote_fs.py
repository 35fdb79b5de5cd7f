"""Folders at URIs, as in an object store: `s3://`, `gs://`, `abfs://` through pyarrow, others through fsspec.

Keys and endpoints come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, a machine's own role), on every
node, and never from a configuration, which is recorded.
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
    """A place at a URI cannot be read or written."""


@dataclass(frozen=True)
class Remote:
    """A folder on a file system that has no renaming: nothing there is changed, files are put and removed.

    Attributes:
        uri: its name for a person.
        filesystem: pyarrow's.
        path: on it.
    """

    uri: str
    filesystem: Any
    path: str

    @classmethod
    def at(cls, uri: str) -> "Remote":
        """Return the place that a URI names.

        Raises:
            ValueError: if no file system goes by that name, or it carries keys.
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
            raise ValueError(
                f"a URI is of a file system that pyarrow or fsspec knows; {uri!r} is not: {unknown}; {error}."
            ) from None
        return cls(uri, PyFileSystem(FSSpecHandler(filesystem)), path)

    def __truediv__(self, name: str) -> "Remote":
        base, mark, options = self.uri.partition("?")  # such as a region
        return Remote(f"{base.rstrip('/')}/{name}{mark}{options}", self.filesystem, f"{self.path.rstrip('/')}/{name}")

    def make(self) -> None:
        """Make this folder, if it is not there."""
        with self._explained("made"):
            self.filesystem.create_dir(self.path)

    def names(self) -> list[str]:
        """Return what is in the folder, sorted; nothing if there is no such folder."""
        with self._explained("listed"):
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(Path(info.path).name for info in found)

    def read(self) -> bytes | None:
        """Return the content of this file, None if there is no such file."""
        with self._explained("read"):
            if self.filesystem.get_file_info(self.path).type != FileType.File:
                return None
            with self.filesystem.open_input_stream(self.path) as stream:
                return bytes(stream.read())

    def write(self, content: bytes) -> None:
        """Write this file; a reader sees the old content or the new."""
        with self._explained("written"), self.filesystem.open_output_stream(self.path) as stream:
            stream.write(content)

    def upload(self, folder: Path) -> None:
        """Put a checkpoint's folder here; it is whole once its checksums are there, which come last."""
        last = folder / checkpoint.CHECKSUMS
        files = sorted(file for file in folder.iterdir() if file != last)
        self.make()
        with self._explained("written"):
            for file in [*files, last]:
                # pyarrow's parallel uploads may hang on S3: apache/arrow issue 32372
                copy_files(
                    str(file), f"{self.path}/{file.name}", destination_filesystem=self.filesystem, use_threads=False
                )

    def download(self, folder: Path) -> None:
        """Bring what is here into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._explained("read"):
            copy_files(self.path, str(folder), source_filesystem=self.filesystem)

    def remove(self) -> None:
        """Remove this folder, its checksums first."""
        with self._explained("removed"):
            if checkpoint.CHECKSUMS in self.names():
                self.filesystem.delete_file(f"{self.path}/{checkpoint.CHECKSUMS}")
            if self.filesystem.get_file_info(self.path).type != FileType.NotFound:
                self.filesystem.delete_dir(self.path)

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
                f"{self.uri} could not be {done}: {error}. Check that it exists, and the keys and the endpoint in the "
                f"environment{keys} of this node."
            ) from error


@contextmanager
def local(model: str | Path) -> Iterator[Path]:
    """Yield a folder with the files of a model, which may be at a URI; a copy of those goes away after the block.

    Raises:
        ValueError: if it is at a URI and not whole.
        StorageError: if it cannot be read.
    """
    if not is_uri(model):
        yield Path(model)
        return
    with TemporaryDirectory(prefix="dmvae-") as scratch:
        place = Remote.at(str(model))
        folder = Path(scratch, PurePosixPath(place.path).name)
        if not place.names():
            raise StorageError(f"a model is read where there is one; there is nothing at {model}.")
        place.download(folder)
        if (folder / checkpoint.RUN_CONFIG).is_file():
            checkpoint.verify(folder)
        yield folder


def home_of(place: Remote) -> Path:
    """Return the folder of this machine for what belongs to a place: its record's spool, its best and last model."""
    scheme, _, rest = place.uri.partition("://")
    return cache_folder() / "runs" / scheme / rest.partition("?")[0].strip("/")
