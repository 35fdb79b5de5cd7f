"""A cache of remote shards on this node's disk: one copy for all processes, named by its SHA-256, of limited size.

A process that downloads a shard writes `SHA256.part` under an exclusive lock, and renames it to `SHA256.arrow` in the
end. A reader holds a shared lock. When space runs out, the least recently used shards without a lock are removed.
(POSIX keeps the pages of a mapped file that is removed, so a reader would survive that too, but the disk space would
not become free.) Locks end with their process, however it ends.
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
    """Return the folder `DMVAE_CACHE`, by default `dmvae` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmvae"
    return Path(os.environ.get("DMVAE_CACHE") or default)


class CachedShard:
    """A complete shard in the cache, which is not removed as long as this object lives.

    Attributes:
        path: of the file.
        is_fresh: whether it was copied, and its SHA-256 compared, just now.
    """

    def __init__(self, path: Path, descriptor: int, is_fresh: bool) -> None:
        self.path, self.is_fresh = path, is_fresh
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


class ShardCache:
    """Downloads shards into `folder`, and keeps at most `limit` bytes of them.

    Args:
        folder: shared by all processes of a node, but not between nodes.
        limit: None takes `DMVAE_CACHE_GB` gigabytes (10^9 bytes), by default half of the disk space that is free or
            used by the cache.

    Raises:
        DatasetError: if the limit is not a number, or the folder cannot be created.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.limit = self._default_limit() if limit is None else limit
        except OSError as error:
            raise DatasetError(
                f"Cannot create the shard cache {folder}: {error}. Set the environment variable DMVAE_CACHE to a "
                f"writable folder."
            ) from error

    def get(self, info: ShardInfo, where: str, copy: Callable[[BinaryIO], None]) -> CachedShard:
        """Return a shard, copied by `copy` unless it is cached; wait while another process or thread copies it.

        Raises:
            DatasetError: if the shard does not fit in the cache, or the copy does not match the manifest.
        """
        whole, part = (self.folder / f"{info.sha256}.{end}" for end in ("arrow", "part"))
        is_fresh = False
        while True:
            if (descriptor := _lock_shared(whole)) is not None:
                # only the access time, which tells what to evict
                os.utime(whole, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
                return CachedShard(whole, descriptor, is_fresh)
            with _exclusive(part) as file:
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
                    is_fresh = True
                except BaseException as error:
                    part.unlink(missing_ok=True)
                    if isinstance(error, OSError) and error.errno in _NO_ROOM:
                        raise DatasetError(
                            f"Disk full while caching {where} ({info.bytes:,} bytes) in {self.folder}: "
                            f"{error.strerror}. Free some space, set DMVAE_CACHE to another folder, or lower "
                            f"DMVAE_CACHE_GB."
                        ) from error
                    raise

    def _default_limit(self) -> int:
        given = os.environ.get("DMVAE_CACHE_GB")
        if given is None:
            return (shutil.disk_usage(self.folder).free + sum(size for _, _, size in self._files())) // 2
        try:
            return int(float(given) * 1e9)
        except (ValueError, OverflowError) as error:
            raise DatasetError(
                f"DMVAE_CACHE_GB must be a number of gigabytes, but got {given!r}. Set it to, for example, 200."
            ) from error

    def _files(self) -> list[tuple[int, Path, int]]:
        """Return last use, path and size of every shard, complete or not, the least recently used first."""
        found = []
        for path in (*self.folder.glob("*.arrow"), *self.folder.glob("*.part")):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_atime_ns, path, status.st_size))
        return sorted(found)

    def _make_room(self, part: BinaryIO, info: ShardInfo, where: str) -> None:
        """Evict shards until this one fits, and reserve its space, under a lock of all processes."""
        with (self.folder / "room.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            part.truncate(0)
            files = self._files()
            held = sum(size for _, _, size in files)
            for _, path, size in files:
                if held + info.bytes <= self.limit or info.bytes > self.limit:
                    break
                held -= size if size and _evict(path) else 0
            if held + info.bytes > self.limit:
                raise DatasetError(
                    f"Shard cache is full: {where} needs {info.bytes:,} bytes, but {held:,} of {self.limit:,} bytes in "
                    f"{self.folder} are in use. Raise DMVAE_CACHE_GB, ideally to the size of the dataset."
                )
            part.truncate(info.bytes)


@contextmanager
def _exclusive(path: Path) -> Iterator[BinaryIO | None]:
    """Yield the file, new or existing, under an exclusive lock; None if it was removed before the lock was free."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        # not a blocking lock: once renamed, the file is held by its readers, who may wait for a shard of ours
        while _is_there(path, file.fileno()):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
        yield file if _is_there(path, file.fileno()) else None


def _lock_shared(path: Path) -> int | None:
    """Return a descriptor whose shared lock keeps the file from eviction; None if the file does not exist."""
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
    """Remove a file unless it is locked; return whether it is gone."""
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
            f"Checksum mismatch in {where}: expected {info.bytes:,} bytes with SHA-256 {info.sha256[:12]}..., got "
            f"{found[0]:,} bytes with {found[1][:12]}.... The shard was damaged or altered: upload it again."
        )
