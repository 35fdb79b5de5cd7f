"""Inspect a dataset before training: what it holds, what may be wrong with it, and settings for a first run.

It imports the other folders of `dmvae.data`.
`dmvae.report` and the command line may import it.
"""
