"""Find the decimal mark and the mark between thousands in the cells of a text file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from dmvae.config.sources import CsvDialect

_EXPONENT = r"(?:[eE][+-]?\d+)?"
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:([.,' \u00a0\u202f])\d{3})(?:\1\d{3})*(?:([.,])\d+)?")
_DECIMAL = re.compile(rf"[+-]?\d*([.,])\d+{_EXPONENT}")


@dataclass(frozen=True)
class Marks:
    """The marks in numbers.

    Attributes:
        decimal: the decimal mark.
        thousands: the mark between groups of three digits, if there is one.
        unclear: a value of each column that can be read in two ways.
    """

    decimal: str
    thousands: str | None
    unclear: dict[str, str]


def find_marks(cells: Mapping[str, Sequence[str]], given: CsvDialect) -> Marks:
    """Return the marks that the settings name, or those that some value shows beyond doubt.

    `1,5` has a decimal comma, `1.234,5` also points between thousands, and `1,234.5` has commas there. `1,234` alone
    shows neither: it is unclear, unless another value shows what commas are.
    """
    decimals: set[str] = set()
    thousands: set[str] = set()
    doubtful: dict[str, dict[str, str]] = {}
    commas: dict[str, str] = {}
    for column, values in cells.items():
        for value in set(values):
            text = value.strip()
            grouped, plain = _GROUPED.fullmatch(text), _DECIMAL.fullmatch(text)
            if plain and plain[1] == ",":
                commas.setdefault(column, text)
            if grouped and (grouped[2] or text.count(grouped[1]) > 1 or grouped[1] not in ".,"):
                if grouped[1] != grouped[2]:
                    thousands.add(grouped[1])
                    decimals |= {grouped[2]} - {None}
            elif grouped and not re.match(r"[+-]?0\d*[.,]", text):
                doubtful.setdefault(grouped[1], {}).setdefault(column, text)
            elif plain:
                decimals.add(plain[1])
    if given.decimal or given.thousands:
        other = {",": ".", ".": ","}.get(given.thousands or "", ".")
        return Marks(given.decimal or other, given.thousands, {})
    if decimals == {",", "."}:  # one of them in some columns only
        return Marks(".", None, commas)
    decimal = next(iter(decimals), "." if "," in thousands or "." not in thousands else ",")
    found = next((mark for mark in sorted(thousands) if mark != decimal), None)
    unclear = {} if "," in decimals | thousands else doubtful.get(",", {})
    if decimal == "," and found != ".":
        unclear = doubtful.get(".", {})
    return Marks(decimal, found, unclear)


def parse_grouped(column: pa.Array, thousands: str, decimal: str) -> pa.Array | None:
    """Return text as numbers without their marks between thousands; None if a value is no such number."""
    text = pc.utf8_trim_whitespace(column)
    mark, point = re.escape(thousands), re.escape(decimal)
    law = rf"^[+-]?(\d{{1,3}}({mark}\d{{3}})+|\d+)?({point}\d+)?{_EXPONENT}$"
    if not pc.all(pc.match_substring_regex(text, law), min_count=0).as_py():
        return None
    text = pc.replace_substring(pc.replace_substring(text, thousands, ""), decimal, ".")
    return text.cast(pa.float64())
