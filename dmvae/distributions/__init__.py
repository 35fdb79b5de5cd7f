"""Distributions: diagonal Gaussians, the fitted prior, likelihoods, and noise that is a function of the row.

Pure functions and small modules without any knowledge of models. It may import data and config; nn and everything above
may import it.
"""
