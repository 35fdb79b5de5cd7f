"""Shards of object stores on this node's disk: one copy for all processes, known by its SHA-256, within a bound.

A shard that is being copied is `SHA256.part`, locked by who copies it, and `SHA256.arrow` when it is whole. Who reads
one holds a shared lock on it. The least recently used shards that nobody locks make room for others. (POSIX keeps the
pages of a mapped file that is unlinked, so a reader would survive that too; the disk would not get its room back.)
Locks end with their process, however it ends.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dmvae.data.errors import DatasetError
from dmvae.data.files import sha256_of
from dmvae.data.format.manifest import ShardInfo

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """Return the folder that `DMVAE_CACHE` names, or `dmvae` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmvae"
    return Path(os.environ.get("DMVAE_CACHE") or default)


class StagedShard:
    """A whole shard on this node, which stays as long as this object lives."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


class ShardCache:
    """The shards on this node, in `folder`: at most `bound` bytes of them.

    Args:
        folder: shared by the processes of a node, and by no others.
        bound: None: the gigabytes (10^9 bytes) that `DMVAE_CACHE_GB` names, or half of what the disk has free for it.

    Raises:
        DatasetError: if the bound is no number, or the folder cannot be made.
    """

    def __init__(self, folder: Path, bound: int | None = None) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.bound = self._default_bound() if bound is None else bound
        except OSError as error:
            raise DatasetError(
                f"{folder}: shards of object stores are kept on this node; got: {error}. Set DMVAE_CACHE to a folder "
                f"that can be written."
            ) from error

    def get(self, info: ShardInfo, where: str, copy: Callable[[BinaryIO], None]) -> StagedShard:
        """Return the shard, copied by `copy` unless it is here; wait while another process or thread copies it.

        Raises:
            DatasetError: if there is no room within the bound, or what was copied is not what the manifest says.
        """
        whole, part = (self.folder / f"{info.sha256}.{end}" for end in ("arrow", "part"))
        while True:
            if (descriptor := _share(whole)) is not None:
                # the time of access alone: the time of change says whether a shard was checked
                os.utime(whole, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
                return StagedShard(whole, descriptor)
            with _alone(part) as file:
                if file is None:
                    continue
                if whole.exists():
                    part.unlink()
                    continue
                try:
                    self._make_room(file, info, where)
                    copy(file)
                    file.flush()
                    os.fsync(file.fileno())
                    _check(part, info, where)
                    part.replace(whole)
                except BaseException as error:
                    part.unlink(missing_ok=True)
                    if isinstance(error, OSError) and error.errno in _NO_ROOM:
                        raise DatasetError(
                            f"{where}: a shard needs {info.bytes:,} bytes on the disk of {self.folder}; got: "
                            f"{error.strerror}. Free some, set DMVAE_CACHE to another folder, or lower DMVAE_CACHE_GB."
                        ) from error
                    raise

    def _default_bound(self) -> int:
        given = os.environ.get("DMVAE_CACHE_GB")
        if given is None:
            return (shutil.disk_usage(self.folder).free + sum(size for _, _, size in self._files())) // 2
        try:
            return int(float(given) * 1e9)
        except (ValueError, OverflowError) as error:
            raise DatasetError(f"DMVAE_CACHE_GB is a number of gigabytes; got {given!r}. Write, say, 200.") from error

    def _files(self) -> list[tuple[int, Path, int]]:
        """Return time of last use, path and size of every shard, whole or not."""
        found = []
        for path in (*self.folder.glob("*.arrow"), *self.folder.glob("*.part")):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_atime_ns, path, status.st_size))
        return sorted(found)

    def _make_room(self, part: BinaryIO, info: ShardInfo, where: str) -> None:
        """Evict shards until this one fits, and take its room, at once for all processes."""
        with (self.folder / "room.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part.truncate(0)
            files = self._files()
            held = sum(size for _, _, size in files)
            for _, path, size in files:
                if held + info.bytes <= self.bound or info.bytes > self.bound:
                    break
                held -= size if size and _evict(path) else 0
            if held + info.bytes > self.bound:
                raise DatasetError(
                    f"{where}: shards are kept in {self.folder}, at most {self.bound:,} bytes of them; got {held:,} "
                    f"in use, and {info.bytes:,} more wanted. Raise DMVAE_CACHE_GB, best to the size of the dataset."
                )
            part.truncate(info.bytes)


@contextmanager
def _alone(path: Path) -> Iterator[BinaryIO | None]:
    """Yield the file, new or left over, once nobody else has it locked; None if it is not there any more by then."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file if _is_there(path, file.fileno()) else None


def _share(path: Path) -> int | None:
    """Return a descriptor that keeps the file from being evicted; None if there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if _is_there(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _evict(path: Path) -> bool:
    """Remove a file that nobody has locked; return whether it is gone."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _is_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check(part: Path, info: ShardInfo, where: str) -> None:
    found = part.stat().st_size, sha256_of(part)
    if found != (info.bytes, info.sha256):
        raise DatasetError(
            f"{where}: a shard has the size and SHA-256 of the manifest, {info.bytes:,} bytes and "
            f"{info.sha256[:12]}...; got {found[0]:,} and {found[1][:12]}.... It was damaged or altered: "
            f"upload it again."
        )
