"""The report of a conversion: its figures are those that the package measures, and the page stands alone."""

import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers import answered, original, run_command

from mha2mla_vlm.calibration.statistics import visual_mask
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.data.records import Record, encode_with_labels
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.evaluation.answers import (
    Answered,
    answer_log_probs,
    evaluate,
    evaluate_answers,
    kl_sum,
    predicted,
)
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.model.families import get_family
from mha2mla_vlm.model.modality import TokenModality
from mha2mla_vlm.model.modeling import decoder_layers
from mha2mla_vlm.report import plots
from mha2mla_vlm.report.gather import EXAMPLES, choose_examples, gather
from mha2mla_vlm.report.page import render
from mha2mla_vlm.report.plots import layer_colors
from mha2mla_vlm.zoo.chats import write_chats


@pytest.fixture(scope="module")
def conversions():
    """`{family: (converted, original, processor, report of six chats)}` of random tiny models."""
    made = {}

    def get(family):
        if family not in made:
            model, processor = original(family)
            small = convert(
                model, processor, answered(family), ConversionConfig(rotate_at="write", budget=0.3)
            )
            page = gather(
                small,
                model,
                processor,
                answered(family),
                name="tiny & <small>",
                findings=small.findings,
                layer_samples=2,
            )
            made[family] = small, model, processor, page
        return made[family]

    return get


class Page(HTMLParser):
    """Addresses that a page refers to, and how many of each element it has."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.count = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag != "a":
            self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "srcset")]


def test_its_figures_are_those_that_evaluate_gives(family, conversions):
    small, model, processor, page = conversions(family)
    expected = evaluate(small, processor, answered(family), baseline=model)
    assert page.by_kind == expected["by_kind"]
    assert page.quality == {k: v for k, v in expected.items() if k not in ("records", "by_kind")}
    before, after, coded = page.bytes_per_token
    assert after / before == pytest.approx(0.3, rel=0.1)
    assert coded < after / 4
    for index, layer in enumerate(page.layers):
        spec = small.mla_config.layer(index)
        assert (layer.rope_dim, layer.rank) == (spec.rope_dim, spec.rank)
        assert layer.pairs == decoder_layers(small)[index].self_attn.rope_pairs.tolist()
        assert layer.spectra.keys() == {"text", "vision"}
        for spectrum in layer.spectra.values():
            values = [value for _, value in spectrum]
            assert values[0] == 1.0
            assert values == sorted(values, reverse=True)


def test_a_layer_alone_costs_what_a_model_with_only_that_layer_converted_loses(family, conversions):
    small, model, processor, page = conversions(family)
    visual = get_family(family).visual_token_ids(model.config)
    batches = [encode_with_labels(processor, [record], visual) for record in answered(family)[:2]]
    total = tokens = 0.0
    layer = decoder_layers(model)[1]
    for batch in batches:
        expected = answer_log_probs(model, batch)
        kept, layer.self_attn = layer.self_attn, decoder_layers(small)[1].self_attn
        try:
            modality = TokenModality.from_mask(visual_mask(batch, visual)[None])
            handle = layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, given=modality: (args, kwargs | {"token_modality": given}),
                with_kwargs=True,
            )
            total += kl_sum(answer_log_probs(model, batch), expected)
        finally:
            handle.remove()
            layer.self_attn = kept
        tokens += int(predicted(batch).sum())
    assert page.layers[1].measured == pytest.approx(total / tokens, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("scheme", "back"), [("light", "#ffffff"), ("dark", "#14171c")])
def test_lines_stand_out_from_the_page(scheme, back):
    def luminance(color):
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    colors = [*layer_colors(40)[scheme], plots.ORIGINAL, plots.CONVERTED, plots.FOUR_BITS]
    pairs = [sorted((luminance(color), luminance(back))) for color in colors]
    assert min((light + 0.05) / (dark + 0.05) for dark, light in pairs) >= 3  # WCAG 2.2, 1.4.11
    ramp = [luminance(color) for color in layer_colors(40)[scheme]]
    assert ramp == sorted(ramp)  # so that lightness alone tells layers apart


def test_examples_are_of_every_outcome():
    def one(found, theirs, kind):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "7", "kind": kind}]
        given = {"record": Record(messages=messages), "index": 1, "tokens": 1, "loss": 0.0, "kl": 0.0}
        return Answered(**given, found=found, theirs=theirs)

    outcomes = {"worse": ("1", "7"), "better": ("7", "1"), "": ("7", "7")}
    answers = [one(*said, kind) for said in outcomes.values() for kind in "ab" for _ in range(EXAMPLES)]
    found = [(example.change, example.answer.kind) for example in choose_examples(answers)]
    assert found == [(c, kind) for c in outcomes for _ in range(EXAMPLES // 6) for kind in "ab"]


def test_where_all_pairs_stay_there_is_no_plot_of_them(conversions):
    page = conversions("llava")[3]
    every = [list(range(page.sizes.rotary_dim // 2))] * page.sizes.kv_heads
    text = render(replace(page, layers=[replace(layer, pairs=every) for layer in page.layers]))
    assert "All frequency pairs of all layers stay rotated" in text
    assert Page(text).count["svg"] == 2 * 3


def test_seconds_are_those_of_both_models(family, conversions):
    speed = conversions(family)[3].speed
    assert (speed.answers, speed.new_tokens, speed.on_gpu) == (6, 17, False)
    assert min(*speed.first, *speed.later) > 0
    text = render(conversions(family)[3])
    assert "This is not what a GPU would take." in text
    assert "What it costs: time" in text


def test_disagreements_come_first(family, conversions):
    _, _, _, page = conversions(family)
    agree = [example.agree for example in page.examples]
    assert agree == sorted(agree)
    assert len(page.examples) == page.quality["answers"] == 9


@pytest.mark.parametrize(
    ("worse", "better", "shown", "said"),
    [(3, 1, "", "no difference"), (9, 1, "loss", "answers worse"), (0, 6, "gain", "answers better")],
)
def test_only_what_chance_does_not_bring_is_called_a_change(conversions, worse, better, shown, said):
    page = conversions("llava")[3]
    kinds = {kind: row | {"worse": worse, "better": better} for kind, row in page.by_kind.items()}
    text = render(replace(page, quality=page.quality | {"worse": worse, "better": better}, by_kind=kinds))
    assert f"{said}" in text
    assert f"{worse} became wrong, {better} became right" in text
    assert text.count(f'<td class="{shown}">') == len(kinds)


def test_the_page_needs_nothing_else(family, conversions):
    text = render(conversions(family)[3])
    page = Page(text)
    assert page.count["svg"] == 2 * 4  # for wide and for narrow windows
    assert page.count["img"] >= 6
    assert not [a for a in page.addresses if not a.startswith(("data:", "#"))]
    assert "@import" not in text
    assert "url(http" not in text
    assert "tiny &amp; &lt;small&gt;" in text
    assert len(text.encode()) < 3_000_000
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_answers_are_taken_one_by_one(family, conversions):
    small, model, processor, _ = conversions(family)
    answers = evaluate_answers(small, processor, answered(family), baseline=model)
    assert [answer.expected for answer in answers] == ["7"] * 9
    total = evaluate(small, processor, answered(family), baseline=model)
    tokens = sum(answer.tokens for answer in answers)
    assert sum(answer.kl for answer in answers) / tokens == pytest.approx(total["kl"])
    assert evaluate_answers(small, processor, answered(family)[:1])[0].theirs is None


def test_an_original_has_no_report(family):
    model, processor = original(family)
    with pytest.raises(InputError, match="not a converted model"):
        gather(model, model, processor, answered(family), name="it")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted checkpoint, its original and chats, on disk."""
    folder = tmp_path_factory.mktemp("report")
    model, processor = original("llava")
    save(model, processor, folder / "model")
    (folder / "data").mkdir()
    write_chats("llava", folder / "data", split="train", samples=6, seed=0)
    return folder


def timeless(text):
    """A page without the seconds that answers took."""
    times = r"[\d.]+ m?s"
    return re.sub(rf"<td>{times}</td><td>{times}</td>", "", text)


def test_convert_evaluates_and_report_makes_the_same_page_again(monkeypatch, capsys, folders):
    out, data = folders / "small", folders / "data"
    command = ["convert", folders / "model", "--data", data, "-o", out, "--budget", 0.3]
    code, printed, err = run_command(monkeypatch, capsys, *command, "--eval-data", data)
    assert code == 0, err
    result = json.loads(printed)
    first = (out / "report.html").read_text()
    assert result["report"] == str(out / "report.html")
    code, printed, err = run_command(monkeypatch, capsys, "report", out, "--data", data)
    assert code == 0, err
    assert json.loads(printed)["kl"] == pytest.approx(result["quality"]["kl"])
    assert "mha2mla convert" in first
    assert timeless((out / "report.html").read_text()) == timeless(first)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "give held-out chats with --data"),
        (["--data", "DATA", "-o", "absent/page.html"], "absent is no folder"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_a_report_says_what_it_lacks(monkeypatch, capsys, folders, tmp_path, more, says):
    model, processor = original("llava")
    small = convert(model, processor, answered("llava"), ConversionConfig(qk_rope_head_dim=16, d_kv=8))
    small.config.mla = small.config.mla | {"original": str(folders / "model")}
    save(small, processor, tmp_path / "small")
    more = [folders / "data" if item == "DATA" else item for item in more]
    code, _, err = run_command(monkeypatch, capsys, "report", tmp_path / "small", *more)
    assert code == 2
    assert says in " ".join(err.split())
    assert not list(tmp_path.rglob("*.html"))


def test_a_conversation_goes_on(monkeypatch, capsys, folders, tmp_path):
    image = next((folders / "data" / "images").glob("*.png"))
    lines = f"/image {image}\nAnd here?\n/image {tmp_path / 'absent.png'}\nSure?\n\nnot asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    command = ["generate", folders / "model", "--image", image, "--image", image, "--interactive"]
    command += ["--prompt", "Read all digits.", "--max-new-tokens", 2]
    code, out, err = run_command(monkeypatch, capsys, *command)
    assert code == 0, err
    assert "absent.png does not exist" in " ".join(err.split())
    alone = ["generate", folders / "model", "--image", image, "--prompt", "Sure?", "--max-new-tokens", 2]
    _, once, _ = run_command(monkeypatch, capsys, *alone)
    tokens, first = json.loads(out)["prompt_tokens"], json.loads(once)["prompt_tokens"]
    assert tokens > 2.5 * first  # three images, three questions and two answers


def test_a_conversation_without_a_question_is_an_error(monkeypatch, capsys, folders):
    code, _, err = run_command(monkeypatch, capsys, "generate", folders / "model")
    assert code == 2
    assert "--prompt" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = run_command(monkeypatch, capsys, "generate", folders / "model", "--interactive")
    assert code == 2
    assert "no question" in err


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["chat", "MODEL"], "gradio", "chat"),
        (["report", "MODEL"], "matplotlib", "report"),
        (["demo", "--output", "OUT"], "matplotlib", "report"),
        (["convert", "MODEL", "--data", "no", "-o", "OUT", "--eval-data", "no"], "matplotlib", "report"),
    ],
)
def test_a_command_says_at_once_what_it_needs(monkeypatch, capsys, tmp_path, command, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    places = {"MODEL": tmp_path, "OUT": tmp_path / "out"}
    code, _, err = run_command(monkeypatch, capsys, *(places.get(item, item) for item in command))
    assert code == 2
    assert f"needs the package {package}: pip install 'mha2mla-vlm[{extra}]'" in " ".join(err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "says"), [("two words", "'two words'"), ("1st", "'1st'")])
def test_a_task_needs_a_name_that_can_be_one(monkeypatch, capsys, folders, tmp_path, name, says):
    command = ["task", folders / "data", "-o", tmp_path / "task", "--name", name]
    code, _, err = run_command(monkeypatch, capsys, *command)
    assert code == 2
    assert says in err
    assert not list(tmp_path.iterdir())


def test_a_task_needs_answers(monkeypatch, capsys, tmp_path):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    command = ["task", tmp_path / "chats.jsonl", "-o", tmp_path / "task", "--name", "asked"]
    code, _, err = run_command(monkeypatch, capsys, *command)
    assert code == 2
    assert "no assistant messages" in err
    assert not (tmp_path / "task").exists()
