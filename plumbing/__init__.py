"""What the four scripts stand on. Nobody needs it to understand the model.

This file is imported before PyTorch, whose threads read their settings when they start. At the end of each operation
they wait for the slowest of them, and wait by spinning, for milliseconds. When another program takes one core away from
them, the rest spends its time in waiting: training falls to a quarter. With a shorter spin, a thread that waits longer
sleeps, and its core is free for the one that is behind. (GNU's OpenMP library only, so on Linux.)
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
