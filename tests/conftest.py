"""Fixtures of the whole suite."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pools():
    """Number of ranks -> a pool of them, which starts with its first call."""
    made = {world: Ranks(world) for world in (2, 3)}
    yield made
    for pool in made.values():
        pool.stop()


@pytest.fixture(scope="session")
def ranks(pools):
    """`ranks(function, *args)` -> [result of rank 0, of rank 1]: `function` ran on every rank of one gloo group."""
    return pools[2]
