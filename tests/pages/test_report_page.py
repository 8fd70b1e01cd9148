"""The report in a browser: it loads from disk without an error, draws all, and asks for nothing."""

import json
import re

import pytest
from conftest import overflow
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from mha2mla_vlm.report.make import report_checkpoint

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory):
    """The page about the converted zoo model."""
    target = tmp_path_factory.mktemp("report") / "report.html"
    report_checkpoint(str(checkpoint), target, samples=12, layer_samples=4)
    return target


def figures(browser):
    """The plots that are shown."""
    return [f for f in browser.find_elements(By.CSS_SELECTOR, "figure svg") if f.is_displayed()]


def shown(browser):
    """What the examples that are shown are about: how the answers compare, and the kind of question."""
    cards = [c for c in browser.find_elements(By.CSS_SELECTOR, ".example") if c.is_displayed()]
    return [(c.get_attribute("data-which").split(), c.get_attribute("data-kind")) for c in cards]


def test_it_loads_alone_and_draws_everything(browser, report):
    browser.get(report.as_uri())
    assert len(figures(browser)) == 4
    assert all(figure.size["width"] > 300 and figure.size["height"] > 100 for figure in figures(browser))
    images = browser.find_elements(By.CSS_SELECTOR, ".example img")
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) for image in images)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_it_fits_its_window(browser, report, width):
    browser.get(report.as_uri())
    assert overflow(browser, width) <= 0
    assert len(figures(browser)) == 4
    boxes = browser.find_elements(By.CSS_SELECTOR, ".wide, .tile, .example, figure, #filter")
    assert all(box.rect["x"] + box.rect["width"] <= width for box in boxes)
    heights = "[...arguments[0].querySelectorAll('text')].map(text => text.getBoundingClientRect().height)"
    smallest = [browser.execute_script(f"return Math.min(...{heights})", f) for f in figures(browser)]
    assert min(smallest) >= 9  # pixels


def test_examples_are_filtered(browser, report):
    browser.get(report.as_uri())
    every = shown(browser)
    state = browser.find_element(By.ID, "shown")
    assert state.text == f"{len(every)} of {len(every)} examples shown."
    choice = browser.find_element(By.CSS_SELECTOR, "#filter input[name=which]")
    for which in ("differs", "worse", "better"):
        choice.send_keys(Keys.ARROW_RIGHT)  # the keyboard alone
        choice = browser.switch_to.active_element
        assert choice.get_attribute("value") == which
        wanted = [card for card in every if which in card[0]]
        assert shown(browser) == wanted
        assert state.text == f"{len(wanted)} of {len(every)} examples shown."
    assert any("worse" in which for which, _ in every)
    choice.send_keys(Keys.ARROW_RIGHT)  # all again
    kind = every[0][1]
    Select(browser.find_element(By.CSS_SELECTOR, "#filter select")).select_by_visible_text(kind)
    assert shown(browser) == [card for card in every if card[1] == kind] != every


def test_without_scripts_all_is_there(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get(report.as_uri())
    assert len(shown(browser)) == len(browser.find_elements(By.CSS_SELECTOR, ".example")) > 0
    assert not browser.find_element(By.ID, "filter").is_displayed()
    assert len(browser.find_elements(By.CSS_SELECTOR, "figure svg.broad .mark > title")) > 10


def pointed(browser, mark):
    """After the pointer has come to a mark: into the middle of an area, onto a line."""
    place = browser.execute_script(
        """const path = arguments[0].querySelector("path"), box = path.getBoundingClientRect();
        if (getComputedStyle(path).fill != "none") return [box.x + box.width / 2, box.y + box.height / 2];
        const at = path.getPointAtLength(path.getTotalLength() / 3).matrixTransform(path.getScreenCTM());
        return [at.x, at.y]""",
        mark,
    )
    actions = ActionBuilder(browser)
    for x, y in ((0, 0), place):
        actions.pointer_action.move_to_location(round(x), round(y))
    actions.perform()
    return True


def test_plots_say_what_is_under_the_pointer_and_the_focus(browser, report):
    browser.get(report.as_uri())
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    said, wait = [], WebDriverWait(browser, 20)
    for figure in figures(browser):
        before, last = figure.find_elements(By.CSS_SELECTOR, ".mark")[-2:]  # the last is on top
        text = last.get_attribute("aria-label")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
        wait.until(lambda b, mark=last, text=text: pointed(b, mark) and tip.text == text)
        browser.execute_script("scrollTo(0, document.body.scrollHeight)")
        wait.until(lambda b: not tip.is_displayed())
        before.send_keys(Keys.ARROW_RIGHT)  # which scrolls to it
        wait.until(lambda b, text=text: tip.text == text)
        assert browser.switch_to.active_element == last
        last.send_keys(Keys.ESCAPE)
        wait.until(lambda b: not tip.is_displayed())
        said.append(text)
    assert re.match(r"131,072 tokens: original 268\.4 MB, converted 50\.3 MB, converted, 4-bit", said[0])
    assert [text.partition(":")[0] for text in said[1:]] == ["layer 3", "layer 3", "layer 3, vision"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(browser, report, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(report.as_uri())
    read = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor]"
    color, back = browser.execute_script(read, browser.find_element(By.TAG_NAME, "body"))

    def brightness(text):
        return sum(int(part) for part in text[text.index("(") + 1 :].rstrip(")").split(",")[:3])

    assert abs(brightness(color) - brightness(back)) > 400
    assert (brightness(back) < 200) == (scheme == "dark")
    ink = browser.find_element(By.CSS_SELECTOR, "figure svg text")
    assert browser.execute_script("return getComputedStyle(arguments[0]).fill", ink) == color
