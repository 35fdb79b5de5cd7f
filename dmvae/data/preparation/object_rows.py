"""Rows in memory, as a source: apart from what reads them from Python objects, because that needs torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.source_location import SourceLocation
from dmvae.data.preparation.stream import Chunk, Stream, chunk_rows
from dmvae.data.preparation.tables import Table


@dataclass(frozen=True, eq=False)
class ObjectRows:
    """Rows in memory, with what their objects say of them.

    Attributes:
        rows: the rows.
        features: the names of the features of each modality that has some.
        tables: the modalities whose columns differ in kind.
        labels: the classes of labels that are no integers.
    """

    rows: Rows
    features: dict[str, tuple[str, ...]]
    tables: dict[str, Table]
    labels: ClassNames = field(default_factory=ClassNames)

    @property
    def stream(self) -> Stream:
        """The rows as a source."""
        step = chunk_rows(self.rows.columns.row_bytes)

        def chunks() -> Iterator[Chunk]:
            for start in range(0, len(self.rows), step):
                yield Chunk(self.rows.take(slice(start, start + step)), SourceLocation("data", start))

        return Stream(chunks(), len(self.rows), features=self.features, tables=self.tables, labels=self.labels)
