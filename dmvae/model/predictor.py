"""A model that answers: rows as people have them, in the units of their data, to latents, imputations and likelihoods.

What is loaded where nothing but torch, pydantic, numpy and safetensors is installed.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model
from torch import Tensor

from dmvae.data.batch import Batch
from dmvae.data.scaling import Scale
from dmvae.model.dmvae import DMVAE

UNITS = "units.json"
Operation = Literal["encode", "reconstruct", "impute", "nll", "sample"]
OPERATIONS: tuple[Operation, ...] = ("encode", "reconstruct", "impute", "nll", "sample")
MAX_DRAWS = 100_000


class ModalitySpec(BaseModel):
    """How a modality's values stand to what the model reads; the manifest's fields of the same names."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    shape: tuple[int, ...]
    dtype: str
    likelihood: str = "normal"
    classes: int | None = None
    scaling: str = "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    has_size_factor: bool = False
    """Whether the training rows came with size factors; without, a row's is the total of its counts."""

    @cached_property
    def _scale(self) -> Scale:
        return Scale(self)

    def read(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Bring `(rows, *shape)` of the data's units to what the model was trained on, as `dtype` or their own."""
        return self._scale.read(values, dtype or values.dtype)

    def show(self, values: Tensor) -> Tensor:
        """Bring `(..., *shape)` of the model back to the data's units."""
        return self._scale.show(values)

    def log_jacobian(self, values: Tensor) -> Tensor:
        """Nats of each row to add to -log p of the values as read, `(rows, *shape)`, for that of the values given."""
        return self._scale.log_jacobian(values)


def row_type(shapes: Mapping[str, Sequence[int]]) -> type[BaseModel]:
    """Return the type of one row: every modality may be left out or null, an unknown name is refused."""
    fields: dict[str, Any] = {}
    for name, shape in shapes.items():
        nested: Any = float
        for _ in shape:
            nested = list[nested]
        fields[name] = (nested | None, None)
    return create_model("Row", __config__=ConfigDict(extra="forbid"), **fields)


class Request(BaseModel):
    """What is asked of the rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: Operation = "impute"
    """`encode`, `reconstruct` what is observed, `impute` what is not, `nll`, or `sample` from the prior."""
    num_samples: int = Field(0, ge=0, le=1000)
    """Draws that `impute` shows beside mean and spread."""
    num_draws: PositiveInt = Field(100, ge=2, le=MAX_DRAWS)
    """Of `impute`'s mean and spread; of `nll`, decoder rows per modality."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Of the draws."""


class Predictor:
    """A model with its units.

    Attributes:
        model: in eval mode.
        units: by modality.
        shapes: by field of a row; with a modality of counts a row may have a `size_factor`.
        counts: the modalities of counts.
        row: the type of one row.
    """

    def __init__(self, model: DMVAE, units: Mapping[str, ModalitySpec]) -> None:
        self.model, self.units = model.eval(), dict(units)
        self.shapes: dict[str, tuple[int, ...]] = {name: unit.shape for name, unit in self.units.items()}
        self.counts = [name for name in self.units if model.likelihoods[name].are_counts]
        if self.counts:
            self.shapes["size_factor"] = ()
        self.row = row_type(self.shapes)

    @classmethod
    def load(cls, folder: Path) -> "Predictor":
        """Read a folder with a model and `units.json`."""
        units = json.loads((folder / UNITS).read_text())
        return cls(DMVAE.load(folder), {name: ModalitySpec.model_validate(unit) for name, unit in units.items()})

    def parse(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Check rows and return them as dicts with every modality, and the size factor of counts; None where missing.

        Raises:
            ValueError: naming the row, the field and what is wrong with it.
        """
        parsed = []
        for number, given in enumerate(rows):
            try:
                row = given if isinstance(given, BaseModel) else self.row.model_validate(given)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = str(first["loc"][0]) if first["loc"] else "row"
                known = f"; a row has {', '.join(self.units)}" if first["type"] == "extra_forbidden" else ""
                raise ValueError(f"row {number}: {field}: {first['msg']}{known}") from None
            parsed.append({name: getattr(row, name) for name in self.shapes})
        return parsed

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Bring parsed rows to the model's units.

        Raises:
            ValueError: naming the row and the modality whose values have another shape, are not finite, not classes or
                no counts, or whose size factor is not positive, or absent where the training rows had one.
        """
        data, masks = {}, {}
        for name, unit in self.units.items():
            masks[name] = torch.tensor([row[name] is not None for row in rows], dtype=torch.bool)
            # measurements with a large mean are scaled before they lose digits, as when a dataset is read
            wide, dtype = (torch.float64, torch.float32) if unit.classes is None else (torch.int64, torch.int64)
            values = torch.zeros((len(rows), *unit.shape), dtype=wide)
            for number, row in enumerate(rows):
                if row[name] is not None:
                    values[number] = self._checked(name, row[name], number)
            data[name] = unit.read(values, dtype)
        return Batch(data, masks, size_factors=self._size_factors(rows))

    def _size_factors(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if not self.counts:
            return None
        for number, row in enumerate(rows):
            found = row["size_factor"]
            if found is not None and not 0 < found < math.inf:
                raise ValueError(f"row {number}: size_factor: it is positive and finite; got {found:g}.")
            for name in self.counts:
                if found is None and self.units[name].has_size_factor and row[name] is not None:
                    raise ValueError(f"row {number}: size_factor: the training rows had one beside {name}; give it.")
        return torch.tensor([math.nan if row["size_factor"] is None else row["size_factor"] for row in rows])

    def answer(self, rows: Sequence[Any], request: Request) -> list[dict[str, Any]]:
        """Answer a request about rows; every answer says which modalities were observed.

        Raises:
            ValueError: as `parse` and `batch` do.
        """
        parsed = self.parse(rows)
        batch = self.batch(parsed)
        answers: list[dict[str, Any]] = [
            {"observed": [name for name in self.units if row[name] is not None]} for row in parsed
        ]
        if answers:
            generator = torch.Generator(device=self.model.device).manual_seed(request.seed)
            getattr(self, f"_{request.operation}")(batch, request, answers, generator)
        return answers

    def _encode(self, batch: Batch, _: Request, answers: list[dict[str, Any]], __: torch.Generator) -> None:
        with torch.no_grad():
            shared, private = self.model.posteriors(batch)
        for number, answer in enumerate(answers):
            answer["shared"] = _gaussian(shared.mean[number], shared.log_var[number])
            answer["private"] = {
                name: _gaussian(part.mean[number], part.log_var[number])
                for name, part in private.items()
                if name in answer["observed"]
            }

    def _reconstruct(self, batch: Batch, _: Request, answers: list[dict[str, Any]], __: torch.Generator) -> None:
        outputs = self.model.predict(batch, return_mean=True)
        for name, unit in self.units.items():
            shown = unit.show(self.model.means(outputs[name], name, batch).double().cpu())
            for number, answer in enumerate(answers):
                if name in answer["observed"]:
                    answer.setdefault("values", {})[name] = shown[number].tolist()

    def _impute(
        self, batch: Batch, request: Request, answers: list[dict[str, Any]], generator: torch.Generator
    ) -> None:
        """Every row is given the same standard-normal draws, so that an answer does not depend on the row's company."""
        num = max(request.num_draws, request.num_samples)
        with torch.no_grad():
            shared, private = self.model.posteriors(batch)
        drawn = {
            name: gaussian.sample(_normals(num, gaussian.mean, generator))
            for name, gaussian in {"": shared, **private}.items()
        }
        for answer in answers:
            answer["imputed"] = {}
        for name, unit in self.units.items():
            missing = [number for number, answer in enumerate(answers) if name not in answer["observed"]]
            if not missing:
                continue
            rows = batch[torch.tensor(missing)]
            draws = unit.show(self._decoded(name, drawn[""][:, missing], drawn[name][:, missing], rows))
            best = unit.show(self._decoded(name, shared.mean[missing], private[name].mean[missing], rows))
            mean, sd = draws.mean(0), draws.std(0)
            for place, number in enumerate(missing):
                told = {"mean": mean[place].tolist(), "sd": sd[place].tolist(), "best": best[place].tolist()}
                if request.num_samples:
                    told["samples"] = draws[: request.num_samples, place].tolist()
                answers[number]["imputed"][name] = told

    def _decoded(self, name: str, shared: Tensor, private: Tensor, rows: Batch) -> Tensor:
        """Decode latents `(..., row, dim)` of one modality to its mean, on the CPU."""
        output = self.model.decode({"z": shared, "modalities_z": {name: private}}, name)[name]
        return self.model.means(output, name, rows).double().cpu()

    def _nll(self, batch: Batch, request: Request, answers: list[dict[str, Any]], _: torch.Generator) -> None:
        # one id for all: a row's draws depend on its id and the seed, and not on its company
        batch = replace(batch, ids=torch.zeros(len(batch), dtype=torch.int64))
        found = self.model.joint_nll(batch, request.num_draws, seed=request.seed)
        jacobians = {name: unit.log_jacobian(batch.data[name]).tolist() for name, unit in self.units.items()}
        for number, answer in enumerate(answers):
            jacobian = math.fsum(jacobians[name][number] for name in answer["observed"])
            answer |= {"nll": float(found.nll[number]) + jacobian, "nll_se": float(found.se[number])}
            answer["trusted"] = bool(found.trusted[number])

    def _sample(self, batch: Batch, _: Request, answers: list[dict[str, Any]], generator: torch.Generator) -> None:
        outputs = self.model.decode(self.model.generate_from_prior(len(batch), generator))
        for name, unit in self.units.items():
            shown = unit.show(self.model.means(outputs[name], name).double().cpu())
            for number, answer in enumerate(answers):
                answer.setdefault("values", {})[name] = shown[number].tolist()

    def _checked(self, name: str, values: Any, number: int) -> Tensor:
        unit = self.units[name]
        try:
            array = np.asarray(values, dtype=np.float64)
        except ValueError:
            raise ValueError(f"row {number}: {name}: a row of it has shape {unit.shape}; got ragged lists.") from None
        if array.shape != unit.shape:
            raise ValueError(f"row {number}: {name}: a row of it has shape {unit.shape}; got {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"row {number}: {name}: values are finite; got NaN or infinity. Leave it out if missing.")
        if unit.dtype == "uint8" and (array.min() < 0 or array.max() > 255):
            raise ValueError(f"row {number}: {name}: values are 0 to 255; got {array.min():g} to {array.max():g}.")
        if unit.scaling == "log1p" and array.min() < 0:
            raise ValueError(f"row {number}: {name}: values are 0 or more; got {array.min():g}.")
        if unit.classes is not None and ((array % 1 != 0).any() or array.min() < 0 or array.max() >= unit.classes):
            raise ValueError(f"row {number}: {name}: values are classes 0 to {unit.classes - 1}; got {array.max():g}.")
        if name in self.counts and ((array % 1 != 0).any() or array.min() < 0):
            wrong = array[(array % 1 != 0) | (array < 0)][0]
            raise ValueError(f"row {number}: {name}: counts are whole numbers of 0 or more; got {wrong:g}.")
        return torch.from_numpy(array)


def _normals(num: int, like: Tensor, generator: torch.Generator) -> Tensor:
    normals = torch.randn(num, 1, like.shape[-1], dtype=like.dtype, device=like.device, generator=generator)
    return normals.expand(num, *like.shape)


def _gaussian(mean: Tensor, log_var: Tensor) -> dict[str, list[float]]:
    return {"mean": mean.tolist(), "variance": log_var.exp().tolist()}
