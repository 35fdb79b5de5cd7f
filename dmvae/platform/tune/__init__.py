"""Searches with Ray Tune and Optuna."""
