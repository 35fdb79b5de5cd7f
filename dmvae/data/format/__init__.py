"""What a shard and a manifest hold."""
