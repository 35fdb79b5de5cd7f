"""The checkpoints of a trial that trains in its own process."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmvae.model.dmvae import DMVAE
from dmvae.platform.folders import LocalFolder
from dmvae.training import checkpoint
from dmvae.training.state import TrainState

BEST = "best"


class TrialCheckpoints:
    """Keeps a trial's newest checkpoint and the model of its best epoch on disk.

    The model is written first: after a kill in between, training repeats the steps that lead to it.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self._folder, self._run = folder, run
        self._weights: DMVAE | None = None
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left)

    def resume(self, state: TrainState, log: Callable[[str], None]) -> list[float]:
        """Load the newest intact checkpoint, if there is one; return the seconds per step of its epochs.

        A damaged one is logged and renamed to `broken_NAME`.
        """
        for folder in reversed(self._checkpoints):
            try:
                seconds = checkpoint.read_report(folder).get("seconds")
                if not isinstance(seconds, list) or not all(isinstance(value, float) for value in seconds):
                    raise checkpoint.CheckpointError(f"Checkpoint {folder}, report: expected a list of seconds.")
                checkpoint.load(state, folder)
            except checkpoint.CheckpointError as error:
                log(f"warning: {error} Skipping it.")
                LocalFolder(folder.with_name(f"broken_{folder.name}")).remove()
                folder.rename(folder.with_name(f"broken_{folder.name}"))
                continue
            return seconds
        return []

    def remember(self, model: DMVAE) -> None:
        """Remember the current weights as the best."""
        if self._weights is None:
            self._weights = DMVAE(model.config).to(model.device, model.dtype)
        self._weights.load_state_dict(model.state_dict())

    def write(self, state: TrainState, seconds: list[float]) -> None:
        """Write the best model, if it is new, then the checkpoint; remove old ones last."""
        if self._weights is not None:
            draft = self._folder / ".weights.partial"
            self._weights.save(draft)
            LocalFolder(self._folder / BEST).put(draft)
            shutil.rmtree(draft)
            self._weights = None
        done = self._checkpoints
        target = self._folder / f"checkpoint_{state.position.epoch:06d}"
        if target not in done:
            checkpoint.save(state, self._run, target, {"seconds": seconds})
        for old in done[:-1]:  # the previous one stays, in case this one is damaged
            shutil.rmtree(old)

    @property
    def _checkpoints(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint_[0-9]*"))
