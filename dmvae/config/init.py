"""Where `dmvae init` writes the example configurations."""

from dmvae.config.section import Section


class InitConfig(Section):
    """The target of `dmvae init`."""

    folder: str = "configs"
    """Target folder; existing files are kept."""
