"""One small Ray cluster for all tests that ask for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmvae.platform.cluster import local_cluster
from tests.runs import make_dataset


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with local_cluster(4):
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("cluster"))
