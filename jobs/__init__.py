"""Entry points of a checkout: `python -m jobs.VERB CONFIG.toml [--flags]`."""
