import subprocess
import sys

import pytest

import dmvae

HEAVY = {"ray", "mlflow", "optuna", "pyarrow"}


def loaded_by(statement: str) -> set[str]:
    """Return the packages that a fresh interpreter holds after a statement."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("module", ["dmvae", "dmvae.config", "dmvae.config.model"])
def test_the_package_and_its_configuration_load_no_torch(module: str) -> None:
    assert loaded_by(f"import {module}").isdisjoint(HEAVY | {"torch"})


def test_the_model_loads_no_platform() -> None:
    loaded = loaded_by("from dmvae import DMVAE, DMVAEConfig, Batch")
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_public_names_are_listed_and_no_others_resolve() -> None:
    assert set(dmvae.__all__) <= set(dir(dmvae))
    assert all(hasattr(dmvae, name) for name in dmvae.__all__)
    with pytest.raises(AttributeError, match="DMVAEE"):
        _ = dmvae.DMVAEE
