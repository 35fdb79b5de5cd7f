"""The settings of a search over configurations, which `jobs.search` reads."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from dmvae.config.model import Value
from dmvae.config.section import Duration, Name, RunsDir, Section, Seed, Size
from dmvae.config.training import TrainConfig


class Domain(Section):
    """The values that a searched setting can take: a range from `low` to `high`, or a list of `values`."""

    low: int | float | None = None
    """Smallest value. If `low` and `high` are both whole, whole numbers are drawn; write 1.0 for real numbers."""
    high: int | float | None = None
    """Largest value."""
    log: bool = False
    """Draw uniformly on a log scale."""
    step: int | float | None = None
    """Distance between neighbouring values."""
    values: tuple[Value, ...] | None = None
    """The choices, instead of a range."""
    when: dict[str, Value] = Field(default_factory=dict)
    """Draw this setting only if these other searched settings have these values; otherwise the base
    configuration's value is used."""

    @model_validator(mode="after")
    def _check(self) -> "Domain":
        if self.values is not None:
            if (self.low, self.high, self.log, self.step) != (None, None, False, None):
                raise ValueError("A domain cannot have both a range and `values`. Remove one of them.")
            if len(self.values) == 0 or len({json.dumps(value) for value in self.values}) < len(self.values):
                raise ValueError(f"values must be one or more different values, got {self.values}.")
            return self
        if self.low is None or self.high is None:
            raise ValueError(
                f"A range needs both low and high, got low={self.low}, high={self.high}. Set both, or set `values`."
            )
        if not self.low < self.high:
            raise ValueError(f"low={self.low} must be less than high={self.high}.")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(
                f"A log range must be positive and cannot have a step, got low={self.low}, step={self.step}. "
                "Change them, or remove log."
            )
        if self.step is not None and (self.step <= 0 or (self.is_whole and not isinstance(self.step, int))):
            raise ValueError(f"step must be positive, and whole in a range of whole numbers, got {self.step}.")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Return both ends of the range, or all values: what is checked before a search."""
        return self.values if self.values is not None else (self.low, self.high)


DEFAULT_SPACE = {
    "model.cross": Domain(values=("prior", "posterior")),
    "model.latent_dim": Domain(low=4, high=64, log=True),
    "model.modalities_specific_dim": Domain(low=0, high=8),
    "model.beta": Domain(low=0.25, high=4.0, log=True),
    "model.modalities_specific_betas": Domain(low=0.25, high=16.0, log=True),
    "optim.learning_rate": Domain(low=3e-4, high=1e-2, log=True),
}
"""The space of a search that names none."""


class RetrainConfig(Section):
    """What to do with the best configuration."""

    how: Literal["train", "checkpoint", "none"] = "train"
    """`train` it again in a run of its own; evaluate the trial's `checkpoint`; or do `none` of this."""
    name: Name | None = None
    """Name of that run. None: the name of the search followed by the trial's number."""
    epochs: Size | None = None
    """Epochs of that run. None: as many as a trial."""
    workers: Size | None = None
    """Workers of that run. None: as many as the base configuration."""


class SearchConfig(Section, hide_input_in_errors=True):
    """A search for the best configuration within a budget of trials."""

    name: Name
    """Name of the study: its folder is `runs_dir/name`, and the same name resumes it."""
    base: TrainConfig
    """The configuration that trials modify: a training configuration, or the name of its TOML file beside this one."""
    trials: Size
    """The budget: number of configurations to try; raise it to continue a finished study."""
    space: dict[str, Domain] = Field(default_factory=lambda: dict(DEFAULT_SPACE))
    """What is searched: the path of a setting in the base configuration, and its domain."""
    objectives: tuple[str, ...] = ("imputation_and_nll",)
    """Validation metrics by which trials are compared: imputation_and_nll, imputation, conditional_nll, joint_nll,
    coherence, parameters, seconds_per_step, or another entry of `dmvae.evaluation.search_objectives.OBJECTIVES`.
    Several without `weights`: their Pareto front. With one value, or `weights`, the best trial is the one with the
    lowest joint NLL among those within one standard error of the best value."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Weights of the objectives: trials are compared by the weighted sum (coherence counts negatively)."""
    limits: dict[Literal["parameters", "seconds_per_step"], PositiveFloat] = Field(default_factory=dict)
    """Upper limits; a trial beyond one of them is never the best, and one with too many parameters is not trained."""
    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"
    """How configurations are proposed: tree-structured Parzen estimator, Gaussian process, genetic, random."""
    startup_trials: Size = 6
    """Random trials before tpe or gp proposes."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """What prunes trials: asynchronous successive halving, the median rule, or nothing."""
    grace_epochs: Size | None = None
    """Epochs before a trial can be pruned. None: a quarter of its epochs."""
    reduction: Annotated[int, Field(ge=2, le=10)] = 3
    """asha keeps one in this many trials at each rung."""
    workers_per_trial: Size = 1
    """Workers per trial; `base.workers.num` is for the final run."""
    max_concurrent: Size | None = None
    """Trials at the same time. None: as many as fit on the cluster."""
    gpus_per_trial: Annotated[float, Field(ge=0, le=64)] = 0.0
    """GPUs per single-worker trial; a fraction lets trials share a GPU."""
    start_from: tuple[dict[str, Value], ...] = ()
    """Points to try first, as settings by path; settings left out are drawn."""
    earlier_study: str | None = None
    """Folder of a study whose finished trials the sampler learns from; space and objectives must be the same."""
    judged_rows: Annotated[int, Field(ge=16)] = 512
    """Upper limit of the validation rows that trials are evaluated on."""
    num_draws: Annotated[int, Field(ge=2)] = 200
    """Draws (K) of a trial's NLL."""
    seed: Seed = 0
    """Seed of the proposals."""
    runs_dir: RunsDir = "runs"
    """Folder of all runs and studies."""
    time_budget: Duration | None = None
    """Stop the trials after this much time, such as `3h30m`, and write the best configuration so far; the same command
    resumes. None: no limit."""
    best_so_far: bool = False
    """Only write and show the best configuration of the trials that are finished, also while the search is running."""
    retrain: RetrainConfig = RetrainConfig()
    """What to do with the best configuration."""

    @field_validator("base", mode="before")
    @classmethod
    def _read_base(cls, base: Any) -> Any:
        if not isinstance(base, str | Path):
            return base
        try:
            return tomllib.loads(Path(base).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"base must be a training configuration or the name of its TOML file. Cannot read {base}: {error}."
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
                raise ValueError(f"{path!r}: `when` must name other settings of the space, got {stray}.")
        return dict(_in_order(space)) if space else dict(DEFAULT_SPACE)

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must be one or more different metrics, got {list(self.objectives)}.")
        if self.weights is not None and len(self.weights) != len(self.objectives):
            raise ValueError(
                f"weights must have one entry per objective, got {len(self.weights)} for {list(self.objectives)}."
            )
        if self.is_multiple and self.scheduler != "none":
            raise ValueError(
                f"scheduler={self.scheduler!r} cannot prune trials with several objectives. "
                'Set scheduler = "none", or set weights.'
            )
        if self.is_multiple and self.sampler == "gp" and len(self.objectives) > 3:
            raise ValueError("sampler = 'gp' takes at most three objectives. Use 'nsga2' or 'tpe'.")
        if (self.grace_epochs or 1) > self.base.training.epochs:
            raise ValueError(
                f"grace_epochs={self.grace_epochs} must not exceed base.training.epochs={self.base.training.epochs}."
            )
        for point in self.start_from:
            stray = sorted(point.keys() - self.space.keys())
            if stray:
                raise ValueError(
                    f"start_from names settings that are not in space: {stray}. Remove them, or add them to space."
                )
        if "://" in self.runs_dir:
            raise ValueError(
                f"A search cannot use a URI, got runs_dir={self.runs_dir!r}. Use a folder that all nodes see; "
                "jobs.train accepts a URI with the best.toml that the search writes."
            )
        if self.gpus_per_trial and self.workers_per_trial > 1:
            raise ValueError(
                "gpus_per_trial needs workers_per_trial=1: each of several workers takes one GPU. Remove it."
            )
        return self

    @property
    def is_multiple(self) -> bool:
        """Whether the search has several objectives without weights, so that its result is a Pareto front."""
        return len(self.objectives) > 1 and self.weights is None

    def is_active(self, path: str, chosen: Mapping[str, Value]) -> bool:
        """Return whether a setting is drawn, given the settings drawn before it."""
        return all(chosen.get(other) == value for other, value in self.space[path].when.items())


def _in_order(space: Mapping[str, Domain]) -> list[tuple[str, Domain]]:
    """Sort settings so that each comes after those that its `when` names."""
    ordered: dict[str, Domain] = {}
    while len(ordered) < len(space):
        ready = {path: d for path, d in space.items() if path not in ordered and d.when.keys() <= ordered.keys()}
        if not ready:
            raise ValueError(
                f"`when` is circular among {sorted(space.keys() - ordered.keys())}. Remove one of the conditions."
            )
        ordered |= ready
    return list(ordered.items())


def lay_over(
    base: TrainConfig, chosen: Mapping[str, Value], name: str, modalities: tuple[str, ...] = ()
) -> TrainConfig:
    """Return the base configuration with settings replaced by path, validated.

    A path can lead to one modality of a setting that is one number for all: `model.modalities_specific_dim.image` keeps
    that number for the other modalities. Betas of private latents of dimension 0 are dropped.

    Raises:
        ValidationError: if a path does not exist or a value is invalid.
        ValueError: if a path leads into a value that is not a section.
    """
    tree, everything = base.model_dump(exclude_unset=True), base.model_dump()
    for path, value in chosen.items():
        *parents, last = path.split(".")
        place, known = tree, everything
        for depth, part in enumerate(parents):
            known = known.get(part, {}) if isinstance(known, dict) else {}
            # a default counts if it is a single value
            below = place.get(part, known if isinstance(known, int | float | str) else None)
            if below is None:
                below = {}
            elif isinstance(below, int | float) and modalities and depth == len(parents) - 1:
                below = dict.fromkeys(modalities, below)
            elif not isinstance(below, dict):
                raise ValueError(f"Unknown setting {path!r}: {part} = {below!r} is a value, not a section.")
            place[part] = below
            place = below
        place[last] = value
    if "modalities_specific_dim" in tree.get("model", {}):
        _remove_idle_betas(tree["model"])
    return TrainConfig.model_validate({**tree, "name": name})


def _remove_idle_betas(model: dict[str, Any]) -> None:
    """Drop the betas of private latents of dimension 0 from a model's settings; they would be refused."""
    dims, betas = model["modalities_specific_dim"], model.get("modalities_specific_betas")
    has_any = any(dims.values()) if isinstance(dims, dict) else dims
    if isinstance(betas, dict) and isinstance(dims, dict):
        model["modalities_specific_betas"] = {name: beta for name, beta in betas.items() if dims.get(name) != 0}
    if not has_any:
        model.pop("modalities_specific_betas", None)
