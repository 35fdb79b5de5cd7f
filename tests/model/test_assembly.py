"""Own code in models: what a folder names is run only with consent, and recorded by version."""

import copy
import json
from pathlib import Path

import pytest
import torch

from dmvae.config.model import DMVAEConfig
from dmvae.data.batch import Batch
from dmvae.model.dmvae import DMVAE
from tests.example_package.distributions import ZeroInflatedPoisson

NETS, DISTRIBUTIONS = "tests.example_package.nets", "tests.example_package.distributions"


def own_model(**params: object) -> DMVAE:
    return DMVAE(
        DMVAEConfig.model_validate(
            {
                "input_dims": {"a": [6], "b": [2]},
                "latent_dim": 3,
                "architectures": {"a": {"name": f"{NETS}:table", "params": params}},
                "decoders_dist": {"a": f"{DISTRIBUTIONS}:ZeroInflatedPoisson"},
            }
        )
    )


@pytest.mark.parametrize(
    "trust", [["tests"], ["tests.example_package"], [f"{NETS}:table", f"{DISTRIBUTIONS}:ZeroInflatedPoisson"]]
)
def test_a_model_of_own_code_is_saved_and_loaded_with_consent(trust: list[str], tmp_path: Path) -> None:
    model, batch = own_model(width=5), Batch({"a": torch.ones(3, 6), "b": torch.rand(3, 2)})
    model.save(tmp_path)
    again = DMVAE.load(tmp_path, trust=trust)
    assert torch.equal(again.predict(batch, return_mean=True).a, model.predict(batch, return_mean=True).a)
    assert again.config == model.config
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["architectures"]["a"]["name"] == f"{NETS}:table"
    assert record["architectures"]["a"]["params"] == {"width": 5}
    assert record["packages"]["tests"].startswith("sha256:")


@pytest.mark.parametrize("trust", [(), ("test",), ("tests.other",), (f"{NETS}",)])
def test_without_consent_nothing_that_a_folder_names_is_run(trust: tuple[str, ...], tmp_path: Path) -> None:
    own_model().save(tmp_path)
    with pytest.raises(ValueError, match="code that is not part of dmvae") as refusal:
        DMVAE.load(tmp_path, trust=trust)
    assert "decoders_dist.a = 'tests.example_package.distributions:ZeroInflatedPoisson'" in str(refusal.value)
    assert "trust=('tests',), or the flag --trust tests" in str(refusal.value)
    record, mark = json.loads((tmp_path / "model.json").read_text()), tmp_path / "mark"
    record["architectures"]["a"] = {
        "name": "tests.example_package.wrong:sprung",
        "params": {"mark": str(mark)},
    }
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="code that is not part of dmvae"):
        DMVAE.load(tmp_path, trust=trust)
    assert not mark.exists()


def test_another_version_than_the_recorded_one_is_warned_of(tmp_path: Path) -> None:
    own_model().save(tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    record["packages"]["tests"] = "0.9"
    (tmp_path / "model.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"made with tests 0\.9, but sha256:\w+ is imported"):
        model = DMVAE.load(tmp_path, trust=["tests"])
    assert model.config.packages == {"tests": "0.9"}, "the model keeps the version that it was made with"


def test_a_likelihoods_own_spec_checks_its_parameters() -> None:
    own_model()  # imports it
    tree = own_model().config.model_dump()
    tree["decoder_dist_params"] = {"a": {"floor": "low"}}
    with pytest.raises(ValueError, match="floor must be a number of 0 or more, but got 'low'"):
        DMVAEConfig.model_validate(tree)
    tree["decoder_dist_params"] = {"a": {"celing": 1.0}}
    with pytest.raises(ValueError, match="unknown parameter 'celing'"):
        DMVAEConfig.model_validate(tree)


def test_the_example_likelihood_is_a_distribution() -> None:
    likelihood = ZeroInflatedPoisson((2,))
    output = torch.tensor([[[0.3, -0.5], [-1.0, 2.0]]])
    values = torch.cartesian_prod(torch.arange(30.0), torch.arange(30.0))
    log_p = likelihood.log_prob(output, values)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close((log_p.exp().unsqueeze(-1) * values).sum(0), likelihood.mean(output)[0])


def test_a_model_can_be_copied() -> None:
    model = own_model()
    other = copy.deepcopy(model)
    assert other.encoders["a"] is other._encoders["modality_a"]
    assert other.encoders["a"] is not model.encoders["a"]
