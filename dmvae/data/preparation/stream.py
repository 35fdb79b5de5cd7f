"""The rows of a source in chunks of a bounded size, so that a source may be larger than memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.source_location import SourceLocation as SourceLocation
from dmvae.data.preparation.tables import Table
from dmvae.data.preparation.texts import Text

CHUNK_BYTES = 16 << 20
_MAX_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a source, and their location."""

    rows: Rows
    location: SourceLocation


@dataclass(frozen=True)
class Stream:
    """All rows of a source, in chunks with the same columns.

    Attributes:
        chunks: can be iterated once.
        num_rows: the number of rows to come; None if unknown before they are read.
        notes: lines to show to the user.
        remarks: lines that are known once all chunks are read.
        features: the names of the features of each modality that has some, in their order.
        units: the unit of some features, by modality and name.
        labels: the classes of labels that are no integers; known once all chunks are read.
        tables: the modalities whose columns differ in kind; known once all chunks are read.
        texts: the modalities that are text; known likewise.
        pads: the class that fills up shorter rows of a modality of sequences.
    """

    chunks: Iterator[Chunk]
    num_rows: int | None = None
    notes: tuple[str, ...] = ()
    remarks: list[str] = field(default_factory=list)
    features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    units: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    labels: ClassNames = field(default_factory=ClassNames)
    tables: Mapping[str, Table] = field(default_factory=dict)
    texts: Mapping[str, Text] = field(default_factory=dict)
    pads: Mapping[str, int] = field(default_factory=dict)


def chunk_rows(row_bytes: int) -> int:
    """Return the number of rows of `row_bytes` bytes each that make a chunk."""
    return max(1, min(_MAX_CHUNK_ROWS, CHUNK_BYTES // max(row_bytes, 1)))


def in_memory(rows: Rows, where: str) -> Stream:
    """Return rows that are already in memory as a stream."""
    step = chunk_rows(rows.columns.row_bytes)
    starts = range(0, len(rows), step)
    return Stream(
        (Chunk(rows.take(slice(start, start + step)), SourceLocation(where, start)) for start in starts), len(rows)
    )
