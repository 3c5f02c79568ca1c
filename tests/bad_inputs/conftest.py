"""The tables stand beside the tests; pytest imports tests by path."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent))
