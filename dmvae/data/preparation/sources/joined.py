"""Rows from several sources that are joined on their ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.sources import JoinedSource, Source
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.read_source import read_source
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import Array, Values
from dmvae.data.preparation.sources.joins import check_written_alike, join_report
from dmvae.data.preparation.sources.row_table import ids_to_numpy, parse_ids
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

_FIELDS = ("labels", "splits", "groups", "size_factors")


def read(source: JoinedSource, seed: int, scratch: Path) -> Stream:
    """Read the sources one after another; a row lacks the modalities of sources that lack its id.

    The ids and fields of all sources stay in memory. Values are written to files in `scratch` first, and taken from
    there by row.

    Raises:
        DatasetError: if a source is invalid, an id occurs twice in it, two sources have the same modality, or more than
            one of them has labels, splits, groups or size factors.
    """
    parts = []
    for number, settings in enumerate(source.sources):
        folder = scratch / f"source-{number}"
        folder.mkdir()
        parts.append(_Part(f"source {number + 1} ({settings.kind})", settings, seed, folder))
    _check_apart(parts)
    of_parts = {part.name: part.ids for part in parts}
    check_written_alike(of_parts)
    ids = pc.unique(pa.concat_arrays(list(of_parts.values())))
    labels = next((part.stream.labels for part in parts if part.fields.get("labels") is not None), ClassNames())
    return Stream(
        _chunks(parts, ids),
        len(ids),
        notes=(*(note for part in parts for note in part.notes), *join_report(of_parts, ids)),
        features={name: names for part in parts for name, names in part.stream.features.items()},
        units={name: units for part in parts for name, units in part.stream.units.items()},
        labels=labels,
        tables={name: table for part in parts for name, table in part.stream.tables.items()},
        texts={name: text for part in parts for name, text in part.stream.texts.items()},
        pads={name: pad for part in parts for name, pad in part.stream.pads.items()},
    )


class _Part:
    """One source: its ids and fields in memory, and its values in scratch files, row by row."""

    def __init__(self, name: str, settings: Source, seed: int, folder: Path) -> None:
        self.name, self._folder = name, folder
        self.stream = read_source(settings, seed, folder)
        ids, fields, present = [], [], []
        self._columns: dict[str, tuple[tuple[int, ...], Any]] = {}
        for chunk in self.stream.chunks:
            rows = chunk.rows
            ids.append(pa.array(rows.ids.tolist() if rows.ids.dtype.kind == "U" else rows.ids).cast(pa.string()))
            fields.append({field: getattr(rows, field) for field in _FIELDS})
            present.append(rows.present)
            for modality, values in rows.data.items():
                column = values.shape[1:], values.dtype
                if self._columns.setdefault(modality, column) != column:
                    raise DatasetError(
                        f"Modality {modality!r} must keep its shape and type, but has {column} at "
                        f"{chunk.location.of(0)} and {self._columns[modality]} before. Correct the source."
                    )
                with self._path(modality).open("ab") as file:
                    np.ascontiguousarray(values).tofile(file)
        if not ids:
            raise DatasetError(f"{name} has no rows. Correct the source.")
        self.ids = pa.concat_arrays(ids)
        self.present = {m: np.concatenate([some[m] for some in present]) for m in self._columns}
        self.fields = {
            f: None if fields[0][f] is None else np.concatenate([some[f] for some in fields]) for f in _FIELDS
        }
        self.notes = [*self.stream.notes, *self.stream.remarks]
        counts = pc.value_counts(self.ids)
        twice = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise DatasetError(f"Duplicate id {twice[0].as_py()!r} in {name}. Make ids unique in every source.")

    def _path(self, modality: str) -> Path:
        return self._folder / f"{modality}.joined"

    @property
    def row_bytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self._columns.values())

    def take(self, rows: Array) -> dict[str, Values]:
        """Return values and presence of some rows by modality; -1 stands for an absent row."""
        found = {}
        for modality, (shape, dtype) in self._columns.items():
            mapped = np.memmap(self._path(modality), dtype, "r", shape=(len(self.ids), *shape))
            found[modality] = np.array(mapped[rows]), self.present[modality][rows] & (rows >= 0)
        return found

    def field(self, name: str, rows: Array, location: SourceLocation) -> Array:
        """Return a field of some rows; a row that this source lacks has no label and no size factor."""
        values = self.fields[name]
        assert values is not None
        absent = rows < 0
        if name in ("splits", "groups") and absent.any():
            raise DatasetError(
                f"Missing {name.removesuffix('s')} in {location.of(int(absent.argmax()))}: {self.name}, which has the "
                f"{name}, lacks that id. Add it there."
            )
        empty = {"labels": -1, "size_factors": np.nan}.get(name)
        return values[rows] if empty is None else np.where(absent, np.array(empty, values.dtype), values[rows])

    def remove(self) -> None:
        """Remove the scratch files."""
        for modality in self._columns:
            self._path(modality).unlink()
        self._folder.rmdir()


def _check_apart(parts: list[_Part]) -> None:
    for number, part in enumerate(parts):
        for other in parts[:number]:
            if both := sorted(part.present.keys() & other.present.keys()):
                raise DatasetError(
                    f"Modality {both[0]!r} is in {other.name} and in {part.name}. Rename it in one of them, or "
                    f"leave it out."
                )
            for field in _FIELDS:
                if part.fields[field] is not None and other.fields[field] is not None:
                    raise DatasetError(
                        f"Both {other.name} and {part.name} have {field}. Set the column of one of them to a name that "
                        f"is not there, or remove it."
                    )


def _chunks(parts: list[_Part], ids: pa.Array) -> Iterator[Chunk]:
    rows_of = [pc.fill_null(pc.index_in(ids, value_set=part.ids), -1).to_numpy() for part in parts]
    names, step = parse_ids(ids), chunk_rows(sum(part.row_bytes for part in parts))
    for start in range(0, len(ids), step):
        part_of = slice(start, start + step)
        location = SourceLocation("the joined sources", start)
        keys = ids_to_numpy(names[part_of])
        found: dict[str, Values] = {}
        fields: dict[str, Array] = {}
        for part, rows in zip(parts, rows_of, strict=True):
            found |= part.take(rows[part_of])
            for field, values in part.fields.items():
                if values is not None:
                    fields[field] = part.field(field, rows[part_of], location)
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        yield Chunk(Rows(keys, data, present, **fields), location)
    for part in parts:
        part.remove()
