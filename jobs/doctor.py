"""`python -m jobs.doctor`: see `dmvae.cli`."""

import sys

from dmvae.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("doctor"))
