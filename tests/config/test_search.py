"""The settings of a search: spaces, objectives, and the configurations that they lead to."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dmvae.config.search import DEFAULT_SPACE, Domain, SearchConfig, lay_over
from dmvae.config.training import TrainConfig

BASE = {"name": "base", "data": {"dataset": "data"}, "training": {"epochs": 8}}


def make(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate({"name": "study", "base": BASE, "trials": 4, **changes})


def test_a_budget_is_all_that_a_search_needs_to_name() -> None:
    config = make()
    assert config.space.keys() == DEFAULT_SPACE.keys()
    assert config.objectives == ("imputation_and_nll",)


def test_the_base_may_be_the_name_of_a_file() -> None:
    assert make(base="jobs/configs/train.toml").base.name == "digits"
    with pytest.raises(ValidationError, match=r"no/such\.toml"):
        make(base="no/such.toml")


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({"low": 4, "high": 4}, "must be less than high"),
        ({"low": 4}, "needs both low and high"),
        ({"low": 0, "high": 4, "log": True}, "A log range must be positive"),
        ({"low": 1, "high": 4, "values": [1]}, "both a range and `values`"),
        ({"values": []}, "one or more different"),
        ({"values": [1, 1]}, "one or more different"),
        ({"low": 1, "high": 4, "step": 0.5}, "step must be positive, and whole"),
        ({"low": 1, "high": 4, "hihg": 3}, "Extra inputs"),
    ],
)
def test_a_domain_that_holds_nothing_is_refused(domain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Domain.model_validate(domain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": []}, "one or more different"),
        ({"objectives": ["imputation", "joint_nll"]}, "cannot prune trials with several"),
        ({"weights": [1.0, 2.0]}, "one entry per objective"),
        (
            {"space": {"model.beta": {"values": [1.0], "when": {"model.latent_dim": 2}}}},
            "other settings of the space",
        ),
        ({"grace_epochs": 9}, "must not exceed base.training.epochs"),
        ({"start_from": [{"model.latent_dmi": 3}]}, "settings that are not in space"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make(**changes)


def test_conditions_come_before_what_depends_on_them_and_never_go_in_circles() -> None:
    dependent = {"values": [2, 3], "when": {"model.sources": "subsets"}}
    config = make(space={"model.num_subsets": dependent, "model.sources": {"values": ["unimodal", "subsets"]}})
    assert list(config.space) == ["model.sources", "model.num_subsets"]
    assert config.is_active("model.num_subsets", {"model.sources": "subsets"})
    assert not config.is_active("model.num_subsets", {"model.sources": "unimodal"})
    with pytest.raises(ValidationError, match="circular"):
        make(
            space={
                "model.num_subsets": dependent,
                "model.sources": {"values": ["unimodal", "subsets"], "when": {"model.num_subsets": 2}},
            }
        )


def test_settings_are_laid_over_by_path_and_validated() -> None:
    base = TrainConfig.model_validate({**BASE, "optim": {"algorithm": "adam"}})
    chosen = {"model.latent_dim": 3, "optim.learning_rate": 0.5, "model.modalities_specific_dim.b": 7}
    laid = lay_over(base, chosen, "trial", ("a", "b"))
    assert (laid.name, laid.model.latent_dim, laid.optim.learning_rate) == ("trial", 3, 0.5)
    assert laid.model.modalities_specific_dim == {"a": 2, "b": 7}
    assert laid.training.epochs == 8
    with pytest.raises(ValidationError, match="latent_dmi"):
        lay_over(base, {"model.latent_dmi": 3}, "trial")
    with pytest.raises(ValidationError, match="greater than 0"):
        lay_over(base, {"optim.learning_rate": -1.0}, "trial")
    with pytest.raises(ValueError, match="is a value, not a section"):
        lay_over(base, {"optim.algorithm.a": 3}, "trial", ("a", "b"))


def test_the_shipped_search_is_one() -> None:
    from dmvae.config.parsing import read_toml

    assert read_toml(SearchConfig, Path("jobs/configs/search.toml")).base.name == "digits"


@pytest.mark.parametrize(
    ("dims", "betas", "expected"),
    [
        (0, 2.0, None),
        ({"a": 0, "b": 0}, {"a": 2.0, "b": 3.0}, None),
        ({"a": 0, "b": 1}, {"a": 2.0, "b": 3.0}, {"b": 3.0}),
        ({"a": 0, "b": 1}, 2.0, 2.0),
        (3, 2.0, 2.0),
    ],
)
def test_a_trial_has_no_betas_of_private_latents_that_it_lacks(dims: Any, betas: Any, expected: Any) -> None:
    chosen = {"model.input_dims": {"a": (2,), "b": (3,)}, "model.modalities_specific_dim": dims}
    laid = lay_over(TrainConfig.model_validate(BASE), chosen | {"model.modalities_specific_betas": betas}, "t")
    assert laid.model.modalities_specific_betas == expected
