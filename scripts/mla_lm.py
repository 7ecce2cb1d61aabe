"""What a script finds in place of the package where it is started by its path: `python scripts/generate.py`.

Python then looks for modules in scripts/ and not in the repository. This puts that right and hands over to the package;
`python -m scripts.generate` never comes here.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])
del sys.modules["mla_lm"]
import mla_lm  # noqa: E402, F401
