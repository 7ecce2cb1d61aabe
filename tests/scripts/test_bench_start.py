"""scripts.bench start: what a run loads."""

import pytest

from mla_lm.errors import UserError
from scripts.bench.start import first_step, heavy_imports
from tests.conftest import SMALL


def test_a_run_loads_nothing_that_it_does_not_use(train):
    """`datasets` to read text, and nothing heavy once the tokens are there."""
    assert "datasets" in heavy_imports("none", [*SMALL, *train.data, f"data.cache_dir={train.folder}"])
    assert heavy_imports("none", [*SMALL, *train.data, f"data.cache_dir={train.folder}"]) == []


def test_says_why_a_run_fails():
    with pytest.raises(UserError, match=r"model\.d_model.*abc"):
        first_step("none", ["model.d_model=abc"])
