"""What GitHub, pre-commit and pip are told of this repository agrees with the rest of it."""

import os
import re
import tomllib

import yaml

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_ci_runs_the_gate_on_every_python_that_is_promised():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["gate"]
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    first, end = re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"])
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(int(first), int(end))]
    assert [os.split("-")[0] for os in job["strategy"]["matrix"]["os"]] == ["ubuntu", "macos"]


def test_pre_commit_has_the_linter_of_the_gate():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (rev,) = [repo["rev"] for repo in repos if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={rev.removeprefix('v')}\n" in (ROOT / "requirements-dev.txt").read_text()


def test_the_package_tells_type_checkers_that_it_has_types():
    assert (ROOT / "mla_lm" / "py.typed").is_file()
    assert PROJECT["tool"]["setuptools"]["package-data"]["mla_lm"] == ["py.typed"]
