"""What an encoder sees of the columns of a table: numbers as they are, counts as logarithms, categories one-hot."""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class TableFeatures(nn.Module):
    """The features of a table's rows.

    Real, positive and binary columns come first as they are, then counts as log(1 + x), then categories one-hot. A
    class that no training row has is zero everywhere.

    Args:
        kinds: the kind of each column.
        classes: the number of classes of each column that is a category.

    Attributes:
        width: the number of features.
    """

    numbers: Tensor
    counts: Tensor
    columns: Tensor
    classes: Tensor

    def __init__(self, kinds: Sequence[str], classes: Sequence[int]) -> None:
        super().__init__()
        places = {kind: [place for place, found in enumerate(kinds) if found == kind] for kind in ("count", "category")}
        others = [place for place, kind in enumerate(kinds) if kind not in places]
        categories = list(zip(places["category"], classes, strict=True))
        parts = {
            "numbers": others,
            "counts": places["count"],
            "columns": list(itertools.chain(*([place] * num for place, num in categories))),
            "classes": list(itertools.chain(*(range(num) for _, num in categories))),
        }
        for name, part in parts.items():
            self.register_buffer(name, torch.tensor(part, dtype=torch.int64), persistent=False)
        self.width = len(parts["numbers"]) + len(parts["counts"]) + len(parts["columns"])

    def features(
        self, x: Float[Tensor, "row column"], cells: Bool[Tensor, "row column"] | None = None
    ) -> Float[Tensor, "row feature"]:
        """Return the features of rows, which are 0 where a cell is missing."""
        one_hot = torch.eq(x[:, self.columns], self.classes).to(x.dtype)
        one_hot = one_hot if cells is None else one_hot * cells[:, self.columns]
        return torch.cat((x[:, self.numbers], x[:, self.counts].log1p(), one_hot), dim=1)
