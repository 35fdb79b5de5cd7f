"""Where a dataset is stored: folders, object stores, the cache of remote shards on a node, and their verification.

It imports `format`.
`reading`, `preparation` and `inspection` may import it.
"""
