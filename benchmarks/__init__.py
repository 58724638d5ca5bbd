"""Benchmarks: `speed` side by side with peers, `claims` for what methods promise."""
