"""Tools are scripts beside the package: their folder is no package and is put where `import` finds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
