"""What a report consists of, as files; the page itself without a browser."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from mla_lm.study.report import write_report
from mla_lm.study.report.page import page
from mla_lm.study.report.write import figures_of
from mla_lm.study.result import Result
from tests.study.report.results import EVIL, UNUSUAL, a_result

VOID = {"meta", "link", "input", "br"}


class Checker(HTMLParser):
    """Elements that are closed in the order in which they were opened, and their attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(result: Result) -> str:
    return page(result, figures_of(result))


def test_files(tmp_path):
    result = a_result()
    assert write_report(result, tmp_path / "out") == tmp_path / "out" / "report.html"
    pictures = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    names = ("frontier", "differences", "curves-tokens", "curves-seconds", "curves-flops", "memory", "decoding")
    assert pictures == {f"{name}.{kind}" for name in (*names, "position", "rates") for kind in ("svg", "png")}
    text = (tmp_path / "out" / "report.md").read_text()
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (tmp_path / "out" / link).is_file()
    assert "| mla_small" in text
    assert result.command in text
    assert (tmp_path / "out" / "report.html").stat().st_size < 2e6


def test_a_page_is_the_same_for_the_same_result():
    assert page_of(a_result()) == page_of(a_result())
    assert page_of(a_result()) != page_of(a_result(seed=1))


@pytest.mark.parametrize("name", UNUSUAL)
def test_html(name):
    text = page_of(UNUSUAL[name])
    found = Checker(text)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in found.elements:
        for key in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(key) or "").split()) <= set(ids)
        if (link := attributes.get("href") or "").startswith("#"):
            assert link[1:] in ids
    assert [attributes.get("type") for attributes in found.all("script")] == ["application/json", None, None]
    assert not [a for tag, a in found.elements if "src" in a or (a.get("href") or "#")[0] not in "#d"]
    assert len(found.all("h1")) == 1


def test_what_is_missing_leaves_no_empty_section():
    found = Checker(page_of(UNUSUAL["one bare row"]))
    ids = {attributes.get("id") for attributes in found.all("section")}
    assert ids == {"frontier", "memory", "numbers", "appendix"}
    assert not Checker(page_of(UNUSUAL["all failed"])).all("table")


def test_every_chart_has_a_text(tmp_path):
    found = Checker(page_of(a_result()))
    drawn = [a for a in found.all("div") if a.get("role") == "img"]
    assert len(drawn) == 7
    assert all(a["aria-labelledby"] and a["aria-describedby"] for a in drawn)
    assert all(len(figure.text) > 40 for figure in figures_of(a_result()))


def test_texts_of_runs_are_text():
    text = page_of(UNUSUAL["markup in texts"])
    assert "<script>alert" not in text
    assert "\x1b" not in text
    found = "".join(Checker(text).texts)
    assert r"</script><script>alert(1)</script><!-- \x1b[31m & \u202eé" in found
    charts = re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)
    assert charts
    assert EVIL in [point["name"] for point in json.loads(charts[1])["differences"]["all"]["data"]["values"]]


def test_failed_runs_are_named():
    assert "killed at step 200" in page_of(UNUSUAL["all failed"])


def test_only_the_library_and_our_script_may_run():
    policy = re.search(r'Security-Policy" content="(.*?)"', page_of(a_result()))
    assert policy
    rules = dict(rule.split(" ", 1) for rule in policy[1].replace("&#39;", "'").split("; "))
    assert rules["default-src"] == "'none'"
    assert len(re.findall("'sha256-", rules["script-src"])) == 2
    assert "unsafe-inline" not in rules["script-src"]


def test_report_in_wandb(tmp_path):
    """In a run of its own, where the runs were logged with wandb."""
    result = a_result(("mla", "mha"), seeds=2)
    write_report(result, tmp_path / "none")
    assert not (tmp_path / "none" / "wandb").exists()
    result.configs["mla_small"] = yaml.safe_dump({"logger": {"kind": "wandb", "project": "study"}})
    write_report(result, tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    media = run / "files" / "media"
    pages = [file.read_text() for file in media.glob("html/report*.html")]
    assert pages == [(tmp_path / "report.html").read_text()]
    assert len(list(media.glob("html/figures/*.html"))) == len(list((tmp_path / "figures").glob("*.svg")))
    (table,) = media.glob("table/rows*.json")
    logged = json.loads(table.read_text())
    rows = [dict(zip(logged["columns"], row, strict=True)) for row in logged["data"]]
    assert [row["test_loss"] for row in rows] == [row.estimates["test_loss"].mean for row in result.rows]
    (samples,) = media.glob("table/samples*.json")
    assert len(json.loads(samples.read_text())["data"]) == 4
