"""Images from a trained model: reconstructions, cross-modal predictions, samples and latent traversals."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dmvae.data.batch import Batch, has
from dmvae.data.scaling import Scale
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.masking import mask_modalities
from dmvae.model.dmvae import DMVAE
from dmvae.report.html_report import Figure, Picture, is_image

Scales = Mapping[str, Scale]

_COLUMNS = 8
_STEPS = torch.linspace(-2.0, 2.0, 9)


def reconstructions(model: DMVAE, rows: Batch, scales: Scales) -> list[Picture]:
    """Draw rows and their reconstructions from the posterior means."""
    pictures = []
    for name in _images(model):
        chosen = rows[has(rows, name)][:_COLUMNS]
        rebuilt = _show(model, name, model.predict(chosen, "all", name, return_mean=True)[name])
        text = "Each column is a row of the split: the observed image, and its reconstruction from the posterior means."
        figure = _grid([chosen.data[name], rebuilt], ["observed", "reconstructed"], [name] * 2, rows, scales)
        pictures.append(Picture(f"reconstruction-{name}", f"Reconstructions of {name}", text, figure))
    return pictures


def cross_modal(model: DMVAE, rows: Batch, density: FittedPrior | None, scales: Scales) -> list[Picture]:
    """Draw each image modality as predicted from the others of the same rows."""
    pictures, names = [], _images(model)
    for target in names:
        sources = [name for name in names if name != target]
        here = torch.stack([torch.ones(len(rows), dtype=torch.bool), *(has(rows, name) for name in (target, *sources))])
        chosen = _different_labels(rows[here.all(0)])
        if not sources or not len(chosen):
            continue
        given, generator = mask_modalities(chosen, target), torch.Generator(model.device).manual_seed(0)
        lines = [chosen.data[name] for name in sources]
        titles, shown = [f"given: {name}" for name in sources], list(sources)
        for label, fitted in (("prior", None), ("fitted prior", density)):
            if label == "prior" or fitted is not None:
                draws = model.predict(given, gen_mod=target, N=3, generator=generator, density=fitted)[target]
                lines += list(_show(model, target, draws))
                titles += [f"drawn, z_p from the {label}"] * 3
                shown += [target] * 3
        figure = _grid([*lines, chosen.data[target]], [*titles, f"true {target}"], [*shown, target], rows, scales)
        text = (
            f"Each column is a row of which the model gets only {' and '.join(sources)}. Draws should have the shared "
            f"content and vary in what is private to {target}. The last line is the true image, which the model does "
            "not get."
        )
        if density is not None:
            text += " The fitted prior is a Gaussian mixture of the latents of training rows, fitted after training."
        pictures.append(Picture(f"cross-{target}", f"{target} generated from the others", text, figure))
    return pictures


def prior_samples(model: DMVAE, rows: Batch, density: FittedPrior | None, scales: Scales) -> list[Picture]:
    """Draw samples in all image modalities, from the prior and from the fitted prior, with the brightness of `rows`."""
    names, pictures = _images(model), []
    for kind, fitted in (("prior", None), ("density", density)):
        if not names or (kind == "density" and fitted is None):
            continue
        generator = torch.Generator(model.device).manual_seed(0)
        drawn = model.decode(model.generate_from_prior(2 * _COLUMNS, generator, fitted))
        lines = [_show(model, name, drawn[name][half : half + _COLUMNS]) for half in (0, _COLUMNS) for name in names]
        text = "Each column has one shared latent: its images should have the same content."
        title = "Samples from the prior" if fitted is None else "Samples from the fitted prior"
        figure = _grid(lines, names * 2, names * 2, rows, scales)
        pictures.append(Picture(f"samples-{kind}", title, text, figure))
    return pictures


def traversals(model: DMVAE, rows: Batch, scales: Scales) -> list[Picture]:
    """Draw traversals: each dimension of the shared and the private latents varied around those of one row."""
    complete = torch.stack([has(rows, name) for name in model.config.modalities]).all(0)
    chosen = (rows[complete] if bool(complete.any()) else rows)[:1]
    encoded, pictures = model.encode(chosen, return_mean=True), []
    for name in _images(model):
        for kind, middle in (("shared", encoded.z), ("private", encoded.modalities_z[name])):
            lines, titles = [], []
            if middle.shape[1] == 0:  # a modality without a private latent
                continue
            for place in range(min(middle.shape[1], 10)):
                moved = middle.repeat(len(_STEPS), 1)
                moved[:, place] = _STEPS.to(moved)
                rest = encoded.z if kind == "private" else encoded.modalities_z[name]
                still = rest.repeat(len(_STEPS), 1)
                z, z_p = (moved, still) if kind == "shared" else (still, moved)
                lines.append(_show(model, name, model.decode({"z": z, "modalities_z": {name: z_p}}, name)[name]))
                titles.append(f"{'z_s' if kind == 'shared' else 'z_p'}[{place}]")
            text = (
                f"Each line varies one {kind} dimension from {float(_STEPS[0]):g} to {float(_STEPS[-1]):g} standard "
                "deviations of the prior, left to right; the other latents are those of one row. A constant line is a "
                "dimension that the model does not use."
            )
            columns = [f"{float(step):g}" for step in _STEPS]
            figure = _grid(lines, titles, [name] * len(lines), rows, scales, columns)
            pictures.append(Picture(f"traversal-{kind}-{name}", f"{name}: traversal of {kind} latents", text, figure))
    return pictures


def _images(model: DMVAE) -> list[str]:
    floats = [name for name in model.config.modalities if model.likelihoods[name].classes is None]
    return [name for name in floats if is_image(model.config.shapes[name])]


def _show(model: DMVAE, name: str, output: Tensor) -> Tensor:
    return model.means(output, name).detach().cpu()


def _different_labels(rows: Batch) -> Batch:
    """Return eight rows with as many different labels as possible."""
    if rows.labels is None:
        return rows[:_COLUMNS]
    labels = rows.labels.tolist()
    order = sorted(range(len(rows)), key=lambda row: (labels[:row].count(labels[row]), labels[row]))
    return rows[torch.tensor(order[:_COLUMNS], dtype=torch.int64)]


def _limits(rows: Batch, name: str, scale: Scale) -> tuple[float, float]:
    """Return the values that are drawn black and white in all lines of a modality."""
    values = scale.show(rows.data[name][has(rows, name)])
    return float(values.min()), float(values.max())


def _grid(
    lines: Sequence[Tensor],
    titles: Sequence[str],
    names: Sequence[str],
    rows: Batch,
    scales: Scales,
    columns: Sequence[str] = (),
) -> Figure:
    """Draw images in the data's units, a line per tensor `(column, *shape)`, with the brightness of `rows`."""
    width = max(len(line) for line in lines)
    figure = Figure(figsize=(1.8 + 0.9 * width, 0.3 + 0.95 * len(lines)), layout="constrained")
    for row, (line, title, name) in enumerate(zip(lines, titles, names, strict=True)):
        black, white = _limits(rows, name, scales[name])
        images = scales[name].show(line.detach().cpu().float())
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
                image = images[column]
                pixels = image.squeeze(0) if image.dim() == 3 and image.shape[0] == 1 else image
                if pixels.dim() == 3:
                    pixels = ((pixels.permute(1, 2, 0) - black) / max(white - black, 1e-12)).clamp(0, 1)
                axes.imshow(pixels.numpy(), cmap="gray", vmin=black, vmax=white)
    return figure
