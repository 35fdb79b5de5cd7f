"""What a URI names, without a store: keys are refused and not repeated, options stay options."""

from typing import Any

import pytest
from pydantic import ValidationError

from dmvae.config.search import SearchConfig
from dmvae.config.training import TrainConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.platform.remote_fs import RemoteFolder, cached_run_dir, local

RUN: dict[str, Any] = {"name": "run", "data": {"dataset": "data"}}
SECRETS = (
    "s3://key:word@bucket/runs",
    "abfs://account@files/runs?tenant_id=t&client_id=c&client_secret=word",
    "abfs://account@files/runs?sv=1&sig=word",
)


@pytest.mark.parametrize("uri", SECRETS)
def test_keys_in_a_uri_are_refused_without_repeating_them(uri: str) -> None:
    place, study = {"runs_dir": uri}, {"name": "study", "trials": 1, "base": RUN}
    configs = (TrainConfig, RUN | place), (SearchConfig, study | place), (SearchConfig, study | {"base": RUN | place})
    for config, given in configs:
        with pytest.raises(ValidationError, match="contains credentials") as refusal:
            config.model_validate(given)
        assert "word" not in str(refusal.value)
    with pytest.raises(ValueError, match="contains credentials") as refused, local(uri):
        pass
    assert "word" not in str(refused.value)
    with pytest.raises(ValueError, match="must not hold credentials") as unread:
        open_dataset(uri)
    assert "word" not in str(unread.value)


def test_options_of_a_uri_stay_behind_the_path() -> None:
    place = RemoteFolder.at("s3://bucket/runs?region=eu-central-1&endpoint_override=127.0.0.1:9&scheme=http") / "one"
    assert place.where == "s3://bucket/runs/one?region=eu-central-1&endpoint_override=127.0.0.1:9&scheme=http"
    again = RemoteFolder.at((place / "best").where)
    assert (again.path, again.filesystem) == ("bucket/runs/one/best", place.filesystem)
    assert cached_run_dir(place).parts[-3:] == ("bucket", "runs", "one")
