from typing import Any

import numpy as np

from dmvae.data.format.gather import Addresses, Gatherer
from dmvae.data.format.schema import Columns, TensorColumn


class _Moving(Gatherer):
    """Another file is mapped below the others whenever their span was looked at, as another thread might."""

    lower: list[tuple[int, int]]
    is_reading = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name in ("_low", "_high", "_span") and self.is_reading and self.lower:
            self.is_reading = False
            file, address = self.lower.pop()
            self.add(file, {"x": Addresses(np.array([address]), np.array([0]))}, address, address + 8)
            self.is_reading = True
        return found


def test_rows_are_right_while_other_files_are_mapped() -> None:
    memory = np.zeros(4096, dtype=np.int64)
    memory[-8:] = np.arange(8)
    memory[-16] = 0b10101010
    start, bits = memory[-8:].ctypes.data, memory[-16:].ctypes.data
    gatherer = _Moving(Columns("string", False, {"x": TensorColumn((1,), "int64")}), [8, *[1] * 30], [8, *[1] * 30])
    gatherer.add(0, {"x": Addresses(np.array([start]), np.array([bits]))}, bits, start + 64)
    gatherer.lower = [(file, bits - 800 * file) for file in range(30, 0, -1)]
    rows = gatherer.locate(np.arange(8))
    gatherer.is_reading = True
    for _ in range(5):
        assert gatherer.values("x", rows).ravel().tolist() == list(range(8))
        assert gatherer.present("x", rows).tolist() == [row % 2 == 1 for row in range(8)]
