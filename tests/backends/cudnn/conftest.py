"""Puts this folder on the path. Nothing here may import cudnn, which the quick tests go without."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
