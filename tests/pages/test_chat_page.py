"""The chat page as a person uses it: a picture, a question, two answers and the bytes behind them."""

import re
import socket

import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mha2mla_vlm.checkpoint import load, load_processor
from mha2mla_vlm.data import message_text
from mha2mla_vlm.generation import answer, prompt_record
from mha2mla_vlm.sources import load_records

pytestmark = pytest.mark.pages
ORIGINAL = "zoo:qwen2_5_vl"


@pytest.fixture(scope="module")
def page(checkpoint, serve):
    """Address of the page with the original and the converted model."""
    options = ("--baseline", ORIGINAL, "--no-browser", "--max-new-tokens", "24", "--port")
    return serve("-m", "mha2mla_vlm", "chat", checkpoint, *options)


def value(browser, element):
    """What a text box of the page holds."""
    found = browser.find_element(By.CSS_SELECTOR, f"#{element} textarea, #{element} input")
    return found.get_attribute("value") or ""


def upload(browser, path):
    """Give the page a file."""
    wait = WebDriverWait(browser, 60)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#picture input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#picture input[type=file]").send_keys(str(path))


def ask(browser, question):
    """Write a question and press the button."""
    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(question)
    browser.find_element(By.CSS_SELECTOR, "#ask").click()


def test_both_models_answer_and_the_bytes_are_those_of_their_caches(browser, page, checkpoint, pictures):
    record = load_records(pictures / "chats.jsonl")[0]
    question, image = message_text(record.messages[0]), record.images[0]
    browser.get(page)
    upload(browser, image)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
    ask(browser, question)
    WebDriverWait(browser, 120).until(lambda b: "tokens a second" in value(b, "cache-1"))
    processor = load_processor(checkpoint)
    for number, name in enumerate((ORIGINAL, checkpoint)):
        wanted = answer(load(name), processor, prompt_record(question, [image]), max_new_tokens=24)

        def done(b, number=number, wanted=wanted):
            return value(b, f"answer-{number}") == wanted.text and f"{wanted.cache_bytes:,} bytes" in value(
                b, f"cache-{number}"
            )

        WebDriverWait(browser, 60).until(done)
    found = [int(re.match(r"[\d,]+", value(browser, f"cache-{n}"))[0].replace(",", "")) for n in (0, 1)]
    assert found[1] / found[0] == 0.375
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_what_is_no_picture_is_refused(browser, page, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    browser.get(page)
    upload(browser, tmp_path / "notes.png")
    WebDriverWait(browser, 60).until(lambda b: "is not a picture" in b.page_source)
    ask(browser, "What is this?")
    WebDriverWait(browser, 60).until(lambda b: "is not a picture" in b.page_source)
    assert value(browser, "answer-0") == ""


def test_a_file_that_is_too_large_is_refused(browser, page, tmp_path):
    noise = Image.effect_noise((4000, 4000), 90)
    noise.save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size > 10_000_000
    browser.get(page)
    upload(browser, tmp_path / "large.png")
    WebDriverWait(browser, 60).until(lambda b: "maximum" in b.page_source.lower())
    assert not browser.find_elements(By.CSS_SELECTOR, "#preview img")


def test_it_listens_at_loopback_alone(page):
    address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        pytest.skip("this machine has no other address")
    with socket.socket() as other:
        assert other.connect_ex((address, int(page.rsplit(":", 1)[1]))) != 0
