"""Gaussians, likelihoods and noise."""
