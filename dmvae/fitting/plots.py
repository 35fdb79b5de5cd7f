"""Pictures of a fitted model and its data, as matplotlib figures."""

from typing import Any

import numpy as np

from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.fitting.fitted import Fitted
from dmvae.report import charts
from dmvae.report.html_report import Figure

_MAX_COLOURS = 20
_MAX_ROWS = 5000


class Plots:
    """Draws what `Fitted.plot` offers; every method returns a figure, which a notebook shows."""

    def __init__(self, fitted: Fitted) -> None:
        self._fitted = fitted

    def curves(self) -> Figure:
        """Draw the loss of training and validation rows by step, in nats per row, and mark the best epoch."""
        history, monitor = self._fitted.history, f"val/{self._fitted.config.training.monitor}"
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, label in (("train/loss", "training rows"), (monitor, "validation rows")):
            if name in history:
                known = history[name].dropna()
                axes.plot(known.index, known.to_numpy(), marker="o" if len(known) < 30 else None, ms=3, label=label)
        if monitor in history:
            axes.axvline(history[monitor].idxmin(), color="0.6", lw=1, label="best epoch")
        axes.set(xlabel="step", ylabel="loss, nats per row (sum over sources)", title="Training")
        axes.legend()
        return figure

    def map(self, data: Any, color: Any = None, method: str | None = None) -> Figure:
        """Draw the shared latents in two dimensions.

        Args:
            data: rows, as in `fit`; the first 5000 are drawn.
            color: a label or number for each row; or `MODALITY/FEATURE`, a column of the data; or a column of `obs`.
            method: `umap` (needs the package umap-learn), `tsne` or `pca` (both need scikit-learn). None: umap if it is
                installed, else tsne.
        """
        latents = self._fitted.latents(data).iloc[:_MAX_ROWS]
        method = _method(method, len(latents))
        flat = _flatten(latents.to_numpy(), method)
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.subplots()
        values, name = self._colour(data, color)
        if values is None:
            axes.scatter(flat[:, 0], flat[:, 1], s=8)
        else:
            _scatter(figure, axes, flat, values[: len(flat)], name)
        axes.set(title=f"The shared latent ({method})", xlabel="first coordinate", ylabel="second coordinate")
        return figure

    def missingness(self, data: Any) -> Figure:
        """Draw which modalities rows have together, the most frequent combination first."""
        rows = self._fitted.read(data).rows
        names = list(self._fitted.modalities)
        nothing = np.zeros(len(rows), dtype=bool)
        table = np.stack([rows.present.get(name, nothing) for name in names], axis=1)
        patterns, counts = np.unique(table, axis=0, return_counts=True)
        first = np.argsort(-counts, kind="stable")[:20]
        shown = [(patterns[place].tolist(), int(counts[place])) for place in first]
        return charts.missing_patterns(names, table.mean(0).tolist(), shown, len(rows)).figure

    def imputed(self, data: Any, target: str) -> Figure:
        """Draw predictions of a modality from the others against its observed values, one point for each value."""
        rows = self._fitted.read(data)
        if target not in rows.rows.data:
            raise ValueError(f"Modality {target!r} is not in data, so predictions have nothing to be compared with.")
        predicted = self._fitted.predict(rows, target)
        here = rows.rows.present[target]
        observed = rows.rows.data[target][here].reshape(int(here.sum()), -1).astype(float)
        guessed = np.asarray(predicted)[here].reshape(observed.shape)
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(observed.ravel(), guessed.ravel().astype(float), ".", ms=3, alpha=0.4, label="one value of one row")
        ends = [float(np.nanmin(observed)), float(np.nanmax(observed))]
        axes.plot(ends, ends, color="C3", lw=1, label="perfect")
        axes.set(title=target, xlabel="observed value", ylabel="predicted from the other modalities")
        axes.legend()
        return figure

    def _colour(self, data: Any, color: Any) -> tuple[np.ndarray | None, str]:
        if color is None:
            return None, ""
        if not isinstance(color, str):
            values = np.asarray(color)
            if len(values) != len(self._fitted.read(data).rows):
                raise ValueError(f"color must have one entry for each row, but got {len(values)}.")
            return values, ""
        if hasattr(data, "obs") and color in data.obs:
            return np.asarray(data.obs[color]), color
        name, _, feature = color.partition("/")
        rows: ObjectRows = self._fitted.read(data)
        known = self._fitted.modalities[name].features if name in self._fitted.modalities else None
        if known is None or feature not in known or name not in rows.rows.data:
            raise ValueError(f"Unknown column {color!r} for color. Write MODALITY/FEATURE, or a column of obs.")
        column = rows.rows.data[name][:, known.index(feature)].astype(float)
        return np.where(rows.rows.present[name], column, np.nan), color


def _method(method: str | None, num_rows: int) -> str:
    if method is None:
        try:
            import umap  # noqa: F401
        except ImportError:
            return "tsne" if num_rows > 30 else "pca"
        return "umap"
    if method not in ("umap", "tsne", "pca"):
        raise ValueError(f"method must be 'umap', 'tsne' or 'pca', but got {method!r}.")
    return method


def _flatten(points: np.ndarray, method: str) -> np.ndarray:
    """Return points in two dimensions."""
    if points.shape[1] == 1:
        return np.repeat(points, 2, axis=1)
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise ImportError(
                "umap-learn not found. Run pip install 'dmvae[umap]', or choose method='tsne'."
            ) from error
        return np.asarray(UMAP(random_state=0).fit_transform(points))
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "pca":
        return np.asarray(PCA(2).fit_transform(points))
    perplexity = min(30, max(1, len(points) // 4))
    return np.asarray(TSNE(random_state=0, init="random", perplexity=perplexity).fit_transform(points))


def _scatter(figure: Figure, axes: Any, flat: np.ndarray, values: np.ndarray, name: str) -> None:
    """Colour points by class, or by number if there are many different ones."""
    texts = np.array([str(value) for value in values])
    different = np.unique(texts)
    if values.dtype.kind == "f" or (len(different) > _MAX_COLOURS and values.dtype.kind in "iu"):
        points = axes.scatter(flat[:, 0], flat[:, 1], s=8, c=values.astype(float), cmap="viridis")
        figure.colorbar(points, label=name)
        return
    for number, label in enumerate(different):
        mine = texts == label
        axes.scatter(flat[mine, 0], flat[mine, 1], s=8, color=f"C{number % 10}", label=label)
    axes.legend(title=name, fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
