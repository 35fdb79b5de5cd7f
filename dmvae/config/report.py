"""Settings of a report."""

from typing import Annotated

from pydantic import Field, NonNegativeInt

from dmvae.config.section import Name, Section, Trust


class ReportConfig(Section):
    """Settings of `jobs.report`."""

    model: str
    """Folder of a run, a model or a checkpoint; of a run, the best checkpoint is drawn."""
    dataset: str
    """Folder of the dataset, or its URI."""
    split: Name = "test"
    """Split whose rows are shown."""
    train_split: Name = "train"
    """Split that baselines, classifiers and the density are fitted to."""
    output: str | None = None
    """Folder for `report.html` and the PNGs. None: `report` in the folder of the run or the model."""
    num_draws: Annotated[int, Field(ge=2)] = 1000
    """Draws per row of the NLL estimate whose importance weights are shown."""
    density_components: NonNegativeInt = 20
    """Gaussians in the density that is shown beside the prior, of a model without a fitted one. 0: none."""
    trust: Trust = ()
    """Packages of your own code that the model may import; others that it names are refused."""
