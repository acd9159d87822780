"""What the four scripts stand on: settings, sources of text, shards, checkpoints, devices, ranks, the log.

Import this package before PyTorch, whose threads read their settings when they start. At the end of each operation they
wait for the slowest one, spinning for milliseconds. When another program takes a core away, all the others spend their
time waiting, and training drops to a quarter of its speed. With a shorter spin, a thread that waits longer goes to
sleep and frees its core for the one that is behind. (This is for GNU's OpenMP library, so for Linux.) In a notebook
where PyTorch was first, set_up_device says that it is too late.
"""

import os
import sys

TOO_LATE = False
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "2000"
    TOO_LATE = sys.platform == "linux" and "torch" in sys.modules
