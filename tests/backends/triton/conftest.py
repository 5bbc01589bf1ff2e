"""Puts this folder on the path. Nothing here may import triton: see test_numerics.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
