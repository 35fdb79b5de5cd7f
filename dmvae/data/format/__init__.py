"""The format on disk: the manifest, the Arrow schema of a shard, and how rows are gathered from mapped shards.

It imports `dmvae.config` and what a row is (`batch`, `scaling`, `errors`, `files`).
The other folders of `dmvae.data` may import it.
"""
