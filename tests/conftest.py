"""What the tests share: the scripts as a user runs them, a small corpus, a hub on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
