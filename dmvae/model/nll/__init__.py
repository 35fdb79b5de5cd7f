"""Estimates of the negative log-likelihood, with their errors: importance sampling, annealed where that is not enough.

`estimate` is the entry; `gauss_newton`, `mixture_proposal` and `annealing` say where latents are drawn from. It may
import `dmvae.model.loss` and below; `dmvae.model.dmvae` and everything above may import it.
"""
