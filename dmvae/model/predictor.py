"""Predictions in the units of the data: from rows as JSON to latents, reconstructions, imputations and NLLs.

It needs torch, pydantic, numpy and safetensors only, so that registered models can be served without anything else.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, create_model
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.data.records import read_record
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.distributions.likelihoods.columns import Columns
from dmvae.model.dmvae import DMVAE
from dmvae.model.modality_spec import ModalitySpec as ModalitySpec

UNITS = "units.json"
Operation = Literal["encode", "reconstruct", "impute", "nll", "sample"]
OPERATIONS: tuple[Operation, ...] = ("encode", "reconstruct", "impute", "nll", "sample")
MAX_DRAWS = 100_000
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the draws of imputed values."""


def row_type(shapes: Mapping[str, Sequence[int]], named: Collection[str] = ()) -> type[BaseModel]:
    """Return the type of one row: modalities and cells may be left out or null, and unknown names are refused.

    Values of the modalities in `named` are a list, or an object by the names of their features.
    """
    fields: dict[str, Any] = {}
    for name, shape in shapes.items():
        if name in named:
            fields[name] = (list[Any] | dict[str, Any] | None, None)
            continue
        nested: Any = float | None if shape else float
        for _ in shape:
            nested = list[nested]
        fields[name] = (nested | None, None)
    # strict: no text and no booleans in place of numbers
    return create_model("Row", __config__=ConfigDict(extra="forbid", strict=True), **fields)


_LARGEST = 1e15


class Request(BaseModel):
    """The operation to apply to rows, and its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    operation: Operation = "impute"
    """`encode`, `reconstruct` observed modalities, `impute` missing ones, `nll`, or `sample` from the prior."""
    num_samples: int = Field(0, ge=0, le=1000)
    """Draws of the mean that `impute` returns beside mean and standard deviation."""
    num_draws: PositiveInt = Field(100, ge=2, le=MAX_DRAWS)
    """Draws for the mean, standard deviation and quantiles of `impute`; decoder rows per modality of `nll`."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the draws."""


def read_units(folder: Path) -> dict[str, ModalitySpec]:
    """Return the modalities of a registered model, from its `units.json`.

    Raises:
        RecordError: if it is not valid.
        FileNotFoundError: if it is absent.
    """
    remedy = "Register the run again."
    units: dict[str, ModalitySpec] | None = read_record(folder / UNITS, dict[str, ModalitySpec], remedy)
    if units is None:
        raise FileNotFoundError(f"Model not found: {folder} has no {UNITS}. {remedy}")
    return units


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
        specs, model = read_units(folder), DMVAE.load(folder, trust=trust)
        if specs.keys() != set(model.config.modalities):
            raise ValueError(
                f"{folder / UNITS} describes {list(specs)}, but the model has {list(model.config.modalities)}."
            )
        return cls(model, specs)

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
            given = self._given(name, rows)
            known = ~given.isnan()
            # in float64, since values with a large mean must be scaled before they lose digits
            wide, dtype = (torch.float64, torch.float32) if unit.classes is None else (torch.int64, torch.int64)
            values = unit.read(given.nan_to_num(nan=0).to(wide), dtype)
            data[name] = torch.where(known, values, 0)
            self._check_range(name, data[name])
            masks[name] = known if name in self.model.config.missing_cells else known.flatten(1).any(1)
        return Batch(data, masks, size_factors=self._size_factors(rows))

    def _given(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return the values of a modality in the data's units, in float64; NaN where a row lacks them."""
        given = torch.full((len(rows), *self.units[name].shape), math.nan, dtype=torch.float64)
        for number, row in enumerate(rows):
            if row[name] is not None:
                given[number] = self._checked(name, row[name], number)
        return given

    def _check_range(self, name: str, values: Tensor) -> None:
        """Check that scaled values can be squared and summed in float32."""
        wrong = ~(values.abs().flatten(1) < _LARGEST).all(1) if values.is_floating_point() else torch.zeros(0)
        if wrong.any():
            raise ValueError(
                f"Row {int(wrong.nonzero()[0])}, {name}: values must be below {_LARGEST:g} in units of the model's "
                f"scaling. Correct them, or leave them out."
            )

    def _size_factors(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        if not self.counts:
            return None
        for number, row in enumerate(rows):
            found = row["size_factor"]
            if found is not None and not 1 / _LARGEST < found < _LARGEST:
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
            {"observed": [name for name in self.units if bool(has(batch, name)[number])]}
            for number in range(len(parsed))
        ]
        if answers:
            generator = torch.Generator(device=self.model.device).manual_seed(request.seed)
            if request.operation == "impute":
                self._impute(batch, parsed, request, answers, generator)
            else:
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
        self,
        batch: Batch,
        parsed: Sequence[Mapping[str, Any]],
        request: Request,
        answers: list[dict[str, Any]],
        generator: torch.Generator,
    ) -> None:
        """Impute modalities and cells, given everything else that the row has; cells that it has keep their values.

        All rows have the same normal draws, so that answers do not depend on the other rows.
        """
        drawn, middle = self._latents(batch, max(request.num_draws, request.num_samples), request.seed, generator)
        for answer in answers:
            answer["imputed"] = {}
        for name, unit in self.units.items():
            given = self._given(name, parsed)
            missing = given.isnan().flatten(1).any(1).nonzero().squeeze(1).tolist()
            if not missing:
                continue
            rows, given = batch[torch.tensor(missing)], given[missing]
            known, classes = ~given.isnan(), self.model.likelihoods[name].classes
            if classes is not None:
                known, given = known.unsqueeze(-1), _one_hot(given, classes)
            output = self._output(name, drawn[""][:, missing], drawn[name][:, missing])
            draws = unit.show(self.model.means(output, name, rows).double().cpu())
            best = unit.show(self._decoded(name, middle[""][missing], middle[name][missing], rows))
            quantiles = self._quantiles(name, output, rows, request.seed)
            draws, best = (torch.where(known, given, values) for values in (draws, best))
            quantiles = {share: torch.where(known, given, values) for share, values in quantiles.items()}
            mean, sd = draws.mean(0), draws.std(0)
            by_class = self._class_probabilities(name, drawn[""][:, missing], drawn[name][:, missing])
            for place, number in enumerate(missing):
                told = {
                    "mean": unit.numbers(mean[place]),
                    "sd": unit.numbers(sd[place]),
                    "best": unit.written(best[place]),
                }
                if quantiles:
                    told["quantiles"] = {share: unit.numbers(values[place]) for share, values in quantiles.items()}
                if by_class:
                    told["probabilities"] = {column: p[place] for column, p in by_class.items()}
                if request.num_samples:
                    told["samples"] = [unit.written(draw) for draw in draws[: request.num_samples, place]]
                answers[number]["imputed"][name] = told

    def _latents(
        self, batch: Batch, num: int, seed: int, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return draws `(draw, row, dim)` of the shared (``""``) and each private latent, and their means.

        They are of the encoders' posteriors, and where a row has nothing to tell of the fitted prior, if there is one;
        or of a fit to each row's posterior where rows may have any pattern of cells.
        """
        if self.model.config.missing_cells:
            alike = replace(batch, ids=torch.zeros(len(batch), dtype=torch.int64))
            found = self.model.draw_posterior(alike, num, seed)
            drawn = {"": found.z, **found.modalities_z}
            return drawn, {name: draws.mean(0) for name, draws in drawn.items()}
        with torch.no_grad():
            shared, private = self.model.posteriors(batch)
        latents = {"": shared, **private}
        noise = {name: _normals(num, gaussian.mean, generator) for name, gaussian in latents.items()}
        drawn = {name: gaussian.sample(noise[name]) for name, gaussian in latents.items()}
        means = {name: gaussian.mean.clone() for name, gaussian in latents.items()}
        if self.model.fitted_prior is not None:
            observed = {name: has(batch, name) for name in self.units}
            _fill_in(self.model.fitted_prior, observed, noise, drawn, means, generator)
        return drawn, means

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

    def _quantiles(self, name: str, output: Tensor, rows: Batch, seed: int) -> dict[str, Tensor]:
        """Return quantiles `(row, *shape)` of draws of the values, whose spread includes the noise; none of classes.

        Every row has the same random numbers, so that answers do not depend on the other rows.
        """
        if self.units[name].classes is not None:
            return {}
        parts = []
        for place in range(len(rows)):
            generator = torch.Generator(device=self.model.device).manual_seed(seed)
            own = self.model.draw_values(output[:, place : place + 1], name, rows[place], generator)
            parts.append(self.units[name].show(own.double().cpu()))
        draws = torch.cat(parts, dim=1)
        return {f"{share:g}": draws.quantile(share, dim=0, interpolation="nearest") for share in QUANTILES}

    def _output(self, name: str, shared: Tensor, private: Tensor) -> Tensor:
        """Decode latents `(..., row, dim)` to the output of one modality's decoder."""
        output: Tensor = self.model.decode({"z": shared, "modalities_z": {name: private}}, name)[name]
        return output

    def _decoded(self, name: str, shared: Tensor, private: Tensor, rows: Batch) -> Tensor:
        """Decode latents `(..., row, dim)` to the mean of one modality, on the CPU."""
        return self.model.means(self._output(name, shared, private), name, rows).double().cpu()

    def _nll(self, batch: Batch, request: Request, answers: list[dict[str, Any]], _: torch.Generator) -> None:
        # the same id for all: draws depend on the id and the seed, and must not depend on the other rows
        batch = replace(batch, ids=torch.zeros(len(batch), dtype=torch.int64))
        found = self.model.joint_nll(batch, request.num_draws, seed=request.seed)
        cells = batch.cells or {}
        jacobians = {
            name: unit.log_jacobian(batch.data[name], cells.get(name)).tolist() for name, unit in self.units.items()
        }
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
            if not _has_numbers(values):
                raise TypeError
            array = np.asarray(values, dtype=np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"{where}: expected shape {unit.shape}, got ragged lists or no numbers.") from None
        if array.shape != unit.shape:
            raise ValueError(f"{where}: expected shape {unit.shape}, got {array.shape}.")
        known = ~np.isnan(array)
        if not known.all() and name not in self.model.config.missing_cells:
            raise ValueError(
                f"{where}: values must be finite, but got NaN or null. The model was trained on rows that have all "
                f"cells of {name!r}: leave out the modality."
            )
        if np.isinf(array).any():
            raise ValueError(f"{where}: values must be finite, but got infinity. Set a missing one to null.")
        checked = array[known]
        if not len(checked):
            return torch.from_numpy(array)
        low, high, is_whole = checked.min(), checked.max(), not (checked % 1).any()
        if unit.dtype == "uint8" and (low < 0 or high > 255):
            raise ValueError(f"{where}: values must be 0 to 255, but got {low:g} to {high:g}.")
        if unit.scaling == "log1p" and low < 0:
            raise ValueError(f"{where}: values must be 0 or more, but got {low:g}.")
        if unit.classes is not None and (not is_whole or low < 0 or high >= unit.classes):
            raise ValueError(f"{where}: values must be classes 0 to {unit.classes - 1}, but got {high:g}.")
        if name in self.counts and (not is_whole or low < 0):
            wrong = checked[(checked % 1 != 0) | (checked < 0)][0]
            raise ValueError(f"{where}: counts must be whole numbers of 0 or more, but got {wrong:g}.")
        return torch.from_numpy(array)


def _one_hot(given: Tensor, classes: int) -> Tensor:
    """Return classes, NaN where they are missing, as probabilities in a last dimension."""
    return torch.eq(given.unsqueeze(-1), torch.arange(classes)).double()


def _has_numbers(values: Any) -> bool:
    """Return whether nested lists hold neither text nor booleans, which numpy would take for numbers."""
    if isinstance(values, list | tuple):
        return all(map(_has_numbers, values))
    return not isinstance(values, str | bytes | bool)


def is_finite(answer: Any) -> bool:
    """Return whether every number in an answer is finite."""
    if isinstance(answer, float):
        return math.isfinite(answer)
    if isinstance(answer, dict):
        return all(map(is_finite, answer.values()))
    return not isinstance(answer, list) or all(map(is_finite, answer))


def _normals(num: int, like: Tensor, generator: torch.Generator) -> Tensor:
    normals = torch.randn(num, 1, like.shape[-1], dtype=like.dtype, device=like.device, generator=generator)
    return normals.expand(num, *like.shape)


def _fill_in(
    prior: FittedPrior,
    observed: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    drawn: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    generator: torch.Generator,
) -> None:
    """Put draws and means of a fitted prior in the place of the standard normal's, with one noise for all rows."""

    def uniform(like: Tensor) -> Tensor:
        one = torch.rand(len(like), 1, dtype=torch.float64, device=generator.device, generator=generator)
        return one.expand(like.shape[:2])

    nothing = ~torch.stack(list(observed.values())).any(0)
    choice = uniform(drawn[""])
    # z_s given nothing: a draw from the mixture itself
    known = drawn[""][:, nothing, :0]
    drawn[""][:, nothing] = prior.shared.transform(known, choice[:, nothing], noise[""][:, nothing])
    means[""][nothing] = prior.shared.mean.to(means[""])
    for name, here in observed.items():
        choice, known = uniform(drawn[name]), drawn[""][:, ~here]
        drawn[name][:, ~here] = prior.joint[name].transform(known, choice[:, ~here], noise[name][:, ~here])
        means[name][~here] = prior.private(name, means[""][~here], return_mean=True)


def _gaussian(mean: Tensor, log_var: Tensor) -> dict[str, list[float]]:
    return {"mean": mean.tolist(), "variance": log_var.exp().tolist()}
