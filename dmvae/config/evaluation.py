"""How a model is judged."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmvae.config.section import Count, ModalityName, Name, Section, Seed, Size

Measure = Literal["rivals", "coherence", "probes", "imputation", "robustness"]
Device = Literal["auto", "cpu", "gpu"]
Rate = Annotated[float, Field(ge=0, le=1)]


class EvaluationConfig(Section):
    """The estimate of the negative log-likelihood of a split."""

    split: Name = "test"
    """The rows to judge on."""
    num_draws: Annotated[int, Field(ge=2)] = 1000
    """Decoder rows spent per modality and row: the field's K. With `refined` a doubtful row takes nine times that."""
    chunk: Size = 100
    """Draws decoded at once; bounds memory."""
    proposal: Literal["refined", "encoder"] = "refined"
    """Where latents are drawn from: a Gaussian fitted to each row's posterior, or the encoders' posterior."""
    seed: Seed = 0
    """Of the draws; a row's draws depend on it and the row's id alone."""
    modalities: tuple[ModalityName, ...] | None = None
    """Whose joint NLL is estimated; None: all that a row has."""
    each_modality: bool = False
    """Also the marginal NLL of each modality, and its conditional NLL given what else the row has; about three times
    the work with two modalities, 2 M + 1 times with M."""
    measures: tuple[Measure, ...] = ()
    """What else to judge: `rivals` (the NLL of PCA), `coherence`, `probes` (of labels), `imputation` (beside
    the training mean, ridge regression and PCA), `robustness` (all of it again as modalities are removed)."""


class EvaluateConfig(Section):
    """What one `jobs.evaluate` run judges, and on what."""

    model: str
    """A model's or a checkpoint's folder, or its URI (`s3://BUCKET/RUN/best`)."""
    dataset: str
    """A dataset's folder or URI."""
    workers: Size = 1
    """Processes of one thread each; with more than one, Ray actors. The figures do not depend on it."""
    device: Device = "auto"
    """Where the NLL is computed; `auto` takes GPUs when there is one per worker."""
    output: str | None = None
    """The folder of `rows.parquet` and `summary.json`; the same command goes on with what is there. None: a folder
    `evaluation-SPLIT` in the model's; a model at a URI needs one."""
    density_components: Count = 0
    """Gaussians of a density fitted to the training rows' latents; measures are then taken with it too. 0: none."""
    missing_rates: tuple[Rate, ...] = (0.0, 0.25, 0.5, 0.75)
    """Of `robustness`: shares of the modalities that are removed."""
    train_split: Name = "train"
    """What rivals, classifiers and densities are fitted to."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The estimate."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.density_components and not self.evaluation.measures:
            raise ValueError(
                f"density_components takes effect with evaluation.measures; got {self.density_components} without any. "
                "Name some, or remove it."
            )
        return self
