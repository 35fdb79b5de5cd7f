"""Charts of a trained model: training curves, latent maps, NLL diagnostics, coherence and missingness."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmvae.data.batch import Batch, has
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.latents import Latents
from dmvae.evaluation.masking import mask_modalities
from dmvae.evaluation.standings import standings
from dmvae.model.dmvae import DMVAE
from dmvae.model.nll.estimate import KHAT_LIMIT, NLLEstimate
from dmvae.report.html_report import Figure, Picture, is_image


def training_curves(metrics_file: Path) -> Picture:
    """Draw the losses and the divergences of a run."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in metrics_file.read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.get("metrics", {}).items():
            curves.setdefault(name, []).append((entry["step"], value))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ("train/loss", "val/loss")), (right, _divergences(curves))):
        for name in names:
            points = sorted(curves.get(name, []))
            marker = "o" if len(points) < 30 else None
            axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, markersize=3, label=_plain(name))
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    left.set(title="loss, smaller is better", ylabel="nats per row, sum over sources")
    right.set(title="information in the latents (validation)", ylabel="divergence from the prior, nats per row")
    text = (
        "A validation loss that rises while the training loss falls indicates overfitting. A divergence near 0 "
        "indicates an unused latent."
    )
    return Picture("curves", "Training", text, figure)


def latent_map(latents: Latents, max_rows: int = 1000, label_name: Callable[[int], str] = str) -> Picture:
    """Draw z_s in two dimensions, coloured by label: principal components and t-SNE."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    z, here = latents.block("shared")
    points = z[:max_rows].numpy()
    labels = np.zeros(len(points)) if latents.labels is None else latents.labels[here][:max_rows].numpy()
    figure = Figure(figsize=(11, 5), layout="constrained")
    maps = [("principal components", PCA(2).fit_transform(points) if points.shape[1] > 1 else points.repeat(2, 1))]
    if len(points) > 30:
        maps.append(
            ("t-SNE", TSNE(random_state=0, init="random", perplexity=min(30, len(points) // 4)).fit_transform(points))
        )
    for axes, (title, flat) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps, strict=True):
        for number, label in enumerate(np.unique(labels)):
            mine = labels == label
            colour = f"C{number % 10}"
            name = "no label" if label < 0 or latents.labels is None else label_name(int(label))
            axes.scatter(flat[mine, 0], flat[mine, 1], s=9, color=colour, label=name)
        axes.set(title=title, xlabel="first coordinate (no unit)", ylabel="second coordinate (no unit)")
    axes.legend(title="label", fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    text = "Each point is the posterior mean of z_s of one row. If labels are shared content, colours should separate."
    return Picture("map", "The shared latent by label", text, figure)


def weight_diagnostics(estimate: NLLEstimate) -> Picture:
    """Draw how reliable the standard errors of the NLL are."""
    khat, ess = estimate.khat.cpu().numpy(), estimate.ess.cpu().numpy()
    figure = Figure(figsize=(11, 4), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    first.hist(khat[np.isfinite(khat)], bins=25, color="C0")
    first.axvline(KHAT_LIMIT, color="C3", label=f"above {KHAT_LIMIT}: unreliable")
    first.set(title="Pareto k-hat", xlabel="k-hat of a row's weights", ylabel="rows")
    first.legend(fontsize=7)
    if not np.isfinite(khat).any():
        first.text(0.5, 0.5, "too few draws for k-hat", ha="center", transform=first.transAxes)
    second.hist(ess, bins=np.geomspace(max(1.0, ess.min() / 1.1), max(2.0, 1.1 * ess.max()), 25), color="C0")
    second.set(title="effective sample size", xscale="log", xlabel="effective draws of a row", ylabel="rows")
    trusted = estimate.trusted.cpu().numpy()
    for mine, colour, label in ((trusted, "C0", "reliable"), (~trusted, "C3", "unreliable")):
        third.scatter(estimate.nll.cpu().numpy()[mine], estimate.se.cpu().numpy()[mine], s=9, color=colour, label=label)
    third.set(title="error of each row", xlabel="NLL, nats", ylabel="Monte Carlo standard error, nats")
    third.legend(fontsize=8, loc="upper right")
    text = (
        f"{len(trusted)} rows, {int((~trusted).sum())} of them with an unreliable error estimate. The NLL is an "
        "average of importance weights: k-hat measures how heavy the tail of a row's weights is, and the effective "
        "sample size how many draws carry the average."
    )
    return Picture("weights", "Reliability of the NLL estimate", text, figure)


def coherence_matrix(metrics: Mapping[str, float]) -> Picture:
    """Draw coherence from each set of modalities to each other one, and its upper limit in the last line."""
    cells = {tuple(key.split("/")[-2:]): value for key, value in metrics.items() if key.startswith("coherence/")}
    sources, targets = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    table = np.array([[cells.get((s, t), np.nan) for t in targets] for s in sources])
    ceiling = np.array([[metrics[f"classifier/{t}"] for t in targets]])
    table, lines = np.concatenate([table, ceiling]), [*sources, "upper limit: real rows"]
    figure = Figure(figsize=(3 + 1.3 * len(targets), 1.6 + 0.5 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        mark = "" if np.isnan(value) else f"{value:.2f}"
        axes.text(column, row, mark, ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(targets)), targets)
    axes.set_yticks(range(len(lines)), lines)
    axes.set(title="share of rows whose label is recognised", xlabel="generated", ylabel="given")
    joint = ", ".join(f"{value:.2f} with {'the fitted prior' if key.startswith('density') else 'the prior'}"
                      for key, value in metrics.items() if key.endswith("joint_coherence"))  # fmt: skip
    text = f"One draw per row, recognised by classifiers fitted to real rows. Samples whose modalities agree: {joint}."
    return Picture("coherence", "Coherence", text, figure)


def baseline_comparison(figures: Mapping[str, float]) -> Picture:
    """Draw the error of each predicted modality beside those of the baselines, and say who wins."""
    found = standings(figures)
    shown = [standing for standing in found if standing.measure.startswith("prediction")]
    figure = Figure(figsize=(10, 1.2 + 2.2 * max(len(shown), 1)), layout="constrained")
    for axes, standing in zip(np.atleast_1d(figure.subplots(max(len(shown), 1), 1)), shown, strict=False):
        place = f"imputation/{standing.measure.removeprefix('prediction of ')}/"
        errors = {name[len(place) : -len("_minus_ours")]: figures[name.removesuffix("_minus_ours")]
                  for name in figures if name.startswith(place) and name.endswith("_minus_ours")}  # fmt: skip
        lines = sorted({"this model": standing.ours, **errors}.items(), key=lambda line: line[1], reverse=True)
        colours = ["C3" if name == "this model" else "C0" for name, _ in lines]
        axes.barh([name for name, _ in lines], [value for _, value in lines], color=colours, height=0.7)
        for number, (_, value) in enumerate(lines):
            axes.text(value, number, f" {value:.3g}", va="center", size=7)
        axes.set_title(f"{standing.measure}: {standing.verdict}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    text = "Root mean square error from the other modalities, in the values' unit as read; smaller is better. "
    return Picture("baselines", "Beside the baselines", text + ". ".join(map(str, found)) + ".", figure)


def missing_patterns(
    modalities: Sequence[str], observed: Sequence[float], patterns: Sequence[tuple[Sequence[bool], int]], rows: int
) -> Picture:
    """Draw which modalities rows have together, the most frequent combination first (UpSet plot).

    Args:
        modalities: their names.
        observed: the share of rows that have each modality.
        patterns: combinations, as a flag per modality, and the number of rows of each.
        rows: number of rows with these or other combinations.
    """
    counts = np.array([count for _, count in patterns])
    width, height = 1.2 + 0.42 * max(len(patterns), 6), 0.8 + 0.3 * len(modalities)
    figure = Figure(figsize=(width + 4.2, height + 2.6), layout="constrained")
    (empty, above), (left, grid) = figure.subplots(2, 2, width_ratios=[2.6, width], height_ratios=[2.2, height])
    empty.axis("off")
    places, lines = np.arange(len(patterns)), np.arange(len(modalities))
    above.bar(places, counts, color="C0", width=0.7)
    for place, count in enumerate(counts):
        above.text(
            place, count, f"{count / rows:.{0 if count >= 0.1 * rows else 1}%}", ha="center", va="bottom", size=7
        )
    others = rows - counts.sum()
    rest = f"; the other {others / rows:.0%} of rows have rarer ones" if others else ""
    above.set(ylabel="rows", title=f"rows that have exactly this combination{rest}")
    for line in lines[::2]:
        for axes in (left, grid):
            axes.axhspan(line - 0.5, line + 0.5, color="0.95", lw=0)
    for place, (pattern, _) in enumerate(patterns):
        there = np.flatnonzero(pattern)
        grid.scatter([place] * len(lines), lines, s=45, color="0.85", zorder=2)
        grid.plot([place] * len(there), there, "o-", color="C0", markersize=6.5, lw=1.6, zorder=3)
    left.barh(lines, [100 * share for share in observed], color="C0", height=0.6)
    left.set(xlabel="rows that have it, %", xlim=(100, 0))
    left.set_yticks(lines, modalities)
    grid.set_yticks([])
    for axes in (left, grid):
        axes.set_ylim(len(modalities) - 0.5, -0.5)
    for axes in (above, grid):
        axes.set(xlim=(-0.6, len(patterns) - 0.4), xticks=[])
    for axes in (above, left, grid):
        axes.spines[["top", "right"]].set_visible(False)
    text = f"{rows:,} rows; a filled dot marks a modality that the rows of its column have."
    return Picture("missingness", "Patterns of missing modalities", text, figure)


_MISSING = {
    "rmse": ("imputation, smaller is better", "root mean square error, in the model's units"),
    "coherence": ("coherence, larger is better", "share of rows whose label is recognised"),
    "probe": ("label in the latents", "share of rows whose label a linear probe predicts"),
}


def missing_curves(metrics: Mapping[str, float]) -> Picture:
    """Draw imputation error, coherence and probe accuracy against the share of removed modalities."""
    kinds = [kind for kind in _MISSING if any(f"/{kind}/" in key for key in metrics)]
    figure = Figure(figsize=(5.5 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for key, value in metrics.items():
            _, how, rate, what, name = key.split("/")
            if what in (kind, f"{kind}_ridge"):
                lines.setdefault((name, what, how), []).append((int(rate), value))
        names = sorted({name for name, _, _ in lines})
        for (name, what, how), points in sorted(lines.items()):
            style = {"color": f"C{names.index(name)}", "linestyle": "-" if how == "random" else "--"}
            marker = "x" if what.endswith("ridge") else "o"
            label = (
                f"{name}{', ridge' if marker == 'x' else ''}, removed {'at random' if how == 'random' else 'by label'}"
            )
            axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label, markersize=5, lw=1, **style)
        title, unit = _MISSING[kind]
        axes.set(title=title, ylabel=unit, xlabel="modalities removed, %")
        axes.legend(fontsize=7)
    text = (
        "Each modality is predicted from the remaining ones, and probes predict labels from their latents. By label: "
        "rows with larger labels lose more, so that modalities are not missing at random."
    )
    return Picture("missing", "Robustness to missing modalities", text, figure)


def imputed_scatter(model: DMVAE, rows: Batch, density: FittedPrior | None) -> list[Picture]:
    """Draw imputed against observed values of float modalities that are not images."""
    pictures = []
    for name in model.config.modalities:
        others = [other for other in model.config.modalities if other != name]
        chosen = rows[has(rows, name)][:300]
        if is_image(model.config.shapes[name]) or model.likelihoods[name].classes is not None or not others:
            continue
        generator = torch.Generator(model.device).manual_seed(0)
        drawn = model.predict(chosen, others, name, N=20, generator=generator, density=density)[name]
        imputed = model.means(drawn, name, mask_modalities(chosen, name)).mean(0).flatten(1).cpu().numpy()
        observed = chosen.data[name].flatten(1).cpu().numpy()
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(observed.ravel(), imputed.ravel(), ".", markersize=2, alpha=0.4, label="one value of one row")
        ends = [float(observed.min()), float(observed.max())]
        axes.plot(ends, ends, color="C3", lw=1, label="perfect")
        axes.set(title=name, xlabel="observed value", ylabel="imputed from the other modalities")
        axes.legend(fontsize=8, loc="upper left")
        error = float(np.sqrt(np.square(imputed - observed).mean()))
        text = (
            f"Root mean square error {error:.3f}, in the model's units; a flat cloud means that the mean is predicted."
        )
        pictures.append(Picture(f"imputed-{name}", f"{name} imputed from the others", text, figure))
    return pictures


def _divergences(curves: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in curves if name == "val/kl_shared/joint" or name.startswith("val/kl_private/"))


def _plain(name: str) -> str:
    """Return the label of a metric."""
    kind, _, rest = name.removeprefix("val/").partition("/")
    words = {"train": "training rows", "loss": "validation rows", "kl_shared": "shared z_s"}
    return words.get(kind, f"private z_p of {rest}")
