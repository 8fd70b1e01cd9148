"""A converted zoo model on disk, chats about held-out pages, and a headless Chromium."""

import subprocess
import sys

import pytest
from chat_client import Server
from helpers import free_port, original, wait_for

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.model.checkpoint import load, load_processor, save
from mha2mla_vlm.zoo.chats import write_chats, zoo_records

NAME = "qwen2_5_vl"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of `zoo:qwen2_5_vl` converted to so few bytes that it answers otherwise now and then."""
    folder = tmp_path_factory.mktemp("pages") / "small"
    model, processor = load(f"zoo:{NAME}"), load_processor(f"zoo:{NAME}")
    records = zoo_records(NAME, split="train", samples=24, seed=1)
    save(convert(model, processor, records, ConversionConfig(qk_rope_head_dim=16, d_kv=8)), processor, folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Folder of chats and their images."""
    folder = tmp_path_factory.mktemp("images")
    write_chats(NAME, folder, split="test", samples=6, seed=0)
    return folder


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """`serve(*arguments)` starts a Python program with a port of loopback as its last argument, and gives
    its address; all end with the tests.
    """
    running, folder = [], tmp_path_factory.mktemp("servers")

    def start(*arguments, path="/"):
        port = free_port()
        program = [sys.executable, *map(str, arguments), str(port)]
        log = folder / f"{port}.log"
        with log.open("w") as file:
            running.append(subprocess.Popen(program, stdout=file, stderr=subprocess.STDOUT))
        wait_for(f"http://127.0.0.1:{port}{path}", running[-1], log)
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """Folder of a random model whose answers do not end by themselves."""
    model, processor = original("llava")
    model.generation_config.eos_token_id = None
    return save(model, processor, tmp_path_factory.mktemp("endless") / "model")


@pytest.fixture(scope="session")
def server(endless, tmp_path_factory):
    """A page about the model that goes on and on."""
    server = Server(endless, tmp_path_factory.mktemp("server") / "tmp", "--max-new-tokens", 1500)
    yield server
    server.process.kill()
    server.process.wait()


def overflow(browser, width):
    """By how many pixels a page, in a window of that width, is wider."""
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    return browser.execute_script("return document.documentElement.scrollWidth") - width


@pytest.fixture
def browser():
    """Chromium, from Debian's packages chromium and chromium-driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()
