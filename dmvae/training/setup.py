"""Set a run up on one worker: its model and optimiser before the first step, and its rows."""

import os
from collections.abc import Iterator, Mapping
from shutil import which
from socket import gethostname

import numpy as np
import torch
from torch import nn

from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.reading.loader import read_epoch, read_rows
from dmvae.data.reading.sampler import EpochSampler
from dmvae.data.reading.split import Split
from dmvae.model.dmvae import DMVAE
from dmvae.training.settings import start_weights
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import WorkerBatch

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}
_BLOCK_ROWS = 256
_INITIAL_ROWS = 4096  # the first of the training split, which are shuffled; the same for any number of workers


class WorkerData:
    """One worker's rows: its part of every global batch, and its blocks of the validation split."""

    def __init__(
        self, config: TrainConfig, rank: int, world_size: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        dataset = open_dataset(config.data.dataset)
        self._train: Split = dataset.split(config.data.train_split)
        self._validation: Split = dataset.split(config.data.val_split)
        self._rank, self._world_size, self._dtype = rank, world_size, dtype
        self._device = None if device is None or device.type == "cpu" else device
        self._sampler = EpochSampler(
            self._train.record_batch_rows,
            seed=config.seed,
            batch_size=config.training.batch_size,
            streams=config.data.streams,
            window_rows=config.data.window_rows,
            shards=self._train.record_batch_shards if config.data.unit == "shard" else None,
        )
        self.steps_per_epoch = self._sampler.num_batches

    def batches(self, epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        """Yield this worker's part of every global batch of an epoch, from a step on."""
        pin = self._device is not None and self._device.type == "cuda"
        for step, first, batch in read_epoch(
            self._train, self._sampler, epoch, first_step, self._rank, self._world_size, self._dtype, pin
        ):
            moved = batch if self._device is None else batch.to(self._device, non_blocking=True)
            yield WorkerBatch(moved, step, first, self._sampler.batch_size_of(step))

    def validation_blocks(self) -> Iterator[Batch]:
        """Yield every `world_size`-th block of the validation split."""
        blocks = read_rows(self._validation, _BLOCK_ROWS, self._rank, self._world_size, dtype=self._dtype)
        return (batch for _, batch in blocks)


def build_state(
    config: TrainConfig,
    device: torch.device,
    encoders: Mapping[str, nn.Module] | None = None,
    decoders: Mapping[str, nn.Module] | None = None,
) -> TrainState:
    """Return the model and optimiser of a run before its first step; networks may be given, as in `DMVAE`."""
    torch.manual_seed(config.seed)  # every worker starts from the same weights
    model = DMVAE(config.model, encoders, decoders).to(device, _DTYPES[config.training.precision])
    if any(True for module in model.likelihoods.values() for _ in module.parameters()):
        split = open_dataset(config.data.dataset).split(config.data.train_split)
        model.initialize_likelihoods(split.read(np.arange(min(_INITIAL_ROWS, len(split)))))
    start_weights(model, config)
    if config.training.compile:
        _compile(model, device)
    return TrainState(model, build_optimizer(model, config.optim))


def _compile(model: DMVAE, device: torch.device) -> None:
    """Compile the networks; the code around them depends on which rows have which modality.

    Raises:
        ValueError: if no compiler for this device is installed.
    """
    variable, usual = ("CC", "gcc") if device.type == "cuda" else ("CXX", "g++")
    compiler = os.environ.get(variable) or usual
    if which(compiler) is None:
        raise ValueError(
            f"training.compile needs a compiler on every node, but {compiler!r} was not found on {gethostname()}. "
            f"Install it (the image for GPUs has gcc), set {variable}, or remove training.compile."
        )
    for network in (*model.encoders.values(), *model.decoders.values()):
        network.compile(dynamic=True)
