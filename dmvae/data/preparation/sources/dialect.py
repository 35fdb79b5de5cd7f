"""Find how a delimited text file is written: its encoding, delimiter, header line and marks in numbers."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from dmvae.config.sources import CsvDialect
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.sources.arrow_columns import shown
from dmvae.data.preparation.sources.number_marks import find_marks

_BLOCK_BYTES = 8 << 20
"""Also the longest line that can be read."""
_SAMPLE_BYTES = 1 << 20
_SAMPLE_LINES = 1000
_SAMPLE_CELLS, _MIN_ROWS = 200_000, 20
_DELIMITERS = "\t;|, "
_EXTRA_NULLS = (".", "-", "--", "?", "na", "N.A.", "None", "none", "<NA>", "NaT")
NULLS = (*pacsv.ConvertOptions().null_values, *_EXTRA_NULLS)
ROW_NAMES = "row names"
"""The name of a first column without one, as R and pandas write row names."""


@dataclass(frozen=True)
class Dialect:
    """How a file is written.

    Attributes:
        path: the file.
        encoding: of its text.
        delimiter: one character.
        decimal: the decimal mark.
        thousands: the mark between groups of three digits; None if there is none.
        comment: what lines that are ignored begin with; None if there are none.
        nulls: the words that stand for a missing value.
        given_nulls: those of them that the settings name.
        header: the number of the line with the names; 0 if there is none.
        columns: the names.
        unclear: a value of each column whose marks can be read in two ways.
        note: what was found, for the user; empty if it is what a file usually has.
    """

    path: str
    encoding: str
    delimiter: str
    decimal: str
    thousands: str | None
    comment: str | None
    nulls: tuple[str, ...]
    given_nulls: tuple[str, ...]
    header: int
    columns: tuple[str, ...]
    unclear: dict[str, str]
    note: str

    def line(self, row: int) -> int:
        """Return the number of the line of a row; rows count from 0."""
        return self.header + 1 + row

    def open(self, types: dict[str, pa.DataType] | None = None, only: Sequence[str] | None = None) -> Any:
        """Return a reader of record batches.

        Args:
            types: the types of some columns; others are found in the first block.
            only: the columns to read; None for all.
        """
        return pacsv.open_csv(self._stream(), *self._options(types or {}, only or ()))

    def read_all(self, types: dict[str, pa.DataType]) -> pa.Table:
        """Return the whole table; the types of other columns are found in all of their values."""
        return pacsv.read_csv(self._stream(), *self._options(types, ()))

    def _options(self, types: dict[str, pa.DataType], only: Sequence[str]) -> tuple[Any, Any, Any]:
        read = pacsv.ReadOptions(
            block_size=_BLOCK_BYTES,
            use_threads=False,
            encoding=self.encoding,
            column_names=list(self.columns),
            skip_rows=self.header,
        )
        convert = pacsv.ConvertOptions(
            column_types=types,
            include_columns=list(only),
            decimal_point=self.decimal,
            null_values=list(self.nulls),
            strings_can_be_null=bool(self.given_nulls),
        )
        return read, pacsv.ParseOptions(delimiter=self.delimiter), convert

    def _stream(self) -> Any:
        stream = pa.input_stream(self.path, compression="detect")
        return stream if self.comment is None else pa.PythonFile(_WithoutComments(stream, self.comment), mode="r")

    def check_clear(self, columns: Sequence[str]) -> None:
        """Refuse columns whose marks can be read in two ways.

        Raises:
            DatasetError: naming the first one.
        """
        for column in columns:
            if column in self.unclear:
                raise DatasetError(
                    f"Unclear number {self.unclear[column]!r} in column {column!r} of {self.path}: its comma or point "
                    f"can be a decimal mark or one of thousands. Set decimal or thousands in source.dialect."
                )


def find_dialect(path: str, given: CsvDialect, id_column: str) -> Dialect:
    """Return how a file is written: as the settings say, else as its first megabyte shows.

    A line of names that is one short, without `id_column`, lacks the name of the column of row names.

    Raises:
        DatasetError: if the file is absent, empty or not text.
    """
    if not Path(path).is_file():
        raise DatasetError(f"Source file not found: {path}. Correct its path in the settings of source.")
    try:
        with pa.input_stream(path, compression="detect") as stream:
            sample = stream.read(_SAMPLE_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"Cannot read {path}: {error}. Write the file again.") from error
    encoding = given.encoding or _find_encoding(sample)
    text = _decode(sample, encoding, path)
    lines = text.splitlines()
    lines = lines[: _SAMPLE_LINES if len(sample) < _SAMPLE_BYTES else max(1, min(_SAMPLE_LINES, len(lines) - 1))]
    told = re.fullmatch("sep=(.)", lines[0]) if lines else None  # as Excel writes it
    delimiter = given.delimiter or (told[1] if told else _find_delimiter(path, lines, given.comment or "#"))
    comment = given.comment or _find_comment(lines, delimiter)
    header, columns = _find_header(path, lines, delimiter, comment, given.header, id_column)
    rows = [
        cells
        for line in lines[header:]
        if line.strip() and not (comment and line.startswith(comment))
        if len(cells := _split(line, delimiter)) == len(columns)
    ]
    few = rows[: max(_MIN_ROWS, _SAMPLE_CELLS // len(columns))]
    marks = find_marks({column: [row[i] for row in few] for i, column in enumerate(columns)}, given)
    used = {word for row in rows for word in row if word in _EXTRA_NULLS}
    told_lines = [
        f"encoding {encoding}" if encoding != "utf8" else "",
        f"delimiter {_shown(delimiter)}" if delimiter != _usual_delimiter(path) else "",
        f"decimal mark {marks.decimal!r}" if marks.decimal != "." else "",
        f"thousands {marks.thousands!r}" if marks.thousands else "",
        f"lines with {comment!r} ignored" if comment else "",
        f"names in line {header}" if header > 1 else "" if header else "no line of names",
        f"the first column is named {ROW_NAMES!r}" if columns[0] == ROW_NAMES else "",
        f"missing: {', '.join(sorted(used))}" if used else "",
    ]
    note = ", ".join(line for line in told_lines if line)
    return Dialect(
        path=path,
        encoding=encoding,
        delimiter=delimiter,
        decimal=marks.decimal,
        thousands=marks.thousands,
        comment=comment,
        nulls=(*NULLS, *given.null),
        given_nulls=given.null,
        header=header,
        columns=columns,
        unclear=marks.unclear,
        note=f"{path}: {note}" if note else "",
    )


def _find_encoding(sample: bytes) -> str:
    if sample[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    for encoding in ("utf8", "cp1252"):
        try:
            sample[: sample.rfind(b"\n") + 1 or None].decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding
    return "latin-1"


def _decode(sample: bytes, encoding: str, path: str) -> str:
    try:
        return io.TextIOWrapper(io.BytesIO(sample), encoding, errors="replace").read().removeprefix("\ufeff")
    except LookupError as error:
        raise DatasetError(f"Unknown encoding {encoding!r} for {path}. Correct source.dialect.encoding.") from error


def _usual_delimiter(path: str) -> str:
    return "\t" if {".tsv", ".tab"} & set(Path(path).suffixes) else ","


def _shown(delimiter: str) -> str:
    return {"\t": "tab", " ": "space"}.get(delimiter, repr(delimiter))


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter)) if '"' in line else line.split(delimiter)


def _find_delimiter(path: str, lines: Sequence[str], comment: str) -> str:
    """Return the delimiter that divides nearly all lines, from the earliest on, into the same number of cells."""
    usual, best = _usual_delimiter(path), (len(lines) + 1, "")
    kept = [line for line in lines if line.strip() and not line.startswith(comment)]
    for delimiter in [usual, *_DELIMITERS.replace(usual, "")]:
        counts = [len(_split(line, delimiter)) for line in kept]
        num, times = Counter(counts[1:] or counts).most_common(1)[0] if counts else (1, 0)
        if num > 1 and times >= 0.9 * len(counts[1:] or counts):
            before = next((i for i, count in enumerate(counts) if count in (num, num - 1) and count > 1), len(counts))
            best = min(best, (before, delimiter), key=lambda found: found[0])
    return best[1] or usual


def _find_comment(lines: Sequence[str], delimiter: str) -> str | None:
    """Return `#` if lines that begin with it have other numbers of cells than the rest."""
    cells = Counter(len(_split(line, delimiter)) for line in lines if line.strip() and not line.startswith("#"))
    odd = [line for line in lines if line.startswith("#")]
    if not odd or not cells:
        return None
    usual = cells.most_common(1)[0][0]
    return "#" if any(len(_split(line, delimiter)) not in (usual, usual - 1) for line in odd[:-1] or odd) else None


def _find_header(
    path: str, lines: Sequence[str], delimiter: str, comment: str | None, given: int | None, id_column: str
) -> tuple[int, tuple[str, ...]]:
    """Return the number of the line with the names, 0 if there is none, and the names."""
    cells = [(number, _split(line, delimiter), line) for number, line in enumerate(lines, 1) if line.strip()]
    data = [found for found in cells if not re.fullmatch("sep=.", found[2])]
    data = [found for found in data if not (comment and found[2].startswith(comment))]
    if not data:
        raise DatasetError(f"{path} has no lines. Write a line of names, and a line for each row.")
    num = Counter(len(found) for _, found, _ in data[1:] or data).most_common(1)[0][0]
    if given == 0:
        return 0, tuple(str(place) for place in range(1, num + 1))
    at = next((i for i in range(len(data)) if (data[i][0] == given if given else _has_names(data[i:], num))), 0)
    number, names, line = data[at]
    if given and number != given:
        raise DatasetError(f"Line {given} of {path} has no names. Correct source.dialect.header.")
    # names may stand in the last line of comments, as in #CHROM
    above = next((found for found in reversed(cells) if found[0] < number), None)
    if given is None and comment and above and above[2].startswith(comment) and len(above[1]) == num == len(names):
        number, names, line = above
    names = [name.strip() for name in names]
    names[0] = names[0].lstrip("#").strip() if line.startswith("#") else names[0]
    if len(names) == num - 1 and id_column not in names:
        names = ["", *names]
    if given is None and len(data) > 1 and all(map(_is_number, names)) and names != _counted(names):
        raise DatasetError(
            f"The first line of {path} holds numbers ({shown(names)}) where names are expected. Set "
            f"source.dialect.header = 0 if it is a row, or {number} if these are names."
        )
    named = [name or (ROW_NAMES if place == 0 else f"column {place + 1}") for place, name in enumerate(names)]
    return number, tuple(named)


def _has_names(lines: Sequence[tuple[int, list[str], str]], num: int) -> bool:
    """Tell whether the first line has a name for each of `num` columns, or for all but the names of rows."""
    found = len(lines[0][1])
    return found == num or (
        found == num - 1 > 1 and len(lines) > 1 and len(lines[1][1]) == num and any(map(_is_number, lines[1][1][1:]))
    )


def _counted(names: Sequence[str]) -> list[str]:
    """Return the names that pandas gives columns without names, starting as `names` do."""
    start = int(names[0]) if names[0].isdecimal() else 0
    return [str(start + place) for place in range(len(names))]


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True


class _WithoutComments:
    """A stream of bytes that leaves out the lines that begin with `comment`; they stay as empty lines."""

    closed = False

    def __init__(self, stream: Any, comment: str) -> None:
        self._stream, self._pattern = stream, re.compile(rb"(?m)^" + re.escape(comment.encode()) + rb"[^\n]*")
        self._chunks = self._read()
        self._held = b""

    def _read(self) -> Iterator[bytes]:
        rest = b""
        while block := self._stream.read(_SAMPLE_BYTES):
            whole, newline, tail = (rest + block).rpartition(b"\n")
            yield self._pattern.sub(b"", whole + newline)
            rest = tail
        yield self._pattern.sub(b"", rest)

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes, and none at the end."""
        while len(self._held) < size and (found := next(self._chunks, None)) is not None:
            self._held += found
        part, self._held = self._held[:size], self._held[size:]
        return part

    def close(self) -> None:
        """Close the stream."""
        self.closed = True
        self._stream.close()
