"""The chat page as a person uses it: an image, a question, two answers and the bytes behind them."""

import re
import socket
import time

import pytest
from chat_client import Client, crowd
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.evaluation.generation import answer, prompt_record
from mha2mla_vlm.model.checkpoint import load, load_processor
from mha2mla_vlm.serving.chat.page import MAX_WAITING

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
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(path))


def ask(browser, question):
    """Write a question and press the button."""
    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(question)
    browser.find_element(By.CSS_SELECTOR, "#ask").click()


def test_both_models_answer_and_the_bytes_are_those_of_their_caches(browser, page, checkpoint, images):
    record = load_records(images / "chats.jsonl")[0]
    question, image = message_text(record.messages[0]), record.images[0]
    browser.get(page)
    upload(browser, image)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
    ask(browser, question)
    WebDriverWait(browser, 120).until(lambda b: "tokens per second" in value(b, "cache-1"))
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


def shown(browser, text):
    """Until the page says something."""
    WebDriverWait(browser, 60).until(lambda b: text in b.find_element(By.TAG_NAME, "body").text)


@pytest.mark.parametrize("name", ["notes.png", "many.png"])
def test_an_image_that_cannot_be_used_is_refused_with_the_reason(browser, page, images, tmp_path, name):
    (tmp_path / "notes.png").write_text("no image")
    Image.new("1", (13_000, 13_000)).save(tmp_path / "many.png")
    says = {"notes.png": "it is none of PNG, JPEG", "many.png": "has 13000 x 13000 pixels"}[name]
    browser.get(page)
    upload(browser, load_records(images / "chats.jsonl")[0].images[0])
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
    browser.find_element(By.CSS_SELECTOR, "#image button[aria-label='Clear']").click()
    upload(browser, tmp_path / name)
    shown(browser, says)
    assert not browser.find_elements(By.CSS_SELECTOR, "#preview img")  # of the image before
    browser.refresh()
    upload(browser, tmp_path / name)
    ask(browser, "What is this?")
    shown(browser, says)
    assert value(browser, "answer-0") == ""


def test_a_question_is_no_longer_than_it_may_be(browser, page):
    browser.get(page)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#question textarea"))
    shown(browser, "2,000 characters at most")
    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys("digits " * 300)
    assert len(value(browser, "question")) == 2000


def test_what_is_wrong_with_a_question_is_shown_as_it_was_written(browser, page):
    browser.get(page)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#question textarea"))
    ask(browser, "What is <|image_pad|>?")
    shown(browser, "<|image_pad|>")


def test_an_example_fills_image_and_question(browser, page):
    browser.get(page)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "tbody tr.tr-body"))
    browser.find_element(By.CSS_SELECTOR, "tbody tr.tr-body").click()
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
    assert value(browser, "question")
    browser.find_element(By.CSS_SELECTOR, "#ask").click()
    WebDriverWait(browser, 120).until(lambda b: "tokens per second" in value(b, "cache-1"))


def test_an_answer_can_be_stopped(browser, server):
    browser.get(server.address)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#question textarea"))
    ask(browser, "Go on?")
    WebDriverWait(browser, 60).until(lambda b: "tokens per second" in value(b, "cache-0"))
    browser.find_element(By.CSS_SELECTOR, "#stop").click()
    start = time.monotonic()
    Client(server.address).begins("ask", None, "And now?")
    assert time.monotonic() - start < 30  # the whole answer would have taken a minute
    last = value(browser, "cache-0")
    time.sleep(2)
    assert value(browser, "cache-0") == last


def test_the_page_says_when_too_many_wait(browser, server):
    browser.get(server.address)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#question textarea"))
    with crowd(server.address, MAX_WAITING + 4):
        ask(browser, "Is there room?")
        shown(browser, "busy")


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
