"""An append-only file of JSON lines that a background thread delivers, and a lock file that keeps others out."""

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from socket import gethostname
from typing import IO, Any

from dmvae.config.errors import UserError
from dmvae.data.files import write_atomically
from dmvae.data.records import RecordError, parse_record

Entry = dict[str, Any]

_log = logging.getLogger(__name__)
_LINGER_SECONDS = 0.5
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.5, 15.0


class TrackingError(UserError):
    """A run cannot be recorded as requested."""


class InUseError(TrackingError):
    """Another process records the run."""


class UnreachableError(Exception):
    """MLflow does not answer; the same call may succeed later."""


@contextmanager
def hold_lock(path: Path, wait_seconds: float | int = 0.0) -> Iterator[None]:
    """Hold the lock file `path` for a block; the operating system releases it if this process is killed.

    Raises:
        InUseError: if another process still holds it after `wait_seconds`.
        TrackingError: if it is not a regular file.
    """
    deadline = time.monotonic() + wait_seconds
    with open_own(path, "a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    owner = path.read_text().strip() or "another process"
                    raise InUseError(f"{path.parent} is in use by {owner}. Wait until it ends, or stop it.") from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {gethostname()}\n")
        file.flush()
        yield


def check_own(path: Path) -> None:
    """Check that what there is under a name in an outbox is a regular file.

    Raises:
        TrackingError: if it is a link or a folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise TrackingError(f"{path} must be a regular file, but it is a link or a folder. Remove it.")


def open_own(path: Path, mode: str, buffering: int = -1) -> IO[Any]:
    """Open a file of an outbox, which must be a regular file: a link could lead to any file of this user.

    Raises:
        TrackingError: if it is a link, a folder, or no regular file.
    """
    check_own(path)

    def without_links(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, mode, buffering, opener=without_links)


class DeliveryLog:
    """An append-only file of JSON lines, delivered in order and at least once.

    A line that a crash cut short is removed on opening.

    Args:
        path: the file; `NAME.offset` has the delivered bytes, `NAME.rejected.jsonl` the rejected entries.
        schema: of a line; one that does not fit it is rejected, and no other line waits for it.
        deliver: sends consecutive entries and returns those that were rejected; after an `UnreachableError` it is
            called with the same entries again.
        batch_size: the most entries for one call.
    """

    def __init__(self, path: Path, schema: Any, deliver: Callable[[list[Entry]], list[Entry]], batch_size: int) -> None:
        self.path, self._schema, self._deliver, self._batch_size = path, schema, deliver, batch_size
        self._offset_path = path.with_suffix(".offset")
        check_own(self._offset_path)
        self._file = open_own(path, "ab", buffering=0)
        self._size = self._cut_torn_line()
        self._offset = self._read_offset()
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), threading.Event()
        self._deadline = float("inf")
        self._thread = threading.Thread(target=self._run, name=f"outbox-{path.stem}", daemon=True)
        self.num_rejected = 0

    @property
    def delivered(self) -> bool:
        """Whether every line was accepted or rejected."""
        return self._offset >= self._size

    def entries(self) -> Iterator[Entry]:
        """Yield every valid line."""
        with self.path.open("rb") as file:
            for line in file:
                with suppress(RecordError):
                    yield self._parse(line)

    def append(self, entry: Entry) -> None:
        """Append a line; it survives a kill of this process.

        Raises:
            OSError: if the disk is full or cannot be written; no part of the line remains.
        """
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            try:
                is_whole = self._file.write(line) == len(line)
                if not is_whole:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError as error:
                self._file.truncate(self._size)
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            self._size += len(line)
        self._wake.set()

    def start(self) -> None:
        """Start delivering in the background."""
        self._thread.start()

    def drain(self) -> int:
        """Deliver everything now; return the number of lines.

        Raises:
            UnreachableError: if MLflow does not answer.
        """
        count = 0
        while not self.delivered:
            count += self._deliver_some()
        return count

    def close(self, timeout_seconds: float | int) -> bool:
        """Deliver for up to `timeout_seconds`; return whether everything was delivered."""
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        self._file.close()
        return self.delivered

    def _cut_torn_line(self) -> int:
        size = 0
        with self.path.open("rb") as file:
            for line in file:
                size += len(line) if line.endswith(b"\n") else 0
        self._file.truncate(size)
        return size

    def _read_offset(self) -> int:
        """Return the delivered bytes; 0 if the file is damaged, since lines may be sent twice."""
        if not self._offset_path.exists():
            return 0
        try:
            offset = int(self._offset_path.read_text()[:20])
        except (OSError, ValueError):
            offset = -1
        if not 0 <= offset <= self._size or not self._is_line_start(offset):
            _log.warning("%s is damaged; all lines of %s are sent again", self._offset_path, self.path)
            return 0
        return offset

    def _is_line_start(self, offset: int) -> bool:
        with self.path.open("rb") as file:
            file.seek(max(0, offset - 1))
            return offset == 0 or file.read(1) == b"\n"

    def _parse(self, line: bytes) -> Entry:
        found: Entry = parse_record(line, f"A line of {self.path}", self._schema, "It is set aside.").model_dump()
        return found

    def _deliver_some(self) -> int:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            lines = [line for line in islice(file, self._batch_size) if line.endswith(b"\n")]
        entries, rejected = list[Entry](), list[Entry]()
        for line in lines:
            try:
                entries.append(self._parse(line))
            except RecordError as error:
                rejected.append({"line": line.decode(errors="replace").rstrip("\n"), "error": str(error)})
        rejected += self._deliver(entries) if entries else []
        if rejected:
            self._keep_rejected(rejected)
        self._offset += sum(map(len, lines))
        write_atomically(self._offset_path, str(self._offset))
        return len(lines)

    def _keep_rejected(self, rejected: list[Entry]) -> None:
        path = self.path.with_suffix(".rejected.jsonl")
        with open_own(path, "a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in rejected)
        if self.num_rejected == 0:
            _log.warning("Cannot deliver %.500r; what was rejected is kept in %s", rejected[0], path)
        self.num_rejected += len(rejected)

    def _run(self) -> None:
        pause, is_unreachable = _FIRST_RETRY_SECONDS, False
        while time.monotonic() < self._deadline:
            if self.delivered:
                if self._closing.is_set():
                    return
                self._wake.wait()
                self._wake.clear()
                self._closing.wait(_LINGER_SECONDS)
                continue
            try:
                self._deliver_some()
            except (UnreachableError, OSError) as error:  # such as a full disk, which cannot take the offset
                if not is_unreachable:
                    _log.warning(
                        "Cannot reach MLflow (%s); metrics are kept in %s and delivered later", error, self.path
                    )
                is_unreachable = True
                time.sleep(0.2) if self._closing.is_set() else self._closing.wait(pause)
                pause = min(2 * pause, _LAST_RETRY_SECONDS)
            else:
                if is_unreachable:
                    _log.warning("MLflow answers again; delivering %s", self.path)
                pause, is_unreachable = _FIRST_RETRY_SECONDS, False
