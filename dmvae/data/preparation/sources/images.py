"""Rows from a table of image files, decoded and resized with Pillow."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import ImageColumn, ImagesSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.csv import About, as_integers, read_about, to_numpy
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]


def read_images(source: ImagesSource) -> Stream:
    """Decode the images that the table names, as uint8 `(rows, channels, height, width)`; an absent file is missing.

    The table is held, the images are not.

    Raises:
        DatasetError: if Pillow is not installed, the table breaks a law, an image does not decode or a column names no
            file that exists; with file and line.
    """
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise DatasetError("the source 'images' needs Pillow. Run pip install 'dmvae[images]'.") from error
    about = read_about(source.table, source)
    files = {}
    for name, image in source.modalities.items():
        if image.column not in about.frame.column_names:
            raise DatasetError(
                f"{source.table}: column {image.column!r} names files; got {about.frame.column_names}. Correct it."
            )
        files[name] = about.frame.column(image.column).to_pylist()
        if not any(file and Path(source.folder, str(file)).is_file() for file in files[name]):
            raise DatasetError(
                f"{source.table}: column {image.column!r} names files in {source.folder}; none exists. Correct it."
            )
    return Stream(_chunks(pillow, source, files, about), len(about.ids))


def _chunks(pillow: Any, source: ImagesSource, files: dict[str, list[Any]], about: About) -> Iterator[Chunk]:
    step = chunk_rows(sum(image.channels * image.size[0] * image.size[1] for image in source.modalities.values()))
    ids = as_integers(about.ids)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        spot = SourceLocation(source.table, start + 2, "line")
        found = {
            name: _decode(pillow, files[name][part], image, source.folder, spot)
            for name, image in source.modalities.items()
        }
        data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
        yield Chunk(Rows(to_numpy(ids[part]), data, present, **about.special(part)), spot)


def _decode(
    pillow: Any, files: list[Any], image: ImageColumn, folder: str, spot: SourceLocation
) -> tuple[Array, Array]:
    height, width = image.size
    values = np.zeros((len(files), image.channels, height, width), np.uint8)
    present = np.zeros(len(files), dtype=bool)
    for row, file in enumerate(files):
        path = Path(folder, str(file))
        if not file or not path.is_file():
            continue
        try:
            with pillow.open(path) as opened:
                decoded = _bytes(pillow, opened).convert("L" if image.channels == 1 else "RGB")
                pixels = np.asarray(decoded.resize((width, height)))
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise DatasetError(
                f"{spot.of(row)}: {path} is an image; got: {error}. Replace it, or empty that cell."
            ) from error
        values[row] = pixels.reshape(height, width, image.channels).transpose(2, 0, 1)
        present[row] = True
    return values, present


def _bytes(pillow: Any, opened: Any) -> Any:
    """Return grey values of 16 bits as their upper 8; Pillow would take what is above 255 for white."""
    if opened.mode == "F":
        raise ValueError("floats, and no grey values of 8 or 16 bits")
    if not opened.mode.startswith("I"):
        return opened
    values = np.asarray(opened)
    if values.min(initial=0) < 0 or values.max(initial=0) >= 1 << 16:
        raise ValueError("grey values beyond 16 bits")
    return pillow.fromarray((values >> 8).astype(np.uint8))
