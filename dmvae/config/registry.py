"""Settings for registering, promoting, serving and embedding with a registered model."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, model_validator

from dmvae.config.evaluation import EvaluationConfig
from dmvae.config.section import Name, Section, Size, Trust
from dmvae.config.tracking import TrackingConfig


class RegisterConfig(Section):
    """Settings of `jobs.register`."""

    run: str
    """Folder of a finished run."""
    name: Name
    """Name of the registered model; the best model of the run becomes its next version."""
    trust: Trust = ()
    """Packages of your own code that the model may import; others that it names are refused."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow server that recorded the run."""


class PromoteConfig(Section):
    """Settings of `jobs.promote`: the candidate, and how it must be better than the champion."""

    name: Name
    """Name of the registered model."""
    version: Size | None = None
    """Version to promote, the candidate. None: the newest."""
    dataset: str = ""
    """Dataset on which candidate and champion are evaluated; it must be the one they were trained on."""
    workers: Size = 1
    """Processes of each evaluation; with more than one, Ray actors."""
    metric: str = "nll"
    """Metric that must be better: `nll`, paired by row, or another metric of the evaluation, such as
    `coherence/image/text` or `imputation/text/rmse`."""
    larger_is_better: bool = False
    """Whether larger values of a metric other than `nll` are better."""
    errors: NonNegativeFloat = 2.0
    """Number of standard errors by which the NLL must be better."""
    margin: NonNegativeFloat = 0.0
    """Amount by which a metric other than `nll` must be better."""
    rollback: bool = False
    """Make the previous champion the champion again, without an evaluation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Split, draws and measures of the evaluation."""
    trust: Trust = ()
    """Packages of your own code that the model may import; others that it names are refused."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow server that has the registered model."""

    @model_validator(mode="after")
    def _check(self) -> "PromoteConfig":
        if not self.rollback and not self.dataset:
            raise ValueError(
                "dataset must be set, unless rollback is. Set it to the dataset that the models were trained on."
            )
        if self.metric == "nll" and self.larger_is_better:
            raise ValueError("larger_is_better cannot be used with metric='nll': a smaller NLL is better. Remove it.")
        return self


class EmbedConfig(Section):
    """Settings of `jobs.embed`."""

    model: str
    """Registered model (`models:/NAME@champion`), or folder of a run or a model."""
    dataset: str
    """Folder of the dataset, or its URI."""
    output: str
    """Folder for the Parquet files; the same command resumes from it."""
    split: Name | None = None
    """Split to embed. None: all splits."""
    private: bool = False
    """Also write the means and log-variances of the private latents."""
    impute: bool = False
    """Also write missing modalities, predicted from the means of the posteriors, in the units of the original data."""
    workers: Size = 1
    """Processes; with more than one, Ray actors. Results do not depend on it."""
    trust: Trust = ()
    """Packages of your own code that the model may import; others that it names are refused."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow server that has the registered model."""


class ServeConfig(Section):
    """Settings of `jobs.serve`."""

    model: str
    """Registered model; with an alias (`models:/NAME@champion`), the new version is loaded when the alias moves."""
    host: str = "127.0.0.1"
    """Address to listen on; by default only this machine can connect."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Port to listen on."""
    replicas: Size = 1
    """Processes that answer requests."""
    max_rows: Size = 256
    """Largest number of rows in a request."""
    max_megabytes: Annotated[float, Field(gt=0)] = 32.0
    """Largest size of a request, in megabytes."""
    body_seconds: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Longest time for a client to send a request, in seconds."""
    max_waiting: Size = 64
    """Largest number of waiting requests; further requests get status 503."""
    poll_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two checks of the alias."""
    trust: Trust = ()
    """Packages of your own code that the model may import; others that it names are refused."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow server that has the registered model."""
