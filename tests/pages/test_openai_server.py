"""`transformers serve` with a converted model, asked by the `openai` client over loopback."""

import base64

import pytest
from helpers import free_port
from openai import APIError, OpenAI
from transformers.cli.serve import Serve

from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.evaluation.generation import answer, prompt_record
from mha2mla_vlm.model.cache.latent import LatentCache
from mha2mla_vlm.model.checkpoint import load, load_processor
from mha2mla_vlm.utils.compat import pop_cache

pytestmark = pytest.mark.pages


@pytest.fixture(scope="module")
def asked(images):
    """A question about an image, and both as a record and as a message."""
    record = load_records(images / "chats.jsonl")[0]
    question, image = "Read all digits.", record.images[0]
    data = base64.b64encode(image.read_bytes()).decode()
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
    parts.append({"type": "text", "text": question})
    return prompt_record(question, [image]), [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def client(checkpoint, serve):
    """A client of the server's command line."""
    program = (
        "-m",
        "transformers.cli.transformers",
        "serve",
        "--trust-remote-code",
        "--device",
        "cpu",
        "--port",
    )
    return OpenAI(base_url=serve(*program, path="/health") + "/v1", api_key="-")


def test_it_answers_about_an_image(client, checkpoint, asked):
    record, messages = asked
    wanted = answer(load(checkpoint), load_processor(checkpoint), record, max_new_tokens=24)
    given = {"model": str(checkpoint), "messages": messages, "max_tokens": 24, "temperature": 0}
    found = client.chat.completions.create(**given)
    assert found.choices[0].message.content.strip() == wanted.text
    assert found.usage.prompt_tokens == wanted.prompt_tokens
    pieces = [
        chunk.choices[0].delta.content for chunk in client.chat.completions.create(**given, stream=True)
    ]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 1
    assert "".join(pieces).strip() == wanted.text


def test_it_goes_on_after_a_bad_image(client, checkpoint, asked):
    _, messages = asked
    bad = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    with pytest.raises(APIError):
        client.chat.completions.create(
            model=str(checkpoint), messages=[{"role": "user", "content": bad}], max_tokens=4
        )
    assert client.chat.completions.create(model=str(checkpoint), messages=messages, max_tokens=4).choices


def test_its_cache_holds_latents(checkpoint, asked):
    port, seen = free_port(), []
    server = Serve(trust_remote_code=True, device="cpu", port=port, non_blocking=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-")
        given = {"model": str(checkpoint), "messages": asked[1], "max_tokens": 4}
        client.chat.completions.create(**given)  # loads the model
        (loaded,) = server._model_manager.loaded_models.values()
        loaded.model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(pop_cache(dict(kwargs))), with_kwargs=True
        )
        client.chat.completions.create(**given)
    finally:
        server.kill_server()
    assert seen
    assert all(isinstance(cache, LatentCache) for cache in seen)
