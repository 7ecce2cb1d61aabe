"""The report page in a real browser without a network."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mla_lm import charts
from mla_lm.study.report.page import page
from mla_lm.study.report.write import figures_of
from mla_lm.study.result import Result
from tests.study.report.results import UNUSUAL, a_result

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.e2e

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
RESULTS = {"as usual": a_result(), **UNUSUAL}
WIDE, PHONE = 1280, 380


@pytest.fixture(scope="module")
def browser() -> Iterator:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("needs Chromium or Chrome: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of a result and waits for its charts; fails on whatever the console, or the network, says."""
    contexts, complaints = [], []

    def opened(result: Result, width: int = WIDE, scheme: str = "light"):
        file: Path = tmp_path / f"{len(contexts)}.html"
        file.write_text(page(result, figures_of(result)))
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.on("request", lambda request: request.url == file.as_uri() or complaints.append(request.url[:200]))
        tab.goto(file.as_uri())
        tab.wait_for_function("[...document.querySelectorAll('.chart')].every((chart) => chart.dataset.drawn)")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


def colour_of(tab, selector: str, name: str) -> str:
    """A computed colour, as in #1A2B3C."""
    value = tab.eval_on_selector(selector, f"(element) => getComputedStyle(element)['{name}']")
    return "#{:02X}{:02X}{:02X}".format(*(int(part) for part in value.strip("rgb()").split(",")))


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("name", RESULTS)
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(visit, name, width):
    tab = visit(RESULTS[name], width)
    drawn = tab.eval_on_selector_all(".chart", "(all) => all.map((chart) => chart.querySelectorAll('svg path').length)")
    assert len(drawn) == len(figures_of(RESULTS[name]))
    assert all(paths > 1 for paths in drawn)
    assert not tab.locator(".role-legend").count()  # the page has its own, which finds room on a phone
    for figure in figures_of(RESULTS[name]):
        for choice in figure.charts if len(figure.charts) > 1 else ():
            tab.check(f"input[name={figure.name}-choice][value='{choice}']")
            tab.wait_for_selector(f"#{figure.name}-chart[data-drawn='{choice}'] svg")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_fits_are_drawn_with_a_legend_of_their_own(visit):
    """Two kinds of three sizes, each kind in one colour."""
    tab = visit(a_result(("mla", "mha"), sizes=("tiny", "small", "medium")))
    chart = "#scaling-chart"
    for marks, count in ((".mark-line path", 2), (".mark-area path", 2), (".mark-symbol path", 6)):
        assert tab.locator(f"{chart} {marks}").count() == count
    lines = tab.eval_on_selector_all(
        f"{chart} .mark-line path", "(all) => all.map((line) => line.getAttribute('stroke'))"
    )
    assert lines == ["var(--series-0)", "var(--series-1)"]
    assert [text.strip() for text in tab.locator("#scaling .key li").all_inner_texts()] == ["mla", "mha"]
    tab.locator(f"{chart} .mark-symbol path").last.hover()
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "mha_medium" in tab.inner_text("#vg-tooltip-element")


@pytest.mark.parametrize(("scheme", "theme"), [("light", charts.LIGHT), ("dark", charts.DARK)])
def test_colour_scheme(visit, scheme, theme):
    tab = visit(a_result(), scheme=scheme)
    assert colour_of(tab, "html", "backgroundColor") == theme["page"]
    assert colour_of(tab, ".answer", "color") == theme["ink"]
    assert colour_of(tab, "#curves-chart .role-axis-label text", "fill") == theme["muted"]
    fills = [f"#frontier-chart .mark-symbol path:nth-of-type({n + 1})" for n in range(4)]
    assert [colour_of(tab, fill, "fill") for fill in fills] == [theme[f"series-{n}"] for n in range(4)]
    tab.emulate_media(media="print")
    assert colour_of(tab, "html", "backgroundColor") == charts.LIGHT["page"]
    assert colour_of(tab, "#curves-chart .role-axis-label text", "fill") == charts.LIGHT["muted"]


def values(tab, column: int) -> list[str]:
    return tab.eval_on_selector_all(
        f"tbody tr > :nth-child({column})", "(all) => all.map((cell) => cell.dataset.value)"
    )


def test_a_heading_sorts(visit):
    tab = visit(a_result())
    headings = [text.strip() for text in tab.locator("thead th").all_inner_texts()]
    loss, name, difference = (headings.index(text) + 1 for text in ("test loss", "row", "difference of test loss"))
    first = values(tab, loss)
    tab.click(f"thead th:nth-child({loss}) button")
    assert values(tab, loss) == sorted(first, key=float)
    assert tab.get_attribute(f"thead th:nth-child({loss})", "aria-sort") == "ascending"
    tab.focus(f"thead th:nth-child({loss}) button")
    tab.keyboard.press("Enter")
    assert values(tab, loss) == sorted(first, key=float, reverse=True)
    assert tab.get_attribute(f"thead th:nth-child({loss})", "aria-sort") == "descending"
    tab.click(f"thead th:nth-child({name}) button")
    assert values(tab, name) == sorted(values(tab, name))
    assert tab.locator("thead th[aria-sort=ascending], thead th[aria-sort=descending]").count() == 1
    for _ in range(2):
        tab.click(f"thead th:nth-child({difference}) button")
        assert values(tab, difference)[-1] == ""  # the baseline has no difference to itself


def test_the_horizontal_axis_is_chosen_by_keyboard(visit):
    tab = visit(a_result())
    titles = tab.locator("#curves-chart .role-axis-title text")
    assert "tokens seen" in titles.all_text_contents()
    tab.focus("input[name=curves-choice]:checked")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector("#curves-chart[data-drawn=seconds]")
    assert "seconds of training" in titles.all_text_contents()


def test_everything_that_is_operated_shows_its_focus(visit):
    tab = visit(a_result())
    for selector in ("nav a", "input[name=curves-choice]", "thead button", ".scroll", "summary"):
        tab.keyboard.press("Tab")  # from here on, focus is of the keyboard
        tab.focus(selector)
        assert tab.eval_on_selector(selector, "(element) => getComputedStyle(element).outlineStyle") != "none"


def test_pointing_at_a_mark_names_its_row(visit):
    tab = visit(a_result())
    tab.locator("#frontier-chart .mark-symbol path").first.hover()
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "mla_small" in tab.inner_text("#vg-tooltip-element")


@pytest.mark.parametrize("name", RESULTS)
def test_print_cuts_nothing(visit, name):
    """A4 less the margins: 688 pixels across for the text, 1,047 for the table on its landscape page."""
    tab = visit(RESULTS[name])
    tab.emulate_media(media="print")
    tab.set_viewport_size({"width": 1047, "height": 700})
    if RESULTS[name].rows:
        assert tab.eval_on_selector("table", "(table) => table.scrollWidth") <= 1047
        assert tab.eval_on_selector(".scroll", "(region) => getComputedStyle(region).overflowX") == "visible"
    tab.set_viewport_size({"width": 688, "height": 1000})
    tab.eval_on_selector_all("#numbers", "(all) => all.forEach((section) => section.remove())")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 688
    assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    assert tab.eval_on_selector_all("details", "(all) => all.every((part) => part.open)")


def test_charts_are_images_with_a_name_and_a_description(visit):
    tab = visit(a_result())
    for figure in figures_of(a_result()):
        chart = tab.get_by_role("img", name=figure.title, exact=True)
        assert chart.get_attribute("aria-describedby") == f"{figure.name}-text"
        assert json.dumps(tab.inner_text(f"#{figure.name}-text")) == json.dumps(figure.text)
