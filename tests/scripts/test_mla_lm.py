"""A script that is started by its path."""

import subprocess
import sys

from tests.conftest import ROOT


def test_it_says_how_to_start_it(tmp_path):
    script = subprocess.run(
        [sys.executable, ROOT / "scripts" / "plan.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert script.returncode == 2
    assert script.stdout == ""
    assert script.stderr.endswith("start it as: python -m scripts.plan\n")
    assert len(script.stderr.splitlines()) == 1
