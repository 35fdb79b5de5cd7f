"""Where runs are recorded."""

from typing import Annotated

from pydantic import AfterValidator, Field

from dmvae.config.section import Name, Section, has_password


def _check_uri(uri: str | None) -> str | None:
    if uri is not None and has_password(uri):
        raise ValueError(
            "a tracking URI in a configuration carries no password, because configurations are recorded; got one "
            "that does. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave `uri` out and put the "
            "whole URI in MLFLOW_TRACKING_URI."
        )
    return uri


class TrackingConfig(Section, hide_input_in_errors=True):
    """The MLflow server and the experiment that a run belongs to.

    Without `uri` the environment's MLFLOW_TRACKING_URI is used and, if that is not set either, `mlflow.db` in the
    working directory.
    """

    experiment: str = Field("dmvae", min_length=1, max_length=500)
    uri: Annotated[str | None, AfterValidator(_check_uri)] = Field(None, min_length=1)
    register_as: Name | None = None
    """Of a registered model whose next version a finished run's best model becomes."""


class SyncConfig(Section):
    """What `jobs.sync` brings into MLflow."""

    folder: str = "runs"
    """A run's folder, or one that holds several."""
