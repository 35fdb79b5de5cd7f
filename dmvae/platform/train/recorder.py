"""Where the metrics of a run go: into the outbox for MLflow, and as progress lines to the user."""

import math
from collections.abc import Callable

from dmvae.config.training import TrainingConfig
from dmvae.data.progress import Progress
from dmvae.platform.tracking.outbox import Outbox
from dmvae.training.loop import EpochEnded, MetricsLogged


class Recorder:
    """Records the metrics of a run, on rank 0.

    If the outbox cannot be written, training continues until all workers can stop together, where `raise_fault` is
    called.

    Args:
        config: epochs, and the validation metric to show.
        outbox: takes the metrics.
        log: called with each line for the user.
        total_steps: of the whole run.
        done: steps that are finished already.
    """

    def __init__(
        self, config: TrainingConfig, outbox: Outbox, log: Callable[[str], None], total_steps: int, done: int
    ) -> None:
        self._config, self._outbox, self._log = config, outbox, log
        self._progress = Progress(log, "step", total_steps, "steps", already_done=done)
        self._loss = math.nan
        self._fault: OSError | None = None

    def record(self, event: MetricsLogged) -> None:
        """Record an event's metrics; log a line at the end of an epoch, and every few seconds of a long one."""
        try:
            self._outbox.log_metrics(event.metrics, event.global_step)
        except OSError as error:
            self._fault = error
        self._loss = event.metrics.get("train/loss", self._loss)
        is_due = self._progress.is_due()
        if isinstance(event, EpochEnded) or is_due:
            self._log(self._line(event))

    def raise_fault(self) -> None:
        """Raise the error that kept metrics from being written, if there was one."""
        if self._fault is not None:
            raise self._fault

    def _line(self, event: MetricsLogged) -> str:
        line = f"epoch {event.epoch + 1}/{self._config.epochs}  step {event.global_step}  loss {self._loss:.3f}"
        if isinstance(event, EpochEnded):
            value = event.metrics.get(f"val/{self._config.monitor}", math.nan)
            line += f"  val/{self._config.monitor} {value:.3f}{'*' if event.improved else ' '}"
            line += f" {event.metrics['train/rows_per_second']:,.0f} rows/s"
        return f"{line}  {self._progress.time_left(event.global_step)}"
