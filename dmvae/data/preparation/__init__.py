"""Prepare a dataset from source files: read and check rows, assign splits, shuffle, and write shards.

It imports `storage` and `format`, but not `reading`.
`inspection` and the command line may import it.
"""
