"""Rows from a table of image file names; images are decoded and resized with Pillow."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.sources import ImageColumn, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.arrow_columns import Values, shown
from dmvae.data.preparation.sources.row_table import RowTable, ids_to_numpy, parse_ids, read_row_table
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows


def read(source: ImagesSource, seed: int, scratch: Path) -> Stream:
    """Decode the images that the table names, as uint8 `(rows, channels, height, width)`.

    An image is missing where the cell is empty or the file does not exist. The table stays in memory, images do not.

    Raises:
        DatasetError: if Pillow is not installed, the table is invalid, an image cannot be decoded, or no file of a
            column exists.
    """
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise DatasetError("The source 'images' needs Pillow. Run pip install 'dmvae[images]'.") from error
    row_table = read_row_table(source.table, source)
    names = row_table.table.column_names
    files = {}
    for name, image in source.modalities.items():
        if image.column not in names:
            raise DatasetError(
                f"Column {image.column!r} not found in {source.table}, which has {shown(names)}. "
                f"Correct source.modalities.{name}.column."
            )
        files[name] = row_table.table.column(image.column).to_pylist()
        if not any(file and Path(source.folder, str(file)).is_file() for file in files[name]):
            raise DatasetError(
                f"No file named in column {image.column!r} of {source.table} exists in {source.folder}. "
                f"Correct source.folder or source.modalities.{name}.column."
            )
    return Stream(_chunks(pillow, source, files, row_table), len(row_table.ids), labels=row_table.labels)


def _chunks(pillow: Any, source: ImagesSource, files: dict[str, list[Any]], row_table: RowTable) -> Iterator[Chunk]:
    step = chunk_rows(sum(image.channels * image.size[0] * image.size[1] for image in source.modalities.values()))
    ids = parse_ids(row_table.ids)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        location = row_table.location(start)
        found = {
            name: _decode(pillow, files[name][part], image, source.folder, location)
            for name, image in source.modalities.items()
        }
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        yield Chunk(Rows(ids_to_numpy(ids[part]), data, present, **row_table.fields(part)), location)


def _decode(pillow: Any, files: list[Any], image: ImageColumn, folder: str, location: SourceLocation) -> Values:
    height, width = image.size
    values = np.zeros((len(files), image.channels, height, width), np.uint8)
    present = np.zeros(len(files), dtype=bool)
    for row, file in enumerate(files):
        path = Path(folder, str(file))
        if not file or not path.is_file():
            continue
        try:
            with pillow.open(path) as opened:
                decoded = _to_8_bits(pillow, opened).convert("L" if image.channels == 1 else "RGB")
                pixels = np.asarray(decoded.resize((width, height)))
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise DatasetError(
                f"Cannot decode image {path}: {error} ({location.of(row)}). Replace the file, or empty the cell."
            ) from error
        values[row] = pixels.reshape(height, width, image.channels).transpose(2, 0, 1)
        present[row] = True
    return values, present


def _to_8_bits(pillow: Any, opened: Any) -> Any:
    """Return 16-bit grey values as their upper 8 bits; Pillow would clip them at 255."""
    if opened.mode == "F":
        raise ValueError("expected grey values of 8 or 16 bits, got floats")
    if not opened.mode.startswith("I"):
        return opened
    values = np.asarray(opened)
    if values.min(initial=0) < 0 or values.max(initial=0) >= 1 << 16:
        raise ValueError("expected grey values of at most 16 bits, got larger ones")
    return pillow.fromarray((values >> 8).astype(np.uint8))
