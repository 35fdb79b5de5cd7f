"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine cost more than they give
