"""Where the shipped configurations are written to."""

from dmvae.config.section import Section


class InitConfig(Section):
    """What `dmvae init` writes."""

    folder: str = "configs"
    """The folder; a file that is there already stays as it is."""
