"""Where a dataset lies, and how its shards reach a node."""
