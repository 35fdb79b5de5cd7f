"""What a report is made of."""

from typing import Annotated

from pydantic import Field, NonNegativeInt

from dmvae.config.section import Name, Section


class ReportConfig(Section):
    """What one `jobs.report` run draws."""

    model: str
    """A run's, a model's or a checkpoint's folder; a run's is that of its best checkpoint."""
    dataset: str
    """A dataset's folder or URI."""
    split: Name = "test"
    """The rows that are shown."""
    train_split: Name = "train"
    """What classifiers, ridge regression and the density are fitted to."""
    output: str | None = None
    """The folder of `report.html` and the PNGs. None: `report` in the run's folder, or the model's."""
    num_draws: Annotated[int, Field(ge=2)] = 1000
    """Of the NLL whose weights are shown."""
    density_components: NonNegativeInt = 20
    """Gaussians of the density shown beside the prior; 0: none."""
