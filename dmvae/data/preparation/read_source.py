"""Find the reader of a source."""

import importlib
from pathlib import Path

from dmvae.config.sources import JoinedSource, Source
from dmvae.data.preparation.stream import Stream


def read_source(source: Source | JoinedSource, seed: int, scratch: Path) -> Stream:
    """Begin to read a source, with `read` of the module that has the name of its kind.

    Args:
        source: its settings.
        seed: decides anything random.
        scratch: a folder for temporary files.

    Raises:
        DatasetError: if the source is absent or invalid.
    """
    module = importlib.import_module(f"dmvae.data.preparation.sources.{source.kind}")
    stream: Stream = module.read(source, seed, scratch)
    return stream
