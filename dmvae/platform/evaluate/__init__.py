"""Evaluation of models on a cluster."""
