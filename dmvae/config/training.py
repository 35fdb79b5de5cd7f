"""A training run: what `jobs.train` reads."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from dmvae.config.data import DataConfig
from dmvae.config.evaluation import EvaluationConfig
from dmvae.config.model import DMVAEConfig
from dmvae.config.section import Count, Name, RunsDir, Section, Seed, Size
from dmvae.config.tracking import TrackingConfig


class OptimConfig(Section):
    """The optimiser and its learning rate."""

    algorithm: Literal["adam", "adamw"] = "adam"
    """`adamw` decays weights apart from the gradient."""
    learning_rate: PositiveFloat = 1e-3
    """The highest rate of the schedule."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled; of adamw only."""
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    """`cosine` falls to zero at the last step; `plateau` halves after `plateau_epochs` without a better figure."""
    plateau_epochs: Size = 5
    """Of the plateau schedule only."""
    warmup_steps: Count = 0
    """Steps of linear warm-up of the learning rate."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient; a longer one is scaled down."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.weight_decay and self.algorithm != "adamw":
            raise ValueError(
                f'weight_decay takes effect with algorithm="adamw"; got {self.weight_decay} with {self.algorithm!r}. '
                "Change one of them."
            )
        if "plateau_epochs" in self.model_fields_set and self.schedule != "plateau" and self.plateau_epochs != 5:
            raise ValueError(
                f'plateau_epochs takes effect with schedule="plateau"; got schedule={self.schedule!r}. Remove it.'
            )
        return self


class TrainingConfig(Section):
    """The loop: how long, in what batches, and when to stop."""

    epochs: Size = 20
    """Times that every training row is seen; a finished run goes on when this grows."""
    batch_size: Size = 128
    """Rows of one step over all workers."""
    micro_batch_size: Size | None = None
    """Rows that a worker decodes at once; bounds memory and changes no result (without dropout and batch
    normalisation)."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """`bfloat16` is autocast over float32 weights."""
    compile: bool = False
    """Compile the networks with torch.compile whenever a worker starts; needs a C compiler on every node. For GPUs: on
    CPUs it is no faster. Results agree to rounding."""
    divergence_warmup_steps: Count = 0
    """Steps over which every beta grows linearly from 0 to its value."""
    monitor: str = "loss"
    """The validation figure, smaller is better, that chooses the best checkpoint: `loss`, `joint` or another source."""
    patience: Size | None = None
    """Epochs without a better figure after which training stops."""
    checkpoint_steps: Size | None = None
    """Checkpoint also every so many steps within an epoch."""
    checkpoint_seconds: PositiveFloat | None = None
    """Checkpoint also about so many seconds after the last checkpoint, within an epoch."""
    skip_nonfinite: Count = 0
    """Steps of a run that may be left out because their loss or gradient is not finite; one more ends the run."""
    log_steps: Size = 50
    """Record the training terms every so many steps."""


class WorkersConfig(Section):
    """The processes that train."""

    num: Size = 1
    """How many; the result does not depend on it but for rounding."""
    min_num: Size | None = None
    """Elastic training: start, and go on after a loss, with as few as this, and with up to `num` when there is room."""
    resize_seconds: PositiveFloat = 60.0
    """How often an elastic run looks whether there is room for other numbers of workers."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` takes GPUs when the cluster has one per worker."""
    cpus: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """CPUs of each worker."""
    max_failures: Count = 3
    """Times that training starts again from its last checkpoint when a worker or a node is lost."""

    @model_validator(mode="after")
    def _check(self) -> "WorkersConfig":
        if self.min_num is not None and self.min_num > self.num:
            raise ValueError(f"min_num is at most num; got min_num={self.min_num} and num={self.num}. Raise num.")
        if "resize_seconds" in self.model_fields_set and self.min_num is None and self.resize_seconds != 60.0:
            raise ValueError(
                f"resize_seconds takes effect with min_num; got {self.resize_seconds} alone. Set min_num, or remove it."
            )
        return self


class TrainConfig(Section, hide_input_in_errors=True):
    """A training run from data to recorded model."""

    name: Name
    """Of the run: its folder is `runs_dir/name`, and the same name resumes it."""
    seed: Seed = 0
    """Of the weights, the order of rows and all noise."""
    runs_dir: RunsDir = "runs"
    """The folder of all runs, or a URI (`s3://BUCKET/runs`) where a run's checkpoints and records are kept, for every
    node to go on from; its keys and endpoint come from the environment."""
    init_from: str | None = None
    """A model's or checkpoint's folder whose weights a new run starts from."""
    data: DataConfig
    """The dataset and how it is read."""
    model: DMVAEConfig = DMVAEConfig()
    """`input_dims` comes from the dataset; what is not named has the likelihood that the dataset proposes."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""
    workers: WorkersConfig = WorkersConfig()
    """The processes."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The estimate of the negative log-likelihood at the end."""
    tracking: TrackingConfig = TrackingConfig()
    """The MLflow record."""
