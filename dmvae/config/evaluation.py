"""How a model is judged."""

from typing import Annotated, Literal

from pydantic import Field

from dmvae.config.section import Name, Section, Seed, Size


class EvaluationConfig(Section):
    """The estimate of the negative log-likelihood of a split."""

    split: Name = "test"
    """The rows to judge on."""
    num_draws: Annotated[int, Field(ge=2)] = 1000
    """Decoder rows spent per modality and row: the field's K."""
    chunk: Size = 100
    """Draws decoded at once; bounds memory."""
    proposal: Literal["refined", "encoder"] = "refined"
    """Where latents are drawn from: a Gaussian fitted to each row's posterior, or the encoders' posterior."""
    seed: Seed = 0
    """Of the draws; a row's draws depend on it and the row's id alone."""
    compare: bool = False
    """Judge rivals too: probabilistic PCA on the same rows and, with labels, the coherence of predictions."""


class EvaluateConfig(Section):
    """What one `jobs.evaluate` run judges, and on what."""

    model: str
    """A model's or a checkpoint's folder."""
    dataset: str
    """A dataset's folder."""
    workers: Size = 1
    """Processes; with more than one, Ray tasks of one CPU each. The figures do not depend on it."""
    train_split: Name = "train"
    """What rivals and classifiers are fitted to."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The estimate."""
