"""A search over configurations: what `jobs.search` reads."""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from dmvae.config.section import Name, RunsDir, Section, Seed, Size
from dmvae.config.training import TrainConfig

Objective = Literal["imputation", "conditional_nll", "joint_nll", "coherence", "parameters", "seconds_per_step"]
Value = bool | int | float | str | None | list[Any] | dict[str, Any]
MAXIMISED: frozenset[str] = frozenset({"coherence"})
"""Objectives of which more is better."""


class Domain(Section):
    """The values that one setting may take: `low` to `high`, or one of `values`."""

    low: int | float | None = None
    """Smallest value; whole numbers are drawn where `low` and `high` are both whole (write 1.0 for others)."""
    high: int | float | None = None
    """Largest value."""
    log: bool = False
    """Draw uniformly in the logarithm."""
    step: int | float | None = None
    """Distance between the values that are drawn."""
    values: tuple[Value, ...] | None = None
    """Drawn from as they are, in place of a range."""
    when: dict[str, Value] = Field(default_factory=dict)
    """Settings that are searched too, and the value that each must have for this one to be drawn; elsewhere it is the
    base configuration's."""

    @model_validator(mode="after")
    def _check(self) -> "Domain":
        if self.values is not None:
            if (self.low, self.high, self.log, self.step) != (None, None, False, None):
                raise ValueError("a domain is a range or `values`, not both. Remove one of them.")
            if len(self.values) == 0 or len({json.dumps(value) for value in self.values}) < len(self.values):
                raise ValueError(f"values are different from each other, and one at least; got {self.values}.")
            return self
        if self.low is None or self.high is None:
            raise ValueError(f"a range has low and high; got low={self.low}, high={self.high}. Or name `values`.")
        if not self.low < self.high:
            raise ValueError(f"a range is not empty; got low={self.low}, high={self.high}. Raise high.")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(
                f"a logarithmic range is positive and has no step; got low={self.low}, step={self.step}. "
                "Change them, or leave log out."
            )
        if self.step is not None and (self.step <= 0 or (self.is_whole and not isinstance(self.step, int))):
            raise ValueError(f"step is positive, and whole in a range of whole numbers; got {self.step}.")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether the range is of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Return what a check tries: both ends of a range, or every value."""
        return self.values if self.values is not None else (self.low, self.high)


DEFAULT_SPACE = {
    "model.latent_dim": Domain(low=4, high=64, log=True),
    "model.modalities_specific_dim": Domain(low=1, high=16, log=True),
    "model.beta": Domain(low=0.25, high=4.0, log=True),
    "model.modalities_specific_betas": Domain(low=0.25, high=4.0, log=True),
    "optim.learning_rate": Domain(low=3e-4, high=1e-2, log=True),
}
"""Searched when nothing is named."""


class RetrainConfig(Section):
    """What becomes of the best configuration."""

    how: Literal["train", "checkpoint", "none"] = "train"
    """`train` it again in a run of its own, with as many workers as asked; take the trial's `checkpoint` and judge it;
    or `none` of this."""
    name: Name | None = None
    """Of that run. None: the search's, followed by the trial's number."""
    epochs: Size | None = None
    """Of that run. None: as many as a trial's."""
    workers: Size | None = None
    """Of that run. None: as many as the base has."""


class SearchConfig(Section, hide_input_in_errors=True):
    """A search from a base configuration to the best one that the budget finds."""

    name: Name
    """Of the study: its folder is `runs_dir/name`, and the same name goes on with it."""
    base: TrainConfig
    """What every trial starts from: a training configuration, or the name of its TOML file beside this one."""
    trials: Size
    """The budget: how many configurations are tried in all; a finished study goes on when this grows."""
    space: dict[str, Domain] = Field(default_factory=lambda: dict(DEFAULT_SPACE))
    """What is searched: a setting's path in the base configuration, and its domain. Default: the shared and the private
    dimension, both betas and the learning rate."""
    objectives: tuple[Objective, ...] = ("imputation",)
    """Figures of the validation split by which trials are compared. Several, without `weights`: their Pareto front."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Of the objectives, in their order: the weighted sum is what is compared (coherence enters it negatively)."""
    limits: dict[Literal["parameters", "seconds_per_step"], PositiveFloat] = Field(default_factory=dict)
    """Largest values; a trial beyond one of them is never the best, and one with too many parameters is not trained."""
    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"
    """How configurations are proposed: tree-structured Parzen estimator, Gaussian process, genetic, or at random."""
    startup_trials: Size = 6
    """Drawn at random before the sampler proposes; of tpe and gp."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """What stops trials early: asynchronous successive halving, the median rule, or nothing."""
    grace_epochs: Size | None = None
    """Epochs before a trial may be stopped. None: a quarter of them."""
    reduction: Annotated[int, Field(ge=2, le=10)] = 3
    """Of asha: one in so many trials goes on at each rung."""
    workers_per_trial: Size = 1
    """Processes that train one trial; `base.workers.num` is of the best configuration's own run."""
    max_concurrent: Size | None = None
    """Trials at a time. None: as many as the cluster has room for."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs of a trial with one worker; a fraction lets trials share one."""
    start_from: tuple[dict[str, Value], ...] = ()
    """Points to try first: settings by path; what is left out is drawn."""
    earlier_study: str | None = None
    """A study's folder whose finished trials the sampler learns from; it must have the same space and objectives."""
    judged_rows: Annotated[int, Field(ge=16)] = 512
    """Rows of the validation split that trials are judged on, at most."""
    num_draws: Annotated[int, Field(ge=2)] = 200
    """Decoder rows per modality and row of a trial's NLL."""
    seed: Seed = 0
    """Of the proposals."""
    runs_dir: RunsDir = "runs"
    """The folder of all runs and studies."""
    retrain: RetrainConfig = RetrainConfig()
    """What becomes of the best configuration."""

    @field_validator("base", mode="before")
    @classmethod
    def _read_base(cls, base: Any) -> Any:
        if not isinstance(base, str | Path):
            return base
        try:
            return tomllib.loads(Path(base).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"base is a training configuration or the name of its TOML file; {base}: {error}"
            ) from None

    @classmethod
    def located(cls, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return a TOML file's content, `base` being read from the file's folder if it names a file."""
        base = tree.get("base")
        return {**tree, "base": str(folder / base)} if isinstance(base, str) else tree

    @field_validator("space", mode="after")
    @classmethod
    def _check_space(cls, space: dict[str, Domain]) -> dict[str, Domain]:
        for path, domain in space.items():
            stray = [other for other in domain.when if other not in space or other == path]
            if stray:
                raise ValueError(f"`when` names other settings that are searched; {path!r} names {stray}.")
        return dict(_in_order(space)) if space else dict(DEFAULT_SPACE)

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives are one or more different figures; got {list(self.objectives)}.")
        if self.weights is not None and len(self.weights) != len(self.objectives):
            raise ValueError(f"there is a weight for every objective; got {len(self.weights)} for {self.objectives}.")
        if self.is_multiple and self.scheduler != "none":
            raise ValueError(
                f"a trial is stopped early by one figure; got scheduler={self.scheduler!r} with several objectives. "
                'Set scheduler = "none", or give weights.'
            )
        if self.is_multiple and self.sampler == "gp" and len(self.objectives) > 3:
            raise ValueError("the Gaussian process takes at most three objectives. Use sampler = 'nsga2' or 'tpe'.")
        if (self.grace_epochs or 1) > self.base.training.epochs:
            raise ValueError(
                f"grace_epochs is at most a trial's epochs, {self.base.training.epochs}; got {self.grace_epochs}."
            )
        for point in self.start_from:
            stray = sorted(point.keys() - self.space.keys())
            if stray:
                raise ValueError(f"start_from gives values of settings that are searched; got {stray}.")
        if "://" in self.runs_dir:
            raise ValueError(
                f"a study keeps its trials in a folder that all nodes see; got runs_dir={self.runs_dir!r}. Name a "
                "folder; jobs.train takes best.toml with a URI."
            )
        if self.gpus_per_trial and self.workers_per_trial > 1:
            raise ValueError(
                "gpus_per_trial is of trials with one worker; each of several workers takes one. Remove it."
            )
        return self

    @property
    def is_multiple(self) -> bool:
        """Whether the result is a Pareto front."""
        return len(self.objectives) > 1 and self.weights is None

    def signed(self, figures: Mapping[str, float]) -> tuple[float, ...]:
        """Return what is minimised: the objectives, or their weighted sum, with those that are maximised negated."""
        values = [-figures[name] if name in MAXIMISED else figures[name] for name in self.objectives]
        if self.is_multiple:
            return tuple(values)
        return (math.fsum(w * v for w, v in zip(self.weights or (1.0,), values, strict=True)),)

    def is_active(self, path: str, chosen: Mapping[str, Value]) -> bool:
        """Tell whether a setting is drawn, given what is drawn before it."""
        return all(chosen.get(other) == value for other, value in self.space[path].when.items())


def _in_order(space: Mapping[str, Domain]) -> list[tuple[str, Domain]]:
    """Put every setting after those that its `when` names."""
    ordered: dict[str, Domain] = {}
    while len(ordered) < len(space):
        ready = {path: d for path, d in space.items() if path not in ordered and d.when.keys() <= ordered.keys()}
        if not ready:
            raise ValueError(f"`when` does not go round in a circle; got {sorted(space.keys() - ordered.keys())}.")
        ordered |= ready
    return list(ordered.items())


def lay_over(
    base: TrainConfig, chosen: Mapping[str, Value], name: str, modalities: tuple[str, ...] = ()
) -> TrainConfig:
    """Return the base configuration with settings changed by path, validated.

    A path may go on below a number that holds for all modalities: `model.beta` stays one number, and
    `model.modalities_specific_dim.image` gives every other modality the number that held for all.

    Raises:
        ValidationError: if a path does not exist or a value breaks a law.
        ValueError: if a path leads into a value that has no parts.
    """
    tree, everything = base.model_dump(exclude_unset=True), base.model_dump()
    for path, value in chosen.items():
        *parents, last = path.split(".")
        place, known = tree, everything
        for depth, part in enumerate(parents):
            known = known.get(part, {}) if isinstance(known, dict) else {}
            # a default counts where it is one value
            below = place.get(part, known if isinstance(known, int | float | str) else None)
            if below is None:
                below = {}
            elif isinstance(below, int | float) and modalities and depth == len(parents) - 1:
                below = dict.fromkeys(modalities, below)
            elif not isinstance(below, dict):
                raise ValueError(
                    f"a searched setting exists; {path!r} leads into {part} = {below!r}, which has no parts."
                )
            place[part] = below
            place = below
        place[last] = value
    return TrainConfig.model_validate({**tree, "name": name})
