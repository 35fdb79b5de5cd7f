"""The settings of a training run, which `jobs.train` reads."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from dmvae.config.data import DataConfig
from dmvae.config.evaluation import EvaluationConfig
from dmvae.config.model import DMVAEConfig
from dmvae.config.section import Count, Duration, Name, Part, RunsDir, Section, Seed, Size
from dmvae.config.tracking import TrackingConfig


class OptimConfig(Section):
    """The optimiser and its learning rate."""

    algorithm: Literal["adam", "adamw"] = "adam"
    """`adamw` decouples weight decay from the gradient."""
    learning_rate: PositiveFloat = 1e-3
    """The peak learning rate of the schedule."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; needs adamw."""
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    """`cosine` decays to zero at the last step; `plateau` halves the rate after `plateau_epochs` epochs without
    improvement."""
    plateau_epochs: Size = 5
    """Patience of the plateau schedule, in epochs."""
    warmup_steps: Count = 0
    """Steps over which the learning rate grows linearly from 0."""
    clip_norm: PositiveFloat | None = None
    """Clip the norm of the whole gradient to this value. None: no clipping."""
    freeze: tuple[Part, ...] = ()
    """Parts that keep their weights, such as `encoders.image` or `decoders`: no gradient, no decay, no dropout."""
    rate_factors: dict[Part, PositiveFloat] = Field(default_factory=dict)
    """Factors on the learning rate of parts, such as `{ "encoders.image" = 0.1 }`; of several, the most specific."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.weight_decay and self.algorithm != "adamw":
            raise ValueError(
                f"weight_decay={self.weight_decay} has no effect with algorithm={self.algorithm!r}. "
                'Set algorithm = "adamw", or remove weight_decay.'
            )
        if "plateau_epochs" in self.model_fields_set and self.schedule != "plateau" and self.plateau_epochs != 5:
            raise ValueError(
                f"plateau_epochs has no effect with schedule={self.schedule!r}. "
                'Set schedule = "plateau", or remove plateau_epochs.'
            )
        return self


class TrainingConfig(Section):
    """The training loop: epochs, batches, validation, checkpoints and early stopping."""

    epochs: Size = 20
    """Passes over the training rows; raise it to train a finished run further."""
    batch_size: Size = 128
    """Rows per step, over all workers together."""
    micro_batch_size: Size | None = None
    """Rows that a worker decodes at once; bounds memory without changing the result (unless networks have
    dropout)."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """`bfloat16` is autocast with float32 weights."""
    compile: bool = False
    """Compile the networks with torch.compile when a worker starts; needs a C compiler on every node. Meant for GPUs:
    on CPUs it is not faster. Results agree up to rounding."""
    divergence_warmup_steps: Count = 0
    """Steps over which every beta grows linearly from 0 (KL annealing)."""
    monitor: str = "loss"
    """Validation metric that selects the best checkpoint, smaller is better: `loss`, `joint` or another source."""
    patience: Size | None = None
    """Early stopping: epochs without improvement before training stops. None: never."""
    checkpoint_steps: Size | None = None
    """Also checkpoint within an epoch, every this many steps."""
    checkpoint_seconds: PositiveFloat | None = None
    """Also checkpoint within an epoch, about this many seconds after the last checkpoint."""
    skip_nonfinite: Count = 0
    """Steps with a non-finite loss or gradient that a run may skip; one more ends the run."""
    prior_components: Count = 0
    """Gaussians in a prior that is fitted to the latents of training rows at the end and kept with the best model:
    p(z_s), and p(z_p | z_s) unless `model.cross = "prior"`. Samples and predictions then come from it, the NLL does
    not. 0: none."""
    log_steps: Size = 50
    """Log the training metrics every this many steps."""


class WorkersConfig(Section):
    """The worker processes that train."""

    num: Size = 1
    """Number of workers; the result does not depend on it, up to rounding."""
    min_num: Size | None = None
    """Elastic training: start, or continue after losing workers, with as few as this, and grow to `num` when the
    cluster has room."""
    resize_seconds: PositiveFloat = 60.0
    """Seconds between checks of whether an elastic run can grow."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto` uses GPUs if the cluster has one per worker."""
    cpus: Annotated[float, Field(gt=0, le=4096)] = 1.0
    """CPUs per worker."""
    max_failures: Count = 3
    """Times that training restarts from its last checkpoint after losing a worker or a node."""

    @model_validator(mode="after")
    def _check(self) -> "WorkersConfig":
        if self.min_num is not None and self.min_num > self.num:
            raise ValueError(f"min_num={self.min_num} must not exceed num={self.num}. Raise num or lower min_num.")
        if "resize_seconds" in self.model_fields_set and self.min_num is None and self.resize_seconds != 60.0:
            raise ValueError(
                f"resize_seconds={self.resize_seconds} has no effect without min_num. Set min_num, or remove it."
            )
        return self


class TrainConfig(Section, hide_input_in_errors=True):
    """A training run, from dataset to recorded model."""

    name: Name
    """Name of the run: its folder is `runs_dir/name`, and the same name resumes it."""
    seed: Seed = 0
    """Seed of the weights, the order of rows and all noise."""
    runs_dir: RunsDir = "runs"
    """Folder of all runs, or a URI (`s3://BUCKET/runs`) from which any node can resume; credentials and endpoint come
    from the environment."""
    time_budget: Duration | None = None
    """Stop in time for a last checkpoint before this much time has passed, such as `3h30m`; the same command resumes.
    None: no limit."""
    init_from: str | None = None
    """Folder of a model or checkpoint whose weights a new run starts from."""
    init_map: dict[Part, Part] = Field(default_factory=dict)
    """Parts of the model, and the parts of the model at `init_from` that they start from; all else starts anew. Empty:
    the same model, whole."""
    data: DataConfig
    """The dataset, and how it is read."""
    model: DMVAEConfig = DMVAEConfig()
    """The model; `input_dims` and the likelihoods that are left out come from the dataset."""
    optim: OptimConfig = OptimConfig()
    """The optimiser."""
    training: TrainingConfig = TrainingConfig()
    """The training loop."""
    workers: WorkersConfig = WorkersConfig()
    """The worker processes."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """The NLL estimate at the end of training."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the run is recorded in MLflow."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.init_map and self.init_from is None:
            raise ValueError("init_map has no effect without init_from. Set init_from, or remove init_map.")
        return self
