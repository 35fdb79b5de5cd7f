"""The log file of a run or study: every line for the user, with its time, and how the command ended."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_FILE = "log.txt"
_MAX_BYTES, _OLDER = 5_000_000, 2


@contextmanager
def log_file(folder: Path, progress: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Yield `progress`, whose lines then also go to `folder/log.txt` with their time; an error ends up there too.

    At 5 MB the file becomes `log.txt.1`; two older ones are kept. A disk that is full costs lines, never the run.
    """
    handler = RotatingFileHandler(folder / LOG_FILE, maxBytes=_MAX_BYTES, backupCount=_OLDER, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]

    def write(line: str, level: int = logging.INFO) -> None:
        handler.handle(logging.LogRecord("dmvae", level, "", 0, line, None, None))

    def log(line: str) -> None:
        progress(line)
        write(line)

    try:
        yield log
    except KeyboardInterrupt as error:
        write(str(error) or "Interrupted.")
        raise
    except Exception as error:
        write(f"{type(error).__name__}: {error}", logging.ERROR)
        raise
    finally:
        handler.close()
