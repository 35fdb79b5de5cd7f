"""Evaluation: metrics of predictions and latents, baselines on the same rows, and the objectives of a search.

It may import model and below, and knows neither Ray nor MLflow; report and platform may import it.
"""
