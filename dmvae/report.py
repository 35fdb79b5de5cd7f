"""A trained model in pictures: figures for PNG files and one HTML page that needs nothing else."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("figures are drawn by matplotlib. Run pip install 'dmvae[report]'.") from error

from dmvae.batch import Batch
from dmvae.density import LatentDensity
from dmvae.latents import Latents
from dmvae.metrics import has
from dmvae.missing import without
from dmvae.model import DMVAE
from dmvae.nll import KHAT_LIMIT, NLLEstimate

_COLUMNS = 8
_STEPS = torch.linspace(-2.0, 2.0, 9)


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, its title and what a person sees in it."""

    name: str
    title: str
    text: str
    figure: Figure


def is_image(shape: Sequence[int]) -> bool:
    """Tell whether values of this shape are shown as an image: two dimensions of 8 or more, one or three channels."""
    return len(shape) in (2, 3) and min(shape[-2:]) >= 8 and (len(shape) == 2 or shape[0] in (1, 3))


def write_report(folder: Path, title: str, facts: Mapping[str, str], pictures: Sequence[Picture]) -> Path:
    """Write every picture as PNG and all of them into `report.html`; return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{html.escape(title)}</h1>", "<table>"]
    parts += [f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in facts.items()]
    parts.append("</table>")
    for picture in pictures:
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format="png", dpi=110)
        (folder / f"{picture.name}.png").write_bytes(buffer.getvalue())
        source = base64.b64encode(buffer.getvalue()).decode()
        parts.append(f"<h2>{html.escape(picture.title)}</h2><p>{html.escape(picture.text)}</p>")
        parts.append(f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{source}">')
    style = (
        "body{font-family:sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
        "img{max-width:100%}th{text-align:left;padding-right:1em}p{line-height:1.4}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    file = folder / "report.html"
    file.write_text(f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n")
    return file


def training_curves(metrics_file: Path) -> Picture:
    """Draw the losses and the divergences that a run has recorded."""
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
            axes.plot([p[0] for p in points], [p[1] for p in points], marker=marker, markersize=3, label=name)
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    left.set(title="objective, smaller is better", ylabel="nats per row, all sources added")
    right.set(title="information in the latents (validation)", ylabel="divergence from the prior, nats per row")
    text = (
        "A validation loss that rises while the training loss falls is overfitting; a divergence near 0 is an unused "
        "latent."
    )
    return Picture("curves", "Training", text, figure)


def reconstructions(model: DMVAE, rows: Batch) -> list[Picture]:
    """Draw rows beside their reconstructions from the posterior means."""
    pictures = []
    for name in _images(model):
        chosen = rows[has(rows, name)][:_COLUMNS]
        rebuilt = _show(model, name, model.predict(chosen, "all", name, return_mean=True)[name])
        text = "Each column is a row of the split: the value as it is, and what the model makes of its latents."
        figure = _grid([chosen.data[name], rebuilt], ["observed", "rebuilt"])
        pictures.append(Picture(f"reconstruction-{name}", f"Reconstructions of {name}", text, figure))
    return pictures


def cross_modal(model: DMVAE, rows: Batch, density: LatentDensity | None) -> list[Picture]:
    """Draw what is generated of each image modality from the others of the same rows."""
    pictures, names = [], _images(model)
    for target in names:
        sources = [name for name in names if name != target]
        here = torch.stack([torch.ones(len(rows), dtype=torch.bool), *(has(rows, name) for name in (target, *sources))])
        chosen = _different_labels(rows[here.all(0)])
        if not sources or not len(chosen):
            continue
        given, generator = without(chosen, target), torch.Generator(model.device).manual_seed(0)
        lines = [chosen.data[name] for name in sources]
        titles = [f"given: {name}" for name in sources]
        for label, fitted in (("prior", None), ("density", density)):
            if label == "prior" or fitted is not None:
                draws = model.predict(given, gen_mod=target, N=3, generator=generator, density=fitted)[target]
                lines += list(_show(model, target, draws))
                titles += [f"drawn ({label} of z_p)"] * 3
        figure = _grid([*lines, chosen.data[target]], [*titles, f"true {target}"])
        text = (
            f"Each column is a row of which only the first {len(sources)} line(s) are given. Draws should show the "
            f"content that {target} shares with these, and vary in what is its own; the last line is never shown to "
            "the model."
        )
        pictures.append(Picture(f"cross-{target}", f"{target} generated from the others", text, figure))
    return pictures


def prior_samples(model: DMVAE, density: LatentDensity | None) -> list[Picture]:
    """Draw samples in all image modalities, from the prior and from the fitted density."""
    names, pictures = _images(model), []
    for label, fitted in (("the prior", None), ("the fitted density", density)):
        if not names or (label != "the prior" and fitted is None):
            continue
        generator = torch.Generator(model.device).manual_seed(0)
        drawn = model.decode(model.generate_from_prior(2 * _COLUMNS, generator, fitted))
        lines = [_show(model, name, drawn[name][half : half + _COLUMNS]) for half in (0, _COLUMNS) for name in names]
        text = "Each column has one shared latent: all modalities of a column should show the same content."
        name = "samples-" + label.rpartition(" ")[2]
        pictures.append(Picture(name, f"Samples from {label}", text, _grid(lines, names * 2)))
    return pictures


def traversals(model: DMVAE, rows: Batch) -> list[Picture]:
    """Draw what each dimension of the shared and of each private latent changes, around one row's latents."""
    complete = torch.stack([has(rows, name) for name in model.config.modalities]).all(0)
    chosen = (rows[complete] if bool(complete.any()) else rows)[:1]
    encoded, pictures = model.encode(chosen, return_mean=True), []
    for name in _images(model):
        for kind, middle in (("shared", encoded.z), ("private", encoded.modalities_z[name])):
            lines, titles = [], []
            for place in range(min(middle.shape[1], 10)):
                moved = middle.repeat(len(_STEPS), 1)
                moved[:, place] = _STEPS.to(moved)
                rest = encoded.z if kind == "private" else encoded.modalities_z[name]
                still = rest.repeat(len(_STEPS), 1)
                z, z_p = (moved, still) if kind == "shared" else (still, moved)
                lines.append(_show(model, name, model.decode({"z": z, "modalities_z": {name: z_p}}, name)[name]))
                titles.append(f"{'z_s' if kind == 'shared' else 'z_p'}[{place}]")
            text = (
                f"Each line changes one {kind} dimension from {float(_STEPS[0])} to {float(_STEPS[-1])} (standard "
                "deviations of the prior), left to right; the other latents are one row's."
            )
            figure = _grid(lines, titles, [f"{float(step):g}" for step in _STEPS])
            pictures.append(Picture(f"traversal-{kind}-{name}", f"{name}: {kind} latents moved", text, figure))
    return pictures


def latent_map(latents: Latents, max_rows: int = 1000) -> Picture:
    """Draw z_s in two dimensions, by label: principal components, and t-SNE."""
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
            name = "no label" if label < 0 or latents.labels is None else f"{label:.0f}"
            axes.scatter(flat[mine, 0], flat[mine, 1], s=9, color=colour, label=name)
        axes.set(title=title, xlabel="first coordinate (no unit)", ylabel="second coordinate (no unit)")
    axes.legend(title="label", fontsize=8, markerscale=2, loc="upper right")
    text = "Each point is a row's mean of z_s. Where labels are what modalities share, their colours should lie apart."
    return Picture("map", "The shared latent by label", text, figure)


def weight_diagnostics(estimate: NLLEstimate) -> Picture:
    """Draw how far the NLL's own error can be believed."""
    khat, ess = estimate.khat.cpu().numpy(), estimate.ess.cpu().numpy()
    figure = Figure(figsize=(11, 4), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    first.hist(khat[np.isfinite(khat)], bins=25, color="C0")
    first.axvline(KHAT_LIMIT, color="C3", label=f"limit {KHAT_LIMIT}: not to be trusted to its right")
    first.set(title="Pareto k-hat", xlabel="k-hat of a row's weights", ylabel="rows")
    first.legend(fontsize=7)
    if not np.isfinite(khat).any():
        first.text(0.5, 0.5, "too few draws for k-hat", ha="center", transform=first.transAxes)
    second.hist(np.log10(np.maximum(ess, 1)), bins=25, color="C0")
    second.set(title="effective sample size", xlabel="log10 of effective draws", ylabel="rows")
    trusted = estimate.trusted.cpu().numpy()
    for mine, colour, label in ((trusted, "C0", "trusted"), (~trusted, "C3", "not trusted")):
        third.scatter(estimate.nll.cpu().numpy()[mine], estimate.se.cpu().numpy()[mine], s=9, color=colour, label=label)
    third.set(title="error of each row", xlabel="NLL, nats", ylabel="Monte Carlo standard error, nats")
    third.legend(fontsize=8, loc="upper right")
    text = f"{len(trusted)} rows, {int((~trusted).sum())} of them with an error that is not to be trusted."
    return Picture("weights", "How good the NLL estimate is", text, figure)


def coherence_matrix(figures: Mapping[str, float]) -> Picture:
    """Draw coherence from each set of modalities to each other one, its ceiling in the last line."""
    cells = {tuple(key.split("/")[-2:]): value for key, value in figures.items() if key.startswith("coherence/")}
    sources, targets = sorted({key[0] for key in cells}), sorted({key[1] for key in cells})
    table = np.array([[cells.get((s, t), np.nan) for t in targets] for s in sources])
    ceiling = np.array([[figures[f"classifier/{t}"] for t in targets]])
    table, lines = np.concatenate([table, ceiling]), [*sources, "ceiling: real rows"]
    figure = Figure(figsize=(3 + 1.3 * len(targets), 1.6 + 0.5 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, column in np.ndindex(*table.shape):
        value = table[row, column]
        mark = "" if np.isnan(value) else f"{value:.2f}"
        axes.text(column, row, mark, ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(targets)), targets)
    axes.set_yticks(range(len(lines)), lines)
    axes.set(title="share of rows whose label is kept", xlabel="generated", ylabel="given")
    joint = ", ".join(f"{value:.2f} with {'the fitted density' if key.startswith('density') else 'the prior'}"
                      for key, value in figures.items() if key.endswith("joint_coherence"))  # fmt: skip
    text = f"One draw per row, judged by classifiers of real rows. Samples that agree in all modalities: {joint}."
    return Picture("coherence", "Coherence", text, figure)


def missing_curves(figures: Mapping[str, float]) -> Picture:
    """Draw imputation error and coherence against the share of modalities that is removed."""
    kinds = [kind for kind in ("rmse", "coherence") if any(f"/{kind}/" in key for key in figures)]
    figure = Figure(figsize=(5.5 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
        for key, value in figures.items():
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
        unit = (
            "root mean square error, in the values' unit as read"
            if kind == "rmse"
            else "share of rows whose label is kept"
        )
        axes.set(title="imputation" if kind == "rmse" else "coherence", ylabel=unit, xlabel="modalities removed, %")
        axes.legend(fontsize=7)
    text = "Each modality is predicted from what is left of the others; by label: rows with larger labels lose more."
    return Picture("missing", "With more and more missing", text, figure)


def imputed_scatter(model: DMVAE, rows: Batch, density: LatentDensity | None) -> list[Picture]:
    """Draw imputed against observed values of float modalities that are not images."""
    pictures = []
    for name in model.config.modalities:
        others = [other for other in model.config.modalities if other != name]
        chosen = rows[has(rows, name)][:300]
        if is_image(model.config.shapes[name]) or model.config.distributions[name] == "categorical" or not others:
            continue
        generator = torch.Generator(model.device).manual_seed(0)
        drawn = model.predict(chosen, others, name, N=20, generator=generator, density=density)[name]
        imputed = model.likelihoods[name].mean(drawn).mean(0).flatten(1).cpu().numpy()
        observed = chosen.data[name].flatten(1).cpu().numpy()
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(observed.ravel(), imputed.ravel(), ".", markersize=2, alpha=0.4, label="one value of one row")
        ends = [float(observed.min()), float(observed.max())]
        axes.plot(ends, ends, color="C3", lw=1, label="perfect")
        axes.set(title=name, xlabel="observed value", ylabel="imputed from the other modalities")
        axes.legend(fontsize=8, loc="upper left")
        error = float(np.sqrt(np.square(imputed - observed).mean()))
        text = f"Root mean square error {error:.3f}, in the values' unit as read; a flat cloud is a guess of the mean."
        pictures.append(Picture(f"imputed-{name}", f"{name} imputed from the others", text, figure))
    return pictures


def _divergences(curves: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in curves if name == "val/kl_shared/joint" or name.startswith("val/kl_private/"))


def _images(model: DMVAE) -> list[str]:
    floats = [name for name in model.config.modalities if model.config.distributions[name] != "categorical"]
    return [name for name in floats if is_image(model.config.shapes[name])]


def _show(model: DMVAE, name: str, output: Tensor) -> Tensor:
    return model.likelihoods[name].mean(output).detach().cpu()


def _different_labels(rows: Batch) -> Batch:
    """Take eight rows, of as many labels as there are."""
    if rows.labels is None:
        return rows[:_COLUMNS]
    labels = rows.labels.tolist()
    order = sorted(range(len(rows)), key=lambda row: (labels[:row].count(labels[row]), labels[row]))
    return rows[torch.tensor(order[:_COLUMNS], dtype=torch.int64)]


def _grid(lines: Sequence[Tensor], titles: Sequence[str], columns: Sequence[str] = ()) -> Figure:
    """Lay images out, a line for each tensor `(column, *shape)`."""
    width = max(len(line) for line in lines)
    figure = Figure(figsize=(1.8 + 0.9 * width, 0.3 + 0.95 * len(lines)), layout="constrained")
    for row, (line, title) in enumerate(zip(lines, titles, strict=True)):
        for column in range(width):
            axes = figure.add_subplot(len(lines), width, row * width + column + 1)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            if column == 0:
                axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
            if row == 0 and columns:
                axes.set_title(columns[column], fontsize=8)
            if column < len(line):
                image = line[column].detach().cpu().float()
                pixels = image.squeeze(0) if image.dim() == 3 and image.shape[0] == 1 else image
                pixels = pixels.permute(1, 2, 0).clamp(0, 1) if pixels.dim() == 3 else pixels
                axes.imshow(pixels.numpy(), cmap="gray", vmin=min(0.0, float(line.min())), vmax=float(line.max()))
    return figure
