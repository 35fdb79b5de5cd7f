"""Where rows come from, for messages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SourceLocation:
    """The place of consecutive rows in a source, for messages.

    Attributes:
        where: the file.
        first: the number of the first row in the file.
        unit: what is numbered: rows, lines or observations.
    """

    where: str
    first: int
    unit: str = "row"

    def of(self, index: int) -> str:
        """Return the file and number of a row, given its index after the first one."""
        return f"{self.where}, {self.unit} {self.first + index}"
