"""Registered models: what is registered, promoted, embedded and served."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, model_validator

from dmvae.config.evaluation import EvaluationConfig
from dmvae.config.section import Name, Section, Size
from dmvae.config.tracking import TrackingConfig


class RegisterConfig(Section):
    """What one `jobs.register` run registers."""

    run: str
    """A finished run's folder."""
    name: Name
    """Of the registered model; a run's best model becomes its next version."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow that has the run."""


class PromoteConfig(Section):
    """Which version is to be the champion, and on what it has to be better."""

    name: Name
    """Of the registered model."""
    version: Size | None = None
    """The candidate. None: the newest version."""
    dataset: str = ""
    """The dataset that both are judged on: the one that they were trained on."""
    workers: Size = 1
    """Processes of each evaluation."""
    metric: str = "nll"
    """What has to be better: `nll`, paired by row, or a figure of the evaluation, as `coherence/image/text` or
    `imputation/text/rmse`."""
    larger_is_better: bool = False
    """Of a figure other than `nll`."""
    errors: NonNegativeFloat = 2.0
    """Standard errors by which the difference in NLL has to be better."""
    margin: NonNegativeFloat = 0.0
    """By how much a figure other than `nll` has to be better."""
    rollback: bool = False
    """Make the previous champion the champion again, in place of all that."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Split, draws and measures."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow that has the models."""

    @model_validator(mode="after")
    def _check(self) -> "PromoteConfig":
        if not self.rollback and not self.dataset:
            raise ValueError("candidate and champion are judged on a dataset; got none. Set dataset.")
        if self.metric == "nll" and self.larger_is_better:
            raise ValueError("a smaller NLL is better; got larger_is_better with it. Remove it.")
        return self


class EmbedConfig(Section):
    """What one `jobs.embed` run embeds."""

    model: str
    """A registered model (`models:/NAME@champion`) or a run's or a model's folder."""
    dataset: str
    """A dataset's folder or URI."""
    output: str
    """The folder of the Parquet files; the same command goes on with what is there."""
    split: Name | None = None
    """The rows. None: all splits."""
    private: bool = False
    """Also means and log-variances of the private latents."""
    impute: bool = False
    """Also what is missing, predicted from the posteriors' means, in the units of the data."""
    workers: Size = 1
    """Processes; with more than one, Ray actors."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow that has the model."""


class ServeConfig(Section):
    """A Ray Serve application that answers for a registered model."""

    model: str
    """A registered model; with an alias (`models:/NAME@champion`) it is loaded again when the alias moves."""
    host: str = "127.0.0.1"
    """Where it listens; loopback unless told otherwise."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Where it listens."""
    replicas: Size = 1
    """Processes that answer."""
    max_rows: Size = 256
    """Rows of one request, at most."""
    max_megabytes: Annotated[float, Field(gt=0)] = 32.0
    """Size of one request, at most."""
    max_waiting: Size = 64
    """Requests that wait for an answer, at most; beyond that the answer is 503."""
    poll_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How often the alias is looked at."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow that has the model."""
