"""Where runs are recorded in MLflow."""

from typing import Annotated

from pydantic import AfterValidator, Field

from dmvae.config.section import Name, Section, has_password


def _check_uri(uri: str | None) -> str | None:
    if uri is not None and has_password(uri):
        raise ValueError(
            "The tracking URI contains a password, and configurations are recorded. Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD instead, or remove `uri` and put the whole URI in MLFLOW_TRACKING_URI."
        )
    return uri


class TrackingConfig(Section, hide_input_in_errors=True):
    """The MLflow server and the experiment of a run.

    Without `uri`, MLFLOW_TRACKING_URI is used; without both, `mlflow.db` in the working directory.
    """

    experiment: str = Field("dmvae", min_length=1, max_length=500)
    uri: Annotated[str | None, AfterValidator(_check_uri)] = Field(None, min_length=1)
    register_as: Name | None = None
    """Register the best model of a finished run as the next version of this registered model."""


class SyncConfig(Section):
    """What `jobs.sync` delivers to MLflow."""

    folder: str = "runs"
    """Folder of one run or of several."""
    tracking: TrackingConfig = TrackingConfig()
    """With `uri`, every run goes there; without, runs that name another server than the configured one stay."""
