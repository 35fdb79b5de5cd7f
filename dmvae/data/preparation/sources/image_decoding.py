"""Decode images with Pillow: upright, of one size and number of channels, in 8 bits."""

import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.sources import ImageFormat
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.sources.arrow_columns import Values, shown
from dmvae.data.preparation.stream import SourceLocation

Array = np.ndarray[Any, np.dtype[Any]]
File = Path | bytes

_EIGHT_BITS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp")
"""Formats that never have more than 8 bits."""
_BITS = (8, 10, 12, 14, 16)


class ImageDecoder:
    """Decodes the images of one modality on all processors.

    Args:
        name: the modality, for messages.
        settings: size, channels and the like.

    Raises:
        DatasetError: if Pillow is not installed.
    """

    def __init__(self, name: str, settings: ImageFormat) -> None:
        try:
            self._pillow, self._ops = import_module("PIL.Image"), import_module("PIL.ImageOps")
        except ImportError as error:
            raise DatasetError("Images need Pillow. Run pip install 'dmvae[images]'.") from error
        self._name, self._settings = name, settings
        self._bits: int = settings.bits or 8
        self._pool = ThreadPoolExecutor(os.cpu_count() or 1)  # Pillow decodes and resizes outside Python's lock
        self._skipped: list[str] = []
        self._transparent = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image: channels, height and width."""
        return (self._settings.channels, *self._settings.size)

    def find_bits(self, batches: Iterable[Sequence[File]]) -> list[str]:
        """Find the bits of grey images of more than 8 from their largest value; return a line that says so.

        All images keep one scale, so that a dark one stays dark. If none of the first batch has more than 8 bits, a
        later one is refused when it is decoded.
        """
        if self._settings.bits:
            return []
        num, largest, smallest = 0, 0, (1 << 32, "")
        for files in batches:
            candidates = [f for f in files if isinstance(f, bytes) or f.suffix.lower() not in _EIGHT_BITS]
            for value, file in zip(self._pool.map(self._largest, candidates), candidates, strict=True):
                if value is not None:
                    num, largest = num + 1, max(largest, value)
                    smallest = min(smallest, (value, _shown(file)))
            if not num:
                return []
        self._bits = next((bits for bits in _BITS if largest < 1 << bits), 16)
        line = f"{self._name}: {num} images of more than 8 bits reach {largest}: 0 to {(1 << self._bits) - 1} "
        line += "became 0 to 255"
        if smallest[0] < 1 << (self._bits - 2):
            line += f"; {smallest[1]} reaches only {smallest[0]}. Set bits if that is its full range"
        return [line]

    def decode(self, files: Sequence[File | None], location: SourceLocation) -> Values:
        """Return uint8 `(rows, channels, height, width)` and presence.

        Raises:
            DatasetError: naming the first image that does not decode, unless `on_error` is `skip`.
        """
        values, present = np.zeros((len(files), *self.shape), np.uint8), np.zeros(len(files), dtype=bool)
        for row, found in enumerate(self._pool.map(self._decoded, files)):
            if isinstance(found, str):
                place = f"image {_shown(files[row])}: {found} ({location.of(row)})"
                if self._settings.on_error == "refuse":
                    raise DatasetError(
                        f"Cannot decode {place}. Replace the file, empty the cell, or set on_error = 'skip'."
                    )
                self._skipped.append(place)
            elif found is not None:
                values[row], is_transparent = found
                present[row] = True
                self._transparent += is_transparent
        return values, present

    def remarks(self) -> list[str]:
        """Return lines on what was decoded."""
        lines = []
        if self._transparent:
            lines.append(
                f"{self._name}: laid {self._transparent} transparent images over the colour {self._settings.background}"
            )
        if self._skipped:
            lines.append(f"{self._name}: skipped {len(self._skipped)} images ({shown(self._skipped)})")
        return lines

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _largest(self, file: File) -> int | None:
        """Return the largest value of a grey image of more than 8 bits; None for others, and for what is no image."""
        try:
            with self._open(file) as opened:
                return int(np.asarray(opened).max(initial=0)) if opened.mode.startswith("I") else None
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError):
            return None  # `decode` says so

    def _open(self, file: File) -> Any:
        return self._pillow.open(io.BytesIO(file) if isinstance(file, bytes) else file)

    def _decoded(self, file: File | None) -> tuple[Array, bool] | str | None:
        """Return the pixels and whether some were transparent; the reason if they cannot be decoded."""
        if file is None:
            return None
        settings, (height, width) = self._settings, self._settings.size
        mode = "L" if settings.channels == 1 else "RGB"
        try:
            with self._open(file) as opened:
                upright = self._to_8_bits(self._ops.exif_transpose(opened))
                is_transparent = "A" in upright.getbands() or "transparency" in upright.info
                if is_transparent:
                    upright = self._over_background(upright)
                image = upright.convert(mode)
                back = self._pillow.new("RGB", (1, 1), settings.background).convert(mode).getpixel((0, 0))
                if settings.fit == "crop":
                    image = self._ops.fit(image, (width, height))
                elif settings.fit == "pad":
                    image = self._ops.pad(image, (width, height), color=back)
                else:
                    image = image.resize((width, height))
                pixels = np.asarray(image).reshape(height, width, settings.channels).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError) as error:
            return str(error)
        return pixels, is_transparent

    def _over_background(self, image: Any) -> Any:
        coloured = image.convert("RGBA")
        below = self._pillow.new("RGBA", coloured.size, (*self._settings.background, 255))
        return self._pillow.alpha_composite(below, coloured)

    def _to_8_bits(self, opened: Any) -> Any:
        """Return grey values of more than 8 bits as their upper 8; Pillow would clip them at 255."""
        if opened.mode == "F":
            raise ValueError("expected grey values of 8 to 16 bits, got floats")
        if not opened.mode.startswith("I"):
            return opened
        values = np.asarray(opened)
        if values.min(initial=0) < 0 or values.max(initial=0) >= 1 << self._bits:
            raise ValueError(
                f"expected grey values from 0 to {(1 << self._bits) - 1}, got {values.max()}; bits sets this range"
            )
        return self._pillow.fromarray((values >> (self._bits - 8)).astype(np.uint8))


def _shown(file: File | None) -> str:
    return "in bytes" if isinstance(file, bytes) else str(file)
