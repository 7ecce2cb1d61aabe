"""`python train.py --help`: every option is described, in one line."""

import re

from tests.conftest import ROOT, succeeded

CONF = ROOT / "conf"


def test_every_option_has_a_line(train):
    page = succeeded(train.bare("--help")).stdout
    groups = dict(re.findall(r"^(\w+)=\n((?:[ *] .+\n)+)", page, re.MULTILINE))
    assert list(groups)[:2] == ["model", "data"]
    for group, lines in groups.items():
        described = dict(re.findall(r"^[ *] (\w+) +(\S.+)$", lines, re.MULTILINE))
        assert sorted(described) == sorted(file.stem for file in (CONF / group).glob("*.yaml"))
        for option, description in described.items():
            assert f"# {description}" in (CONF / group / f"{option}.yaml").read_text().splitlines()
    assert max(map(len, page.splitlines())) <= 120
    assert re.search(r"^\* mla_small ", page, re.MULTILINE)
    assert "--cfg job" in page
