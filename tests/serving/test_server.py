"""vLLM's OpenAI server with a converted model, over loopback."""

import base64
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import free_port, record, wait_for
from openai import APIStatusError, OpenAI

from mha2mla_vlm.evaluation.generation import answer, prompt_record
from mha2mla_vlm.model.checkpoint import load, load_processor

pytestmark = pytest.mark.vllm
QUESTION = "Read all digits."


def message(image, question=QUESTION):
    """A chat about an image, as the protocol has it."""
    data = io.BytesIO()
    image.save(data, "png")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def server(converted, tmp_path_factory):
    """The folder that is served, and a function that asks."""
    folder, port = converted("qwen2_5_vl"), free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(64 << 20)]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-")

        def ask(messages, **options):
            settings = {"max_tokens": 24, "temperature": 0} | options
            return client.chat.completions.create(model="small", messages=messages, **settings)

        yield folder, ask
    finally:
        process.terminate()
        process.wait(60)


def text_of(found):
    return found.choices[0].message.content.strip()


@pytest.fixture(scope="module")
def images():
    return [record("qwen2_5_vl", "image", seed).load_images()[0] for seed in range(16)]


def wanted(folder, image):
    model, processor = load(folder, dtype=torch.float32), load_processor(folder)
    return answer(model, processor, prompt_record(QUESTION, [image]), max_new_tokens=24).text


def test_it_answers_about_an_image(server, images):
    folder, ask = server
    right = wanted(folder, images[0])
    assert text_of(ask(message(images[0]))) == right
    chunks = [c.choices[0].delta.content or "" for c in ask(message(images[0]), stream=True) if c.choices]
    assert len(chunks) > 2
    assert "".join(chunks).strip() == right


def test_sixteen_at_once_get_their_own_answers(server, images):
    _, ask = server
    one_by_one = [text_of(ask(message(image))) for image in images]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda image: text_of(ask(message(image))), images))
    assert together == one_by_one
    assert len(set(together)) > 4


def test_bad_requests_are_refused_and_the_server_lives(server, images):
    _, ask = server
    bad = message(images[0])
    bad[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(APIStatusError) as refused:
        ask(bad)
    assert 400 <= refused.value.status_code < 500
    with pytest.raises(APIStatusError) as refused:
        ask(message(images[0], "How many digits are 7? " * 200))
    assert 400 <= refused.value.status_code < 500
    assert text_of(ask(message(images[0])))
