"""Check a search before it starts: is every configuration of the space valid, and do the trials fit on the cluster?"""

from typing import Any

import optuna
from pydantic import ValidationError

from dmvae.config.search import Domain, SearchConfig, lay_over
from dmvae.data.reading.dataset import Dataset
from dmvae.platform.cluster import limits, resources
from dmvae.platform.errors import RunError
from dmvae.platform.tune import study
from dmvae.training.settings import resolve

_CHECKED_POINTS = 16


def check_space(config: SearchConfig, dataset: Dataset) -> None:
    """Check that both ends of every setting, and points drawn at random, give valid configurations.

    Raises:
        ValueError: naming the setting, the values tried and what is wrong.
    """
    modalities = tuple(dataset.manifest.modalities)

    def try_out(chosen: dict[str, Any]) -> None:
        try:
            resolve(lay_over(config.base, chosen, "trial", modalities), dataset)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = ".".join(map(str, first["loc"]))
            reason = "unknown setting" if first["type"] == "extra_forbidden" else first["msg"]
            raise ValueError(f"space: {path}: {reason.removeprefix('Value error, ')} (tried {chosen})") from None
        except ValueError as error:
            raise ValueError(f"space: {error} (tried {chosen})") from None

    for path, domain in config.space.items():
        for value in domain.extremes:
            try_out({**domain.when, path: value})
    sampled = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    for _ in range(_CHECKED_POINTS):
        try_out(study.draw(sampled.ask(), config))
    for point in config.start_from:
        for path, value in point.items():
            domain = config.space[path]
            inside = value in domain.values if domain.values is not None else _is_between(domain, value)
            if not inside:
                raise ValueError(
                    f"start_from: {value!r} is outside the domain of {path!r} in space. Change one of them."
                )


def _is_between(domain: Domain, value: Any) -> bool:
    assert domain.low is not None
    assert domain.high is not None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and domain.low <= value <= domain.high and (isinstance(value, int) or not domain.is_whole)


def max_concurrent(config: SearchConfig) -> int:
    """Return how many trials run at the same time: `max_concurrent`, or as many as fit on the cluster.

    Raises:
        RunError: if `max_concurrent` trials, or a single one, do not fit.
    """
    workers, gpus = config.base.workers, config.gpus_per_trial
    cpus, there = workers.num * workers.cpus, limits()
    if workers.device == "auto" and not gpus:
        there["GPU"] = resources().get("GPU", 0.0)  # an autoscaler starts GPU nodes only on request
    if workers.num > 1 and workers.device != "cpu" and there.get("GPU", 0) >= workers.num:
        gpus = float(workers.num)
    room = there.get("CPU", 0) / cpus
    if gpus:
        room = min(room, there.get("GPU", 0) / gpus)
    room = int(min(room + 1e-9, max(config.trials, config.max_concurrent or 1)))
    wanted = config.max_concurrent or max(room, 1)
    if wanted > room:
        raise RunError(
            f"max_concurrent={wanted} does not fit: the cluster has room for {room} trials of {cpus:g} CPUs and "
            f"{gpus:g} GPUs each ({there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs in all). "
            "Lower max_concurrent or base.workers, or enlarge the cluster."
        )
    return wanted
