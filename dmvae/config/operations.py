"""What `jobs.status` and `jobs.doctor` look at."""

from dmvae.config.section import RunsDir, Section
from dmvae.config.tracking import TrackingConfig


class StatusConfig(Section):
    """The runs and studies that `jobs.status` describes."""

    folder: str = "runs"
    """Folder of one run or study, or of several."""


class DoctorConfig(Section):
    """What `jobs.doctor` checks beside this machine."""

    runs_dir: RunsDir = "runs"
    """Folder of runs, or a URI, that must be writable."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow server that must answer."""
