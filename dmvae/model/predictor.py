"""Predictions in the units of the data: from rows as JSON to latents, reconstructions, imputations and NLLs.

It needs torch, pydantic, numpy and safetensors only, so that registered models can be served without anything else.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model
from torch import Tensor

from dmvae.data.batch import Batch
from dmvae.distributions.likelihoods.columns import Columns
from dmvae.model.dmvae import DMVAE
from dmvae.model.modality_spec import ModalitySpec as ModalitySpec

UNITS = "units.json"
Operation = Literal["encode", "reconstruct", "impute", "nll", "sample"]
OPERATIONS: tuple[Operation, ...] = ("encode", "reconstruct", "impute", "nll", "sample")
MAX_DRAWS = 100_000


def row_type(shapes: Mapping[str, Sequence[int]], named: Collection[str] = ()) -> type[BaseModel]:
    """Return the type of one row: modalities may be left out or null, and unknown names are refused.

    Values of the modalities in `named` are a list, or an object by the names of their features.
    """
    fields: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name in named:
            fields[name] = (list[Any] | dict[str, Any] | None, None)
            continue
        nested: Any = float
        for _ in shape:
            nested = list[nested]
        fields[name] = (nested | None, None)
    return create_model("Row", __config__=ConfigDict(extra="forbid"), **fields)


class Request(BaseModel):
    """The operation to apply to rows, and its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: Operation = "impute"
    """`encode`, `reconstruct` observed modalities, `impute` missing ones, `nll`, or `sample` from the prior."""
    num_samples: int = Field(0, ge=0, le=1000)
    """Draws that `impute` returns beside mean and standard deviation."""
    num_draws: PositiveInt = Field(100, ge=2, le=MAX_DRAWS)
    """Draws for the mean and standard deviation of `impute`; decoder rows per modality of `nll`."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the draws."""


class Predictor:
    """A model that answers requests in the units of the data.

    Attributes:
        model: in eval mode.
        units: per modality.
        shapes: per field of a row: the modalities, and `size_factor` if one of them holds counts.
        counts: the modalities of counts.
        named: the modalities whose features have names; answers give their values by name.
        row: the type of one row.
    """

    def __init__(self, model: DMVAE, units: Mapping[str, ModalitySpec]) -> None:
        self.model, self.units = model.eval(), dict(units)
        self.shapes: dict[str, tuple[int, ...]] = {name: unit.shape for name, unit in self.units.items()}
        self.counts = [name for name in self.units if model.likelihoods[name].are_counts]
        if self.counts:
            self.shapes["size_factor"] = ()
        self.named = [name for name, unit in self.units.items() if unit.features is not None]
        self.row = row_type(self.shapes, self.named)

    @classmethod
    def load(cls, folder: Path, trust: Collection[str] = ()) -> "Predictor":
        """Load a model from a folder that has `units.json`; `trust` as in `DMVAE.load`."""
        units = json.loads((folder / UNITS).read_text())
        specs = {name: ModalitySpec.model_validate(unit) for name, unit in units.items()}
        return cls(DMVAE.load(folder, trust=trust), specs)

    def parse(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Check rows, and return them as dicts with every field, None where it is missing.

        Raises:
            ValueError: naming the row, the field and the fault.
        """
        parsed = []
        for number, given in enumerate(rows):
            try:
                row = given if isinstance(given, BaseModel) else self.row.model_validate(given)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = str(first["loc"][0]) if first["loc"] else "row"
                known = f". Available: {', '.join(self.units)}" if first["type"] == "extra_forbidden" else ""
                raise ValueError(f"Row {number}, {field}: {first['msg']}{known}") from None
            parsed.append({name: getattr(row, name) for name in self.shapes})
        return parsed

    def batch(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Convert parsed rows to a batch in the model's units.

        Raises:
            ValueError: naming the row and the field, if values have another shape or are illegal, or a size factor
                is not positive or missing although training rows had one.
        """
        data, masks = {}, {}
        for name, unit in self.units.items():
            masks[name] = torch.tensor([row[name] is not None for row in rows], dtype=torch.bool)
            # in float64, since values with a large mean must be scaled before they lose digits
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
                raise ValueError(f"Row {number}, size_factor: must be positive and finite, but got {found:g}.")
            for name in self.counts:
                if found is None and self.units[name].has_size_factor and row[name] is not None:
                    raise ValueError(f"Row {number}, size_factor: missing, but the training rows had one. Add it.")
        return torch.tensor([math.nan if row["size_factor"] is None else row["size_factor"] for row in rows])

    def answer(self, rows: Sequence[Any], request: Request) -> list[dict[str, Any]]:
        """Answer a request for each row; answers list the observed modalities.

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
                    answer.setdefault("values", {})[name] = unit.written(shown[number])

    def _impute(
        self, batch: Batch, request: Request, answers: list[dict[str, Any]], generator: torch.Generator
    ) -> None:
        """Impute with the same normal draws for every row, so that answers do not depend on the other rows."""
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
            classes = self._class_probabilities(name, drawn[""][:, missing], drawn[name][:, missing])
            for place, number in enumerate(missing):
                told = {
                    "mean": unit.numbers(mean[place]),
                    "sd": unit.numbers(sd[place]),
                    "best": unit.written(best[place]),
                }
                if classes:
                    told["probabilities"] = {column: p[place] for column, p in classes.items()}
                if request.num_samples:
                    told["samples"] = [unit.written(draw) for draw in draws[: request.num_samples, place]]
                answers[number]["imputed"][name] = told

    def _class_probabilities(self, name: str, shared: Tensor, private: Tensor) -> dict[str, list[dict[str, float]]]:
        """Return the mean over draws `(draw, row, dim)` of the probabilities of classes: by column, row and class."""
        likelihood, unit = self.model.likelihoods[name], self.units[name]
        if not isinstance(likelihood, Columns) or unit.columns is None or unit.features is None:
            return {}
        output = self.model.decode({"z": shared, "modalities_z": {name: private}}, name)[name]
        return {
            unit.features[place]: [
                dict(zip(unit.columns[place].classes, row, strict=True)) for row in p.double().mean(0).tolist()
            ]
            for place, p in sorted(likelihood.probabilities(output).items())
        }

    def _decoded(self, name: str, shared: Tensor, private: Tensor, rows: Batch) -> Tensor:
        """Decode latents `(..., row, dim)` to the mean of one modality, on the CPU."""
        output = self.model.decode({"z": shared, "modalities_z": {name: private}}, name)[name]
        return self.model.means(output, name, rows).double().cpu()

    def _nll(self, batch: Batch, request: Request, answers: list[dict[str, Any]], _: torch.Generator) -> None:
        # the same id for all: draws depend on the id and the seed, and must not depend on the other rows
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
                answer.setdefault("values", {})[name] = unit.written(shown[number])

    def _checked(self, name: str, values: Any, number: int) -> Tensor:
        unit, where = self.units[name], f"Row {number}, {name}"
        if unit.features is not None:
            values = unit.parsed(values, where)
        try:
            array = np.asarray(values, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"{where}: expected shape {unit.shape}, got ragged lists or no numbers.") from None
        if array.shape != unit.shape:
            raise ValueError(f"{where}: expected shape {unit.shape}, got {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"{where}: values must be finite, but got NaN or infinity. Leave out what is missing.")
        if unit.dtype == "uint8" and (array.min() < 0 or array.max() > 255):
            raise ValueError(f"{where}: values must be 0 to 255, but got {array.min():g} to {array.max():g}.")
        if unit.scaling == "log1p" and array.min() < 0:
            raise ValueError(f"{where}: values must be 0 or more, but got {array.min():g}.")
        if unit.classes is not None and ((array % 1 != 0).any() or array.min() < 0 or array.max() >= unit.classes):
            raise ValueError(f"{where}: values must be classes 0 to {unit.classes - 1}, but got {array.max():g}.")
        if name in self.counts and ((array % 1 != 0).any() or array.min() < 0):
            wrong = array[(array % 1 != 0) | (array < 0)][0]
            raise ValueError(f"{where}: counts must be whole numbers of 0 or more, but got {wrong:g}.")
        return torch.from_numpy(array)


def _normals(num: int, like: Tensor, generator: torch.Generator) -> Tensor:
    normals = torch.randn(num, 1, like.shape[-1], dtype=like.dtype, device=like.device, generator=generator)
    return normals.expand(num, *like.shape)


def _gaussian(mean: Tensor, log_var: Tensor) -> dict[str, list[float]]:
    return {"mean": mean.tolist(), "variance": log_var.exp().tolist()}
