"""What holds for all tests: one thread, so that sums have one order and two workers do not share a core."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in every process that a test starts
