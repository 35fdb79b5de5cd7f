"""From source files to a dataset of shards."""
