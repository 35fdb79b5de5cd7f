"""Between the data and the model: rows as batches in the model's units, and results as tables in the data's."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import Manifest, ModalityInfo
from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.data.preparation.objects import read_objects
from dmvae.data.preparation.rows import Rows
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.scaling import Scale
from dmvae.model.dmvae import DMVAE

ROWS_AT_ONCE = 512


class Units:
    """What is known of each modality: its shape, scaling, classes and names.

    Attributes:
        manifest: of the dataset that the model was fitted to.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @property
    def modalities(self) -> dict[str, ModalityInfo]:
        """The description of each modality."""
        return dict(self.manifest.modalities)

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """The scaling of each modality."""
        return {name: Scale(info) for name, info in self.modalities.items()}

    def read(self, data: Any, ids: Any = None) -> ObjectRows:
        """Read data of the forms that `dmvae.fit` takes, with the model's features in their order.

        Raises:
            DatasetError: naming the part that cannot be read.
        """
        if isinstance(data, ObjectRows):
            return data
        if isinstance(data, str | Path):
            return self._of_dataset(data)
        return read_objects(data, ids=ids, known=self.modalities)

    def _of_dataset(self, folder: str | Path) -> ObjectRows:
        """Read every split of a prepared dataset, in its own units."""
        dataset, parts = open_dataset(folder), []
        infos = dataset.manifest.modalities
        unknown = sorted(infos.keys() - self.modalities.keys())
        if unknown:
            raise DatasetError(f"Unknown modalities {unknown} in {folder}. The model has {', '.join(self.modalities)}.")
        scales = {name: Scale(info) for name, info in infos.items()}
        for name, info in dataset.manifest.splits.items():
            if info.rows:
                batch = dataset.split(name).read(np.arange(info.rows), torch.float64)
                data = {m: scales[m].show(values).numpy() for m, values in batch.data.items()}
                for m, cells in (batch.cells or {}).items():
                    data[m] = np.where(cells.numpy(), data[m], np.nan)
                present = {m: has(batch, m).numpy() for m in batch.data}
                factors = None if batch.size_factors is None else batch.size_factors.double().numpy()
                parts.append(Rows(np.asarray(batch.ids), data, present, size_factors=factors))
        return ObjectRows(Rows.join(parts), {}, {})

    def batches(self, objects: ObjectRows, model: DMVAE) -> Iterator[Batch]:
        """Yield rows in the model's units, with a mask for each modality."""
        rows = objects.rows
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield self._batch(rows.take(slice(start, start + ROWS_AT_ONCE)), model)

    def _batch(self, rows: Rows, model: DMVAE) -> Batch:
        data, masks = {}, {}
        for name, scale in self.scales.items():
            info, present = self.modalities[name], rows.present.get(name)
            if present is None:
                present = np.zeros(len(rows), dtype=bool)
            values = rows.data.get(name)
            if values is None:
                values = np.zeros((len(rows), *info.shape))
            if values.shape[1:] != info.shape:
                raise DatasetError(
                    f"Rows of data[{name!r}] must have the shape {info.shape} that the model was trained on, but got "
                    f"{values.shape[1:]}."
                )
            cells = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, dtype=bool)
            cells &= present.reshape(-1, *(1,) * len(info.shape))
            if name not in model.config.missing_cells:
                _check_complete(name, rows, cells, present)
            stored = torch.from_numpy(np.where(cells, values, 0))
            data[name] = scale.read(stored.long() if info.classes else stored.double(), model.dtype)
            data[name] = data[name].long() if info.classes else data[name]
            masks[name] = torch.from_numpy(cells if name in model.config.missing_cells else present)
        factors = None if rows.size_factors is None else torch.from_numpy(rows.size_factors)
        ids = torch.from_numpy(rows.ids) if rows.ids.dtype == np.int64 else rows.ids
        return Batch(data, masks, ids=ids, size_factors=factors)

    def table(self, objects: ObjectRows | None, name: str, values: Tensor, as_classes: bool = True) -> Any:
        """Return values `(rows, *shape)` as a data frame if rows are vectors, else as an array."""
        info = self.modalities[name]
        if len(info.shape) != 1:
            return values.detach().numpy()
        columns = list(info.features) if info.features else [f"{name}_{number}" for number in range(info.shape[0])]
        frame = self.frame(objects, values, columns)
        for place, column in enumerate(info.columns or ()):
            if column.classes and as_classes:
                codes = frame.iloc[:, place].round().clip(0, len(column.classes) - 1).fillna(0).astype(int)
                frame[columns[place]] = [column.classes[code] for code in codes]
        return frame

    def frame(self, objects: ObjectRows | None, values: Tensor, columns: Sequence[str]) -> Any:
        """Return values `(rows, columns)` as a data frame with the rows' ids as its index."""
        import pandas as pd

        index = None if objects is None else pd.Index(objects.rows.ids, name="id")
        return pd.DataFrame(values.detach().numpy(), index=index, columns=list(columns))


def _check_complete(name: str, rows: Rows, cells: np.ndarray, present: np.ndarray) -> None:
    """Refuse rows that have some cells of a modality only, if the model was not trained on such rows."""
    odd = present & ~cells.reshape(len(cells), -1).all(1)
    if odd.any():
        raise DatasetError(
            f"data[{name!r}] must have all features of a row or none, as the rows that the model was trained on, but "
            f"lacks some in the row with id {rows.ids[odd][0]}. Fill them in, or make the whole row NaN."
        )
