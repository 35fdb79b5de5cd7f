"""Datasets of incomplete multimodal rows: prepared once, stored as Arrow shards with a manifest, read as batches.

`batch`, `scaling` and `errors` say what a row is; `format`, `storage`, `reading | preparation` and `inspection` build
on them in this order. This folder imports only `dmvae.config`; every folder above may import it.
"""
