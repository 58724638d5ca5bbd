"""Speed side by side with peers, in one run and interleaved, since only ratios on the same machine mean something."""

import os

# before torch or a peer is imported: threads that wait must not spin on shared cores, and nobody asks the network for news
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # MosaicML Streaming leaves shared memory to Python's tracker
