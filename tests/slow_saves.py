"""train.py on a slow disk: python slow_saves.py SECONDS train.py [settings], SECONDS for each file of a checkpoint."""

import os
import runpy
import sys
import time

fsync, seconds = os.fsync, float(sys.argv[1])


def slow(descriptor):
    time.sleep(seconds)
    fsync(descriptor)


os.fsync = slow
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
