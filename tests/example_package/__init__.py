"""A package of a person's own networks and likelihoods, as jobs use it by import path.

It imports nothing but torch and the interfaces of dmvae.
"""
