"""Shard index, sample order, collation and the LightningDataModule."""
