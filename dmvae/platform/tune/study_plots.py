"""Plot a study with Optuna: history, importances, slices, parallel coordinates, Pareto front."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import optuna

from dmvae.config.search import SearchConfig


def draw_plots(config: SearchConfig, study: optuna.Study, folder: Path) -> Path:
    """Write the plots of a finished study as PNG files; return their folder."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from optuna.visualization import matplotlib as plots

    folder.mkdir(exist_ok=True)
    names: list[str] = list(config.objectives) if config.is_multiple else [" + ".join(config.objectives)]
    params = list(config.space)
    for place, name in enumerate(names):
        label = f"{name} (smaller is better)"

        def value(trial: optuna.trial.FrozenTrial, place: int = place) -> float:
            return float(trial.values[place])

        target: dict[str, Any] = {"target": value, "target_name": label}
        end = f"-{name}" if len(names) > 1 else ""
        _save(partial(plots.plot_optimization_history, study, **target), folder / f"history{end}.png", plt)
        _save(partial(plots.plot_param_importances, study, **target), folder / f"importances{end}.png", plt)
        _save(partial(plots.plot_slice, study, params, **target), folder / f"slices{end}.png", plt)
        _save(partial(plots.plot_parallel_coordinate, study, params, **target), folder / f"parallel{end}.png", plt)
    if len(names) in (2, 3):
        _save(lambda: plots.plot_pareto_front(study, target_names=names), folder / "pareto.png", plt)
    return folder


def _save(drawing: Callable[[], Any], file: Path, plt: Any) -> None:
    """Draw and write one plot; skip it where it needs more trials than there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls its own plots experimental
        try:
            axes = drawing()
        except (ValueError, RuntimeError):  # too few trials for importances, or a single value
            return
        figure = getattr(axes, "figure", None) or plt.gcf()
        figure.set_size_inches(max(8, 3 * len(getattr(axes, "flat", [0]))), 6)
        figure.savefig(file, dpi=110, bbox_inches="tight")
        plt.close("all")
