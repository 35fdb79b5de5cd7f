"""Turn text into sequences of classes, with a vocabulary from training rows."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+|[^\w\s]")
_MIN_COUNT = 2  # a word that occurs once teaches nothing, and trains no class for unknown words


class Text:
    """The texts of one modality while their source is read.

    Args:
        unit: `words` or `bytes`.
        length: the number of units that are kept of a text.
        vocabulary: the largest number of words.

    Attributes:
        num_cut: the number of texts that were longer.
        num_words: the number of different words that were read.
    """

    def __init__(self, unit: str, length: int, vocabulary: int) -> None:
        self._unit, self._length, self._max = unit, length, vocabulary
        self._numbers: dict[str, int] = {}
        self._codes: Array | None = None
        self.num_cut = 0

    @property
    def num_words(self) -> int:
        """The number of different words that were read."""
        return len(self._numbers)

    def read(self, texts: Sequence[str | None]) -> tuple[Array, Array]:
        """Return classes `(rows, length)` and presence; words by their number in the order of reading, from 1."""
        values, present = np.zeros((len(texts), self._length), np.int64), np.zeros(len(texts), dtype=bool)
        for row, text in enumerate(texts):
            units = self._units(text or "")
            self.num_cut += len(units) > self._length
            kept = units[: self._length]
            values[row, : len(kept)] = kept
            present[row] = bool(kept)
        return values, present

    def _units(self, text: str) -> list[int]:
        if self._unit == "bytes":
            return [byte + 1 for byte in text.encode()]
        words = _WORD.findall(text.lower())[: self._length + 1]
        return [self._numbers.setdefault(word, len(self._numbers) + 1) for word in words]

    def describe(self, counts: Array) -> tuple[str, ...]:
        """Return the name of each class; `recode` can be called then.

        Args:
            counts: how often each number occurs in training rows; any length.
        """
        if self._unit == "bytes":
            return ("<pad>", *(f"0x{byte:02x}" for byte in range(256)))
        full = np.zeros(len(self._numbers) + 1, np.int64)
        full[: len(counts)] = counts[: len(full)]
        words = sorted(self._numbers, key=lambda word: (-full[self._numbers[word]], word))
        kept = [word for word in words[: self._max] if full[self._numbers[word]] >= _MIN_COUNT]
        self._codes = np.full(len(full), UNKNOWN)
        self._codes[0] = PAD
        for code, word in enumerate(kept, UNKNOWN + 1):
            self._codes[self._numbers[word]] = code
        return ("<pad>", "<unknown>", *kept)

    def recode(self, values: Array) -> Array:
        """Return the classes that `describe` named."""
        return values if self._codes is None else np.asarray(self._codes[values])
