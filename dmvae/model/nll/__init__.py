"""Estimates of the negative log-likelihood, with their errors."""
