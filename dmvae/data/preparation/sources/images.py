"""Rows from a table of image file names, and of columns beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.sources import ArrayColumn, ColumnGroup, ImageColumn, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import (
    Array,
    Values,
    convert,
    match_columns,
    not_taken,
    read_modality,
    shown,
)
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
    arrays: dict[str, _Arrays] = {}
    columns: dict[str, _Columns] = {}
    for name, modality in source.modalities.items():
        if isinstance(modality, ImageColumn):
            images[name] = _Images(name, modality, source, row_table)
        elif isinstance(modality, ArrayColumn):
            arrays[name] = _Arrays(name, modality, source, row_table)
        else:
            columns[name] = _Columns(name, modality, row_table)
    named: dict[str, _Files] = {**images, **arrays}
    taken = {row_table.id, *row_table.columns.values(), *(files.column for files in named.values())}
    taken |= {column for group in columns.values() for column in group.names}
    notes = [*row_table.notes, *not_taken([name for name in row_table.dialect.columns if name not in taken])]
    for files in named.values():
        notes += files.notes
    splits = None
    if "splits" not in row_table.columns and named:
        splits = find_splits(next(iter(named.values())).named, source.table)
        notes += [f"splits from the names of files: {', '.join(dict.fromkeys(splits))}"] if splits else []
    remarks: list[str] = []
    return Stream(
        _chunks(images, {**arrays, **columns}, row_table, None if splits is None else np.array(splits), remarks),
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
    others: "dict[str, _Arrays | _Columns]",
    row_table: RowTable,
    splits: Array | None,
    remarks: list[str],
) -> Iterator[Chunk]:
    modalities: dict[str, _Images | _Arrays | _Columns] = {**images, **others}
    step = chunk_rows(sum(modality.row_bytes for modality in modalities.values()))
    ids = parse_ids(row_table.ids)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        location = row_table.location(start)
        found = {name: modality.read(part, location) for name, modality in modalities.items()}
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        fields = row_table.fields(part) | ({} if splits is None else {"splits": splits[part]})
        yield Chunk(Rows(ids_to_numpy(ids[part]), data, present, **fields), location)
    for image in images.values():
        remarks += image.decoder.remarks()
        image.decoder.close()


class _Files:
    """The files that one column of the table names."""

    def __init__(self, name: str, column: str, source: ImagesSource, row_table: RowTable) -> None:
        self.column, self._folder = column, source.folder
        names = row_table.table.column_names
        if column not in names:
            raise DatasetError(
                f"Column {column!r} not found in {source.table}, which has {shown(names)}. "
                f"Correct source.modalities.{name}.column."
            )
        self.named = ["" if file is None else str(file) for file in row_table.table.column(column).to_pylist()]
        self.files = [self._find(file) for file in self.named]
        self.known = [file for file in self.files if file is not None]
        if not self.known:
            raise DatasetError(
                f"No file named in column {column!r} of {source.table} exists in {source.folder}. "
                f"Correct source.folder or source.modalities.{name}.column."
            )
        absent = [row for row, file in enumerate(self.files) if file is None and self.named[row]]
        self.notes = []
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


class _Images(_Files):
    """The images of one modality."""

    def __init__(self, name: str, image: ImageColumn, source: ImagesSource, row_table: RowTable) -> None:
        super().__init__(name, image.column, source, row_table)
        self.decoder = ImageDecoder(name, image)
        self.row_bytes = int(np.prod(self.decoder.shape))
        self.notes = [*self.decoder.find_bits([self.known]), *self.notes]

    def read(self, part: slice, location: SourceLocation) -> Values:
        """Return pixels and presence of some rows."""
        return self.decoder.decode(self.files[part], location)


class _Arrays(_Files):
    """The `.npy` files of one modality."""

    def __init__(self, name: str, array: ArrayColumn, source: ImagesSource, row_table: RowTable) -> None:
        super().__init__(name, array.column, source, row_table)
        self._name, self._array = name, array
        first = self._load(self.known[0])
        self._shape, self._dtype = first.shape or (1,), first.dtype
        self.row_bytes = int(np.prod(self._shape)) * self._dtype.itemsize

    def _load(self, file: Path) -> Array:
        try:
            found = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DatasetError(f"Cannot read array {file}: {error}. Write it with numpy.save.") from error
        if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiub":
            raise DatasetError(f"{file} must hold one array of numbers. Write it with numpy.save.")
        if self._array.dtype is not None:
            found = convert(self._name, found[None], np.dtype(self._array.dtype), SourceLocation(str(file), 0))[0]
            return np.asarray(found)
        is_other = found.dtype.kind in "iub" and found.dtype != np.uint8
        return found.astype(np.int64) if is_other else found.astype(found.dtype.newbyteorder("="))

    def read(self, part: slice, location: SourceLocation) -> Values:
        """Return values and presence of some rows."""
        files = self.files[part]
        values = np.zeros((len(files), *self._shape), self._dtype)
        for row, file in enumerate(files):
            if file is None:
                continue
            found = self._load(file)
            if (found.shape or (1,)) != self._shape or found.dtype != self._dtype:
                raise DatasetError(
                    f"Arrays of modality {self._name!r} must have one shape and type: expected {self._dtype} "
                    f"{self._shape}, got {found.dtype} {found.shape} in {file} ({location.of(row)}). Convert it."
                )
            values[row] = found
        present = np.array([file is not None for file in files])
        if values.dtype.kind == "f":
            present &= ~np.isnan(values).reshape(len(values), -1).all(axis=1)
        return values, present


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
        self.row_bytes = 8 * len(self.names)

    def read(self, part: slice, location: SourceLocation) -> Values:
        """Return values and presence of some rows."""
        arrays: list[Any] = [self._rows.column(column, part) for column in self.names]
        if self.table is not None:
            return self.table.read(arrays, location)
        return read_modality(self._name, arrays, self.group, location)
