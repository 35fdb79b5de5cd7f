"""What a dataset is looked at for."""

from pydantic import Field

from dmvae.config.section import Section


class InspectConfig(Section):
    """What one `jobs.inspect` run looks at."""

    dataset: str = Field(min_length=1)
    """A dataset's folder or URI."""
    output: str | None = None
    """The folder of `train.toml` and `missingness.png`. None: the configuration is printed, and nothing is drawn."""
    verify: bool = False
    """Also check every shard's SHA-256 and values anew against the manifest."""
