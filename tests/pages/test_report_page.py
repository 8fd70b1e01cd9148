"""The report in a browser: it loads from disk without an error, draws all, and asks for nothing."""

import json

import pytest
from selenium.webdriver.common.by import By

from mha2mla_vlm.report.make import report_checkpoint

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory):
    """The page about the converted zoo model."""
    target = tmp_path_factory.mktemp("report") / "report.html"
    report_checkpoint(str(checkpoint), target, samples=8, layer_samples=4)
    return target


def test_it_loads_alone_and_draws_everything(browser, report):
    browser.get(report.as_uri())
    figures = browser.find_elements(By.CSS_SELECTOR, "figure svg")
    assert len(figures) == 4
    assert all(figure.size["width"] > 300 and figure.size["height"] > 100 for figure in figures)
    images = browser.find_elements(By.CSS_SELECTOR, ".example img")
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) for image in images)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_its_window(browser, report, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(report.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


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
