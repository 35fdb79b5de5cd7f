"""Settings of an evaluation: the NLL of a split, and the other measures."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmvae.config.section import Count, ModalityName, Name, Section, Seed, Size, Trust

Device = Literal["auto", "cpu", "gpu"]
Rate = Annotated[float, Field(ge=0, le=1)]


class EvaluationConfig(Section):
    """Estimation of the negative log-likelihood (NLL) of a split."""

    split: Name = "test"
    """The split to evaluate."""
    num_draws: Annotated[int, Field(ge=2)] = 1000
    """Importance samples per row (K): decoder evaluations per modality. With `refined`, rows with an unreliable
    estimate take nine times as many, and rows that need annealing up to 310 times."""
    chunk: Size = 100
    """Draws decoded at a time; limits memory."""
    proposal: Literal["refined", "encoder"] = "refined"
    """Proposal distribution of the latents: `refined`, a Gaussian fitted to each row's exact posterior, or `encoder`,
    the posterior that the encoders predict."""
    seed: Seed = 0
    """Seed of the draws; a row's draws depend only on it and on the row's id."""
    modalities: tuple[ModalityName, ...] | None = None
    """Modalities whose joint NLL is estimated. None: all that a row has."""
    each_modality: bool = False
    """Also estimate the marginal NLL of each modality, and its conditional NLL given the others that a row has. With
    two modalities this is about three times the work, with M modalities 2 M + 1 times."""
    measures: tuple[str, ...] = ()
    """What else to measure: `rivals` (the NLL of factor analysis and PCA), `coherence` (of images also a Fréchet
    distance), `probes` (of labels, and clusters), `imputation` (beside the training mean, ridge regression, PCA, factor
    analysis, nearest neighbours and gradient boosting), `cells` (prediction of held-out cells, likewise), `robustness`
    (all but the cells again as modalities are removed)."""


class EvaluateConfig(Section):
    """Settings of `jobs.evaluate`."""

    model: str
    """Folder of a model or a checkpoint, or its URI (`s3://BUCKET/RUN/best`)."""
    dataset: str
    """Folder of the dataset, or its URI."""
    workers: Size = 1
    """Processes of one thread each; with more than one, Ray actors. Results do not depend on it."""
    device: Device = "auto"
    """Where the NLL is computed; `auto` uses GPUs if there is one per worker."""
    output: str | None = None
    """Folder for `rows.parquet` and `summary.json`; the same command resumes from it. None: `evaluation-SPLIT` in the
    model's folder, or `evaluation-best-SPLIT` beside a run's `best`. Required if the model is at a URI."""
    density_components: Count = 0
    """Gaussians in a density fitted to the latents of the training rows; measures are then also computed with it in
    place of the prior. 0: none."""
    missing_rates: tuple[Rate, ...] = (0.0, 0.25, 0.5, 0.75)
    """Shares of the modalities that `robustness` removes."""
    train_split: Name = "train"
    """Split that baselines, classifiers and densities are fitted to."""
    trust: Trust = ()
    """Packages of your own code that the model may import; others that it names are refused."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The NLL estimate and the measures."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateConfig":
        if self.density_components and not self.evaluation.measures:
            raise ValueError(
                f"density_components={self.density_components} has no effect without evaluation.measures. "
                "Set evaluation.measures, or remove density_components."
            )
        return self
