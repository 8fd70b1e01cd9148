"""The real lmms-eval on our models: it finds them, and its score is ours."""

import json

import lmms_eval.__main__
import pytest
import torch
from forks import Forks
from lmms_eval.models import get_model, list_available_models
from PIL import Image

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.answers import evaluate
from mha2mla_vlm.evaluation.lmms_eval.model import MHA2MLA, chat_record, generation_options, until
from mha2mla_vlm.evaluation.lmms_eval.task import messages
from mha2mla_vlm.model.checkpoint import load, load_processor, save
from mha2mla_vlm.model.shipped import ZOO_NAMES
from mha2mla_vlm.zoo.chats import write_chats, zoo_records

pytestmark = pytest.mark.eval
CHATS = 8


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """A server of forks that know lmms-eval, too: to import it takes longer than to evaluate."""
    with Forks(tmp_path_factory.mktemp("forks"), "lmms_eval.__main__", "lmms_eval.cli.dispatch") as running:
        yield running


@pytest.fixture(scope="module", params=ZOO_NAMES)
def zoo(request, harness, tmp_path_factory):
    """A zoo model's name, its conversion on disk, and a task of held-out chats with its records."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    model, processor = load(f"zoo:{name}", dtype=torch.float32), load_processor(f"zoo:{name}")
    chats = zoo_records(name, split="train", samples=24, seed=1)
    sizes = ConversionConfig(qk_rope_head_dim=16, d_kv=8)  # small enough that answers change
    save(convert(model, processor, chats, sizes), processor, folder / "small")
    (folder / "data").mkdir()
    data = write_chats(name, folder / "data", split="test", samples=CHATS, seed=0)
    ended = harness.run("task", data, "-o", folder / "task", "--name", "held_out_digits", folder=folder)
    assert ended.code == 0, ended.said
    return name, folder, load_records(data)


def run(harness, folder, checkpoint, output, *more):
    """What the harness scores, by its own command line."""
    arguments = [f"pretrained={checkpoint}", "dtype=float32", *more]
    program = ["--model", "mha2mla", "--model_args", ",".join(arguments), "--batch_size", "4"]
    program += ["--tasks", "held_out_digits", "--include_path", folder / "task", "--output_path", output]
    ended = harness.run(*program, script=lmms_eval.__main__.__file__, folder=folder)
    results = list(output.rglob("*_results.json"))
    assert (ended.code, len(results)) == (0, 1), ended.out + ended.said  # an error ends it with 0, too
    return json.loads(results[0].read_text())["results"]["held_out_digits"]["exact_match,none"]


@pytest.mark.parametrize("converted", [False, True])
def test_its_score_is_ours(zoo, harness, converted, tmp_path):
    name, folder, records = zoo
    checkpoint = folder / "small" if converted else f"zoo:{name}"
    model = load(checkpoint, dtype=torch.float32)
    expected = evaluate(model, load_processor(checkpoint), records, batch_size=4)
    assert run(harness, folder, checkpoint, tmp_path) == pytest.approx(expected["exact_match"])


def test_it_knows_our_model():
    assert "mha2mla" in list_available_models()
    assert get_model("mha2mla") is MHA2MLA


def test_a_quantised_cache_is_for_converted_models(zoo, harness, tmp_path):
    name, folder, _ = zoo
    with pytest.raises(InputError, match="cache_bits is for converted models"):
        MHA2MLA(f"zoo:{name}", cache_bits=4)
    assert 0 <= run(harness, folder, folder / "small", tmp_path, "cache_bits=4") <= 1


def test_a_task_holds_the_chat_before_every_answer(zoo):
    _, folder, records = zoo
    lines = (folder / "task" / "documents.jsonl").read_text().splitlines()
    asked = [record.before(index) for record in records for index in record.answers()]
    assert len(lines) == len(asked)
    for line, record in zip(lines, asked, strict=True):
        found = chat_record(messages(json.loads(line)))
        assert [m["role"] for m in found.messages] == [m["role"] for m in record.messages]
        assert [m["content"] for m in found.messages] == [m["content"] for m in record.messages]
        pairs = zip(found.images, record.load_images(), strict=True)
        assert all(image.tobytes() == wanted.tobytes() for image, wanted in pairs)


@pytest.mark.parametrize(
    ("given", "expected", "stops"),
    [
        ({}, {"max_new_tokens": 256, "do_sample": False}, []),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0},
            {"max_new_tokens": 16, "do_sample": False},
            [],
        ),
        (
            {"temperature": 0.5, "until": "\n"},
            {"max_new_tokens": 256, "do_sample": True, "temperature": 0.5},
            ["\n"],
        ),
        ({"do_sample": False, "temperature": 1.0}, {"max_new_tokens": 256, "do_sample": False}, []),
        (
            {"num_beams": 3, "image_aspect_ratio": "pad"},
            {"max_new_tokens": 256, "do_sample": False, "num_beams": 3},
            [],
        ),
    ],
)
def test_settings_of_a_task(given, expected, stops):
    assert generation_options(given) == (expected, stops)


def test_a_text_ends_at_the_first_stop():
    assert until(" yes.\n\nQuestion: no", ["\n\n", "Question"]) == "yes."
    assert until("yes", [""]) == "yes"


def test_video_and_audio_are_refused():
    for kind in ("video", "audio"):
        chat = [{"role": "user", "content": [{"type": kind, "url": "a.bin"}]}]
        with pytest.raises(InputError, match="images and text"):
            chat_record(chat)
    image = [{"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (8, 8))}]}]
    assert len(chat_record(image).images) == 1
