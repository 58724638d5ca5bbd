"""The commands of `headwater` beside training, and the scripts that built the embedded shards."""
