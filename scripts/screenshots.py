"""Pictures of the report and of the chat page, for docs/pages.

python scripts/screenshots.py WORK      WORK is a folder for chats and models; what it has is taken again

Needs Chromium with its driver, selenium, and the extras `report` and `chat`. Speeds in the pictures are
those of the machine that made them.
"""

import io
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

PAGES = Path(__file__).parents[1] / "docs" / "pages"
ORIGINAL = "qwen2_5_vl"
MODELS = {  # the default, and one that is too small and answers otherwise
    "small": [],
    "too-small": ["--rotate-at", "write", "--qk-rope-head-dim", "16", "--d-kv", "8"],
}
DESKTOP, PHONE = (1280, 900), (390, 844)
GAP, GRAY = 24, "#8a8f98"  # between pictures of a phone
QUESTIONS = ("How many digits are 2?", "Read all digits.")
LARGEST = 250_000  # bytes


def main(work: Path) -> None:
    """Make the models and the report, and take all pictures."""
    for split, name, samples in (("train", "calibration", 128), ("test", "held-out", 100)):
        if not (work / name).exists():
            options = ["--split", split, "--samples", samples]
            mha2mla(work, "zoo", "data", ORIGINAL, "-o", name, *options)
    for name, options in MODELS.items():
        if not (work / name).exists():
            mha2mla(work, "convert", f"zoo:{ORIGINAL}", "--data", "calibration", "-o", name, *options)
    mha2mla(work, "report", "small", "--data", "held-out")
    with chromium() as browser:
        take_report(browser, work / "small" / "report.html")
        for name, shape in (("small", DESKTOP), ("too-small", PHONE)):
            take_chat(browser, work, name, shape)


def mha2mla(work: Path, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "mha2mla_vlm", *map(str, arguments)], cwd=work, check=True)


def take_report(browser: webdriver.Chrome, path: Path) -> None:
    """The head of the report on a desktop, and three parts of it on a phone."""
    browser.get(path.resolve().as_uri())
    whole = picture(browser, DESKTOP[0])
    write(whole.crop((0, 0, DESKTOP[0], top(browser, "Examples") - GAP)), "report.png")
    whole = picture(browser, PHONE[0])
    starts = [0, top(browser, "Examples") - GAP, top(browser, "Where the cache went") - GAP]
    write(side_by_side(whole, starts), "report-phone.png")


def take_chat(browser: webdriver.Chrome, work: Path, name: str, shape: tuple[int, int]) -> None:
    """A conversation of three turns with a model beside the original."""
    window(browser, shape)
    with serving(work, name) as address:
        browser.get(address)
        wait = WebDriverWait(browser, 120)
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#examples button")) == 4)
        browser.find_elements(By.CSS_SELECTOR, "#examples button")[3].click()
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#preview img"))
        for number, question in enumerate(("", *QUESTIONS)):
            browser.find_element(By.CSS_SELECTOR, "#question textarea").send_keys(question)
            browser.find_element(By.ID, "ask").click()
            turns = number + 1
            wait.until(lambda b, n=turns: len(b.find_elements(By.CSS_SELECTOR, "#history .turn")) == n)
            wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#now .compared:not(:empty)"))
        time.sleep(1)  # until nothing moves
        whole = picture(browser, shape[0])
        if shape is DESKTOP:
            write(whole, "chat.png")
        else:
            write(side_by_side(whole, [0, max(0, whole.height - PHONE[1])]), "chat-phone.png")


@contextmanager
def serving(work: Path, name: str) -> Iterator[str]:
    """The address of a chat page about a model and the original."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = ["--baseline", f"zoo:{ORIGINAL}", "--no-browser", "--port", str(port)]
    command = [sys.executable, "-m", "mha2mla_vlm", "chat", name, *options]
    process, address = subprocess.Popen(command, cwd=work), f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield browser
    finally:
        browser.quit()


def window(browser: webdriver.Chrome, shape: tuple[int, int]) -> None:
    metrics = {"width": shape[0], "height": shape[1], "deviceScaleFactor": 1, "mobile": shape is PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def picture(browser: webdriver.Chrome, width: int) -> Image.Image:
    """The whole page in a window of some width."""
    window(browser, PHONE if width == PHONE[0] else DESKTOP)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    window(browser, (width, height))
    time.sleep(0.5)
    return Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")


def top(browser: webdriver.Chrome, heading: str) -> int:
    """Where a heading is, in pixels."""
    find = "return [...document.querySelectorAll('h2')].find(h => h.textContent == arguments[0]).offsetTop"
    return int(browser.execute_script(find, heading))


def side_by_side(whole: Image.Image, starts: Sequence[int]) -> Image.Image:
    """Parts of a long picture, as a phone shows them."""
    width, height = PHONE
    made = Image.new("RGB", (len(starts) * (width + GAP) + GAP, height + 2 * GAP), GRAY)
    for number, start in enumerate(starts):
        made.paste(whole.crop((0, start, width, start + height)), (GAP + number * (width + GAP), GAP))
    return made


def write(image: Image.Image, name: str) -> None:
    """As a small PNG."""
    path = PAGES / name
    image.save(path, optimize=True)
    assert path.stat().st_size < LARGEST, f"{path} has {path.stat().st_size:,} bytes"
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
