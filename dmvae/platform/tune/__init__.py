"""Searches: Ray Tune runs the trials of a study, Optuna proposes them, and the study's folder is the only state.

Only `dmvae.cli` imports this folder. It may import everything below it: training runs, evaluation, tracking.
"""
