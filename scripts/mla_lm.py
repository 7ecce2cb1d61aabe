"""What Python finds in place of the package where a script is started by its path: how to start it instead."""

import sys
from pathlib import Path

name = Path(sys.argv[0]).stem
print(f"error: in the folder of this repository, start it as: python -m scripts.{name}", file=sys.stderr)
sys.exit(2)
