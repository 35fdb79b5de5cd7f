"""Folders with one interface, whether they are on this machine or at a URI."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import LocalFileSystem

from dmvae.data.files import write_atomically
from dmvae.data.storage.location import is_uri
from dmvae.platform.remote_fs import RemoteFolder
from dmvae.training import checkpoint


@dataclass(frozen=True)
class LocalFolder:
    """A folder, or a file, of this machine or of a file system that is mounted here.

    Attributes:
        root: its path.
    """

    root: Path
    replaces = True
    """Whether `put` replaces a folder in one step; else a reader may find it incomplete."""

    @property
    def where(self) -> str:
        """Its path, for messages."""
        return str(self.root)

    @property
    def path(self) -> str:
        """Its path on `filesystem`."""
        return str(self.root)

    @property
    def filesystem(self) -> LocalFileSystem:
        """As pyarrow knows it."""
        return LocalFileSystem()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.root.name

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.root / name)

    def make(self) -> None:
        """Create this folder if it does not exist."""
        self.root.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """Return the names of the files and folders in this folder, sorted; none if it does not exist."""
        return sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []

    def read(self) -> str | None:
        """Return the text of this file, None if it does not exist."""
        return self.root.read_text() if self.root.is_file() else None

    def write(self, text: str) -> None:
        """Write this file; a reader sees the old text or the new."""
        write_atomically(self.root, text)

    def put(self, source: Path) -> None:
        """Copy a folder here, in place of what is here; that stays until the copy is complete.

        Raises:
            OSError: if the disk is full or cannot be written.
        """
        if source == self.root:
            return
        partial, old = self._sibling("partial"), self._sibling("old")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
        except (OSError, shutil.Error) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"Could not write {self.root}: {error}") from error
        shutil.rmtree(old, ignore_errors=True)
        if self.root.exists():
            self.root.rename(old)
        partial.rename(self.root)
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """Yield a path for what `put` stores here: this folder's own, for a writer that makes it appear in one step."""
        yield self.root

    @contextmanager
    def fetch(self) -> Iterator[Path]:
        """Yield the path of this folder."""
        yield self.root

    def remove(self) -> None:
        """Remove this folder."""
        shutil.rmtree(self.root, ignore_errors=True)

    def repair(self) -> None:
        """Remove what a killed process left half written in this folder; undo a half-done `put`."""
        for left in [*self.root.glob(".*.partial"), *self.root.glob(".*.old")]:
            original = self.root / left.name.removeprefix(".").removesuffix(".old")
            if left.suffix == ".old" and not original.exists():
                left.rename(original)
            else:
                shutil.rmtree(left)

    def fault(self) -> str:
        """Return what is wrong with this checkpoint, or nothing."""
        try:
            checkpoint.verify(self.root)
        except checkpoint.CheckpointError as error:
            return str(error)
        return ""

    def _sibling(self, role: str) -> Path:
        return self.root.with_name(f".{self.name}.{role}")


Folder = LocalFolder | RemoteFolder


def open_folder(place: str) -> Folder:
    """Return the folder at a path or a URI.

    Raises:
        ValueError: if no file system handles the URI, or it contains credentials.
    """
    return RemoteFolder.at(place) if is_uri(place) else LocalFolder(Path(place).absolute())
