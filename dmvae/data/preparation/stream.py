"""What a source gives: its rows in chunks of a bounded size, so that a source may be larger than the memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from dmvae.data.preparation.rows import Rows

CHUNK_BYTES = 16 << 20
_MAX_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class SourceLocation:
    """Where rows come from: a file, the number there of the first one, and what is counted there."""

    where: str
    first: int
    unit: str = "row"

    def of(self, index: int) -> str:
        """Return the place of a row, counted from the first one."""
        return f"{self.where}, {self.unit} {self.first + index}"


@dataclass(frozen=True)
class Chunk:
    """Some rows that follow one another in the source, and where they are."""

    rows: Rows
    spot: SourceLocation


@dataclass(frozen=True)
class Stream:
    """All rows of a source, in chunks that have the same columns.

    Attributes:
        chunks: can be gone through once.
        num_rows: how many rows will come; None: not known before they were read.
        notes: what a person is to be told, a line each.
    """

    chunks: Iterator[Chunk]
    num_rows: int | None = None
    notes: tuple[str, ...] = ()


def chunk_rows(row_bytes: int) -> int:
    """Return how many rows of that size make a chunk."""
    return max(1, min(_MAX_CHUNK_ROWS, CHUNK_BYTES // max(row_bytes, 1)))


def in_memory(rows: Rows, where: str) -> Stream:
    """Return rows that are held already as a stream."""
    step = chunk_rows(rows.columns.row_bytes)
    starts = range(0, len(rows), step)
    return Stream(
        (Chunk(rows.take(slice(start, start + step)), SourceLocation(where, start)) for start in starts), len(rows)
    )
