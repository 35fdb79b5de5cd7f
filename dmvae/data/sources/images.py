"""Rows from a table of image files, decoded and resized with Pillow."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import ImageColumn, ImagesSource
from dmvae.data.error import DatasetError
from dmvae.data.rows import Rows
from dmvae.data.sources import table
from dmvae.data.sources.csv import as_integers, column_of, read_table, unique_ids

Array = np.ndarray[Any, np.dtype[Any]]


def read_images(source: ImagesSource) -> Rows:
    """Decode the images that the table names, as uint8 `(rows, channels, height, width)`; an absent file is missing.

    Raises:
        DatasetError: if Pillow is not installed, the table breaks a law, an image does not decode or a column names no
            file that exists; with file and line.
    """
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise DatasetError("the source 'images' needs Pillow. Run pip install 'dmvae[images]'.") from error
    frame = read_table(source.table, source.id)
    keys = unique_ids(frame, source.id, source.table)
    data, present = {}, {}
    for name, image in source.modalities.items():
        column = column_of(frame, image.column)
        if column is None:
            raise DatasetError(f"{source.table}: column {image.column!r} names files; got {frame.column_names}.")
        data[name], present[name] = _read_column(pillow, column.to_pylist(), image, source)
    labels, splits = column_of(frame, source.label), column_of(frame, source.split)
    return Rows(
        ids=as_integers(keys),
        data=data,
        present=present,
        labels=None if labels is None else table.labels(labels, source.table),
        splits=None if splits is None else table.strings("splits", splits, source.table),
    )


def _read_column(pillow: Any, files: list[str | None], image: ImageColumn, source: ImagesSource) -> tuple[Array, Array]:
    height, width = image.size
    values = np.zeros((len(files), image.channels, height, width), np.uint8)
    present = np.zeros(len(files), dtype=bool)
    for row, file in enumerate(files):
        path = Path(source.folder, str(file))
        if not file or not path.is_file():
            continue
        try:
            with pillow.open(path) as opened:
                pixels = np.asarray(opened.convert("L" if image.channels == 1 else "RGB").resize((width, height)))
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise DatasetError(
                f"{source.table}, line {row + 2}: {path} is an image; got: {error}. Replace it, or empty that cell."
            ) from error
        values[row] = pixels.reshape(height, width, image.channels).transpose(2, 0, 1)
        present[row] = True
    if not present.any():
        raise DatasetError(
            f"{source.table}: column {image.column!r} names files in {source.folder}; none exists. Correct it."
        )
    return values, present
