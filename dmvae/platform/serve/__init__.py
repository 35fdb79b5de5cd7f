"""Registered models: registration with MLflow, promotion to champion, serving over HTTP, and embedding of datasets.

`pyfunc.py` is copied into every registered model and imports nothing else from this folder.
May be imported by `platform.tune` and the command line, and by `dmvae.load`.
"""
