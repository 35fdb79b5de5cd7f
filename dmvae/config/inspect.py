"""Settings of `jobs.inspect`."""

from pydantic import Field

from dmvae.config.section import Section


class InspectConfig(Section):
    """Which dataset one `jobs.inspect` run reports on."""

    dataset: str = Field(min_length=1)
    """The dataset's folder or URI."""
    output: str | None = None
    """The folder for `train.toml` and `missingness.png`. None prints the configuration and draws nothing."""
    verify: bool = False
    """Also check the SHA-256 and the values of every shard against the manifest."""
