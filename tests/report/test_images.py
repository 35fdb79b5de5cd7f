from pathlib import Path

import numpy as np

from dmvae.config.model import DMVAEConfig
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.scaling import Scale
from dmvae.model.dmvae import DMVAE
from dmvae.report.images import reconstructions


def test_pictures_are_in_the_units_of_the_data(tmp_path: Path) -> None:
    shapes, draw = {"scan": (1, 8, 8), "photo": (3, 8, 8)}, np.random.default_rng(0)
    data = {name: draw.normal(100, 30, size=(20, *shape)).astype(np.float32) for name, shape in shapes.items()}
    rows = Rows(np.arange(20), data, {name: np.ones(20, dtype=bool) for name in shapes})
    dataset = open_dataset(
        write_dataset(tmp_path / "data", {"train": rows}, scaling={"scan": "standardise", "photo": "unit"})
    )
    model = DMVAE(DMVAEConfig.model_validate({"input_dims": shapes, "latent_dim": 2}))
    scales = {name: Scale(info) for name, info in dataset.manifest.modalities.items()}
    scan, photo = reconstructions(model, dataset.split("train").read(np.arange(20)), scales)
    shown = scan.figure.axes[0].images[0]
    np.testing.assert_allclose(shown.get_array(), data["scan"][0, 0], rtol=1e-4)
    np.testing.assert_allclose(shown.get_clim(), (data["scan"].min(), data["scan"].max()), rtol=1e-5)
    low, high = data["photo"].min(), data["photo"].max()
    bright = (data["photo"][0].transpose(1, 2, 0) - low) / (high - low)
    np.testing.assert_allclose(photo.figure.axes[0].images[0].get_array(), bright, atol=1e-5)
