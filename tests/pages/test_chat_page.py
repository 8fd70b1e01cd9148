"""The chat page as a person uses it: an image, a question, two answers and the bytes behind them."""

import socket
import time

import pytest
from chat_client import Client, crowd
from conftest import overflow
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mha2mla_vlm.data.records import message_text
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.evaluation.generation import answer
from mha2mla_vlm.model.checkpoint import load, load_processor
from mha2mla_vlm.serving.chat.conversation import Conversation
from mha2mla_vlm.serving.chat.examples import COUNT
from mha2mla_vlm.serving.chat.page import MAX_WAITING

pytestmark = pytest.mark.pages
EXAMPLES = (By.CSS_SELECTOR, "#examples button")
TURNS = (By.CSS_SELECTOR, "#history .turn")
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


def said(browser, side, part="text", turn="#now"):
    """What a model said in a turn: its text, or the line about its cache."""
    found = browser.find_elements(By.CSS_SELECTOR, f'{turn} .answer[data-side="{side}"] .{part}')
    return found[0].text if found else ""


def until_answered(browser, sides=2):
    """Until the last question has all its answers."""
    what = "#now .compared:not(:empty)" if sides == 2 else "#now .cache"
    WebDriverWait(browser, 120).until(lambda b: b.find_elements(By.CSS_SELECTOR, what))


def upload(browser, path):
    """Give the page a file."""
    wait = WebDriverWait(browser, 60)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(path))


def ask(browser, question):
    """Write a question and press the button."""
    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(question)
    browser.find_element(By.CSS_SELECTOR, "#ask").click()


def until_ready(browser):
    """Until there is a box for the question."""
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#question textarea"))


def test_both_models_go_on_with_their_own_answers_and_the_bytes_are_those_of_their_caches(
    browser, page, checkpoint, images
):
    record = load_records(images / "chats.jsonl")[0]
    asked, image = [message_text(record.messages[0]), "Read all digits."], record.images[0]
    browser.get(page)
    upload(browser, image)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
    sides = {name: Conversation() for name in (ORIGINAL, checkpoint)}
    models, processor = {name: load(name) for name in sides}, load_processor(checkpoint)
    for name in sides:
        sides[name].show(image)
    for number, question in enumerate(asked):
        ask(browser, question)
        WebDriverWait(browser, 60).until(lambda b, n=number: len(b.find_elements(*TURNS)) == n + 1)
        until_answered(browser)
        assert value(browser, "question") == ""
        for side, (name, conversation) in enumerate(sides.items()):
            wanted = answer(models[name], processor, conversation.ask(question), max_new_tokens=24)
            conversation.answered(wanted.text)
            assert said(browser, side) == wanted.text
            assert f"{wanted.cache_bytes:,} bytes for {wanted.cached_tokens:,} tokens" in said(
                browser, side, "cache"
            )
    turns = browser.find_elements(*TURNS)
    assert [turn.find_element(By.CSS_SELECTOR, ".asked p").text for turn in turns] == asked
    assert len(browser.find_elements(By.CSS_SELECTOR, "#history .asked img")) == 1
    shown = browser.find_element(By.CSS_SELECTOR, "#saving strong").text
    assert shown == "18.8% of the cache"  # 2 heads x 16 of RoPE and 16 of the latent, of 2 x 128
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    browser.find_element(By.CSS_SELECTOR, "#new").click()
    WebDriverWait(browser, 60).until(lambda b: not b.find_elements(*TURNS))
    assert not browser.find_element(By.CSS_SELECTOR, "#saving").is_displayed()


def test_words_that_differ_are_marked_and_the_page_fits_its_window(browser, page, images):
    browser.get(page)
    for record in load_records(images / "chats.jsonl"):
        until_ready(browser)
        upload(browser, record.images[0])
        WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
        ask(browser, "Read all digits.")
        until_answered(browser)
        texts = [said(browser, side) for side in range(2)]
        marks = [mark.text for mark in browser.find_elements(By.CSS_SELECTOR, "#now mark")]
        assert all(any(mark in text.split() for text in texts) for mark in marks)
        compared = browser.find_element(By.CSS_SELECTOR, "#now .compared").text
        assert bool(marks) == (texts[0] != texts[1]) == ("marked" in compared)
        if marks:
            break
        browser.find_element(By.CSS_SELECTOR, "#new").click()
        WebDriverWait(browser, 60).until(lambda b: not b.find_elements(*TURNS))
    assert marks
    assert [overflow(browser, width) for width in (390, 1280)] == [0, 0]


def test_a_question_is_shown_as_it_was_written(browser, page):
    question = "<b>Read</b> ${6*7} {{value}} `all` </p>"
    browser.get(page)
    until_ready(browser)
    ask(browser, question)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(*TURNS))
    assert browser.find_element(By.CSS_SELECTOR, "#history .asked p").text == question


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
    assert not browser.find_elements(*TURNS)


def test_a_question_is_no_longer_than_it_may_be(browser, page):
    browser.get(page)
    until_ready(browser)
    shown(browser, "2,000 characters at most")
    browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys("digits " * 300)
    assert len(value(browser, "question")) == 2000


def test_what_is_wrong_with_a_question_is_shown_as_it_was_written(browser, page):
    browser.get(page)
    until_ready(browser)
    ask(browser, "What is <|image_pad|>?")
    shown(browser, "<|image_pad|>")


def test_an_example_is_chosen_by_its_picture(browser, page):
    browser.get(page)
    WebDriverWait(browser, 60).until(lambda b: len(b.find_elements(*EXAMPLES)) == COUNT)
    pictures = browser.find_elements(By.CSS_SELECTOR, "#examples img")
    WebDriverWait(browser, 60).until(
        lambda b: all(b.execute_script("return arguments[0].naturalWidth", picture) for picture in pictures)
    )
    browser.find_elements(*EXAMPLES)[1].send_keys(Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
    assert value(browser, "question") == pictures[1].get_attribute("alt")
    browser.find_element(By.CSS_SELECTOR, "#ask").click()
    until_answered(browser)


def test_an_answer_can_be_stopped(browser, server):
    browser.get(server.address)
    until_ready(browser)
    ask(browser, "Go on?")
    WebDriverWait(browser, 60).until(lambda b: "tokens per second" in said(b, 0, "cache"))
    browser.find_element(By.CSS_SELECTOR, "#stop").click()
    start = time.monotonic()
    Client(server.address).begins("ask", None, "And now?")
    assert time.monotonic() - start < 30  # the whole answer would have taken a minute
    shown(browser, "not part of the conversation")
    last = said(browser, 0, "cache")
    time.sleep(2)
    assert said(browser, 0, "cache") == last


def test_the_page_says_when_too_many_wait(browser, server):
    browser.get(server.address)
    until_ready(browser)
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
