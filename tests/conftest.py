"""Fixtures of the whole suite."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    """`ranks(function, *args)` -> [result of rank 0, of rank 1]: `function` ran on every rank of one gloo group."""
    pool = Ranks(2)
    yield pool
    pool.stop()
