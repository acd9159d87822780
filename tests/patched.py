"""A script with parts of Python or PyTorch replaced: python tests/patched.py CODE train.py [settings]

CODE is Python that runs first, such as import os; os.fsync = ...
"""

import runpy
import sys

code, *sys.argv = sys.argv[1:]
sys.path[0] = ""  # the project's folder, where tests start their scripts
exec(code, {})
runpy.run_path(sys.argv[0], run_name="__main__")
