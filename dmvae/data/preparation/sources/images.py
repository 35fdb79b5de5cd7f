"""Rows from a table of image file names, and of columns beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.sources import ColumnGroup, ImageColumn, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import Array, Values, match_columns, not_taken, read_modality, shown
from dmvae.data.preparation.sources.image_decoding import ImageDecoder
from dmvae.data.preparation.sources.named_splits import find_splits
from dmvae.data.preparation.sources.row_table import RowTable, ids_to_numpy, parse_ids, read_row_table
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows
from dmvae.data.preparation.tables import Table, is_table


def read(source: ImagesSource, seed: int, scratch: Path) -> Stream:
    """Decode the images that the table names, as uint8 `(rows, channels, height, width)`, and read other columns.

    An image is missing where the cell is empty or the file does not exist. The table stays in memory, images do not.

    Raises:
        DatasetError: if Pillow is not installed, the table is invalid, an image cannot be decoded, or no file of a
            column exists.
    """
    row_table = read_row_table(source.table, source)
    images: dict[str, _Images] = {}
    columns: dict[str, _Columns] = {}
    for name, modality in source.modalities.items():
        if isinstance(modality, ImageColumn):
            images[name] = _Images(name, modality, source, row_table)
        else:
            columns[name] = _Columns(name, modality, row_table)
    taken = {source.id, *row_table.columns.values(), *(image.column for image in images.values())}
    taken |= {column for group in columns.values() for column in group.names}
    notes = [*row_table.notes, *not_taken([name for name in row_table.dialect.columns[1:] if name not in taken])]
    for image in images.values():
        notes += image.notes
    splits = None
    if "splits" not in row_table.columns and images:
        splits = find_splits(next(iter(images.values())).named, source.table)
        notes += [f"splits from the names of files: {', '.join(dict.fromkeys(splits))}"] if splits else []
    remarks: list[str] = []
    return Stream(
        _chunks(images, columns, row_table, None if splits is None else np.array(splits), remarks),
        len(row_table.ids),
        notes=tuple(notes),
        remarks=remarks,
        features={name: group.names for name, group in columns.items()},
        units={name: group.group.units for name, group in columns.items()},
        labels=row_table.labels,
        tables={name: group.table for name, group in columns.items() if group.table is not None},
    )


def _chunks(
    images: "dict[str, _Images]",
    columns: "dict[str, _Columns]",
    row_table: RowTable,
    splits: Array | None,
    remarks: list[str],
) -> Iterator[Chunk]:
    step = chunk_rows(sum(int(np.prod(image.decoder.shape)) for image in images.values()))
    ids = parse_ids(row_table.ids)
    modalities: dict[str, _Images | _Columns] = {**images, **columns}
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        location = row_table.location(start)
        found = {name: modality.read(part, location) for name, modality in modalities.items()}
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        fields = row_table.fields(part) | ({} if splits is None else {"splits": splits[part]})
        yield Chunk(Rows(ids_to_numpy(ids[part]), data, present, **fields), location)
    for image in images.values():
        remarks += image.remarks()
        image.decoder.close()


class _Images:
    """The images of one modality."""

    def __init__(self, name: str, image: ImageColumn, source: ImagesSource, row_table: RowTable) -> None:
        self._name, self.column, self._folder = name, image.column, source.folder
        names = row_table.table.column_names
        if image.column not in names:
            raise DatasetError(
                f"Column {image.column!r} not found in {source.table}, which has {shown(names)}. "
                f"Correct source.modalities.{name}.column."
            )
        self.named = ["" if file is None else str(file) for file in row_table.table.column(image.column).to_pylist()]
        self._files = [self._find(file) for file in self.named]
        known = [file for file in self._files if file is not None]
        if not known:
            raise DatasetError(
                f"No file named in column {image.column!r} of {source.table} exists in {source.folder}. "
                f"Correct source.folder or source.modalities.{name}.column."
            )
        absent = [row for row, file in enumerate(self._files) if file is None and self.named[row]]
        self.decoder = ImageDecoder(name, image)
        self.notes = self.decoder.find_bits(known)
        if absent:
            self.notes.append(
                f"{name}: missing, because {len(absent)} of {len(self.named)} files are not found, the first "
                f"{self.named[absent[0]]!r} in {row_table.location(0).of(absent[0])}"
            )

    def _find(self, named: str) -> Path | None:
        """Return the file with that name, which may be written as on Windows."""
        for name in dict.fromkeys((named, named.replace("\\", "/"))):
            if name and (path := Path(self._folder, name)).is_file():
                return path
        return None

    def read(self, part: slice, location: SourceLocation) -> Values:
        """Return pixels and presence of some rows."""
        return self.decoder.decode(self._files[part], location)

    def remarks(self) -> list[str]:
        """Return lines on all images."""
        return self.decoder.remarks()


class _Columns:
    """A modality made of other columns of the table."""

    def __init__(self, name: str, group: ColumnGroup, row_table: RowTable) -> None:
        self._name, self.group, self._rows = name, group, row_table
        taken = {row_table.id, *row_table.columns.values()}
        others = [column for column in row_table.table.column_names if column not in taken]
        self.names = tuple(match_columns(name, group, others, row_table.path))
        row_table.dialect.check_clear(self.names)
        types = [row_table.table.schema.field(column).type for column in self.names]
        self.table = Table(name, self.names, group, row_table.path) if is_table(group, types) else None

    def read(self, part: slice, location: SourceLocation) -> Values:
        """Return values and presence of some rows."""
        arrays: list[Any] = [self._rows.column(column, part) for column in self.names]
        if self.table is not None:
            return self.table.read(arrays, location)
        return read_modality(self._name, arrays, self.group, location)
