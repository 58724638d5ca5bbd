"""Make the shards that ship inside the package."""
