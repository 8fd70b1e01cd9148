"""`mha2mla bench` and what it measures with: right figures, never how fast."""

import json

import pytest
import torch
from helpers import original, random_mla, run_command

from mha2mla_vlm.bench.dense import dense_ways
from mha2mla_vlm.bench.layers import best_dense, random_caches, time_attention, time_layers
from mha2mla_vlm.bench.timing import Timing, peak_memory, time_in_turn
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.checkpoint import save

CPU = torch.device("cpu")


@pytest.fixture
def pair(family, tmp_path):
    """Folders of a random original and a random converted model."""
    for name, (model, processor) in (("original", original(family)), ("converted", random_mla(family))):
        save(model, processor, tmp_path / name)
    return tmp_path / "original", tmp_path / "converted"


def bench(pair, *options):
    """The command that times a converted model beside its original."""
    baseline, checkpoint = pair
    return ["bench", checkpoint, "--baseline", baseline, *options]


def test_bench(monkeypatch, capsys, pair, tmp_path, family):
    command = bench(pair, "--context", 40, "--context", 20, "--batch-size", 2)
    options = ["--seconds", 0, "--dtype", "float32", "-o", tmp_path / "report"]
    code, out, err = run_command(monkeypatch, capsys, *command, *options)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert [(row["context"], row["batch"]) for row in result["rows"]] == [(40, 2), (20, 2)]
    size = bytes_per_token(random_mla(family)[0].config, itemsize=4)
    for row in result["rows"]:
        assert row["cache_bytes"] == row["cache_bytes_formula"] == 2 * row["context"] * size
        ratio = row["cache_bytes_original"] / row["cache_bytes"]
        assert row["cache_ratio"] == ratio
        for name in ("attention", "layer", "step", "prefill"):
            assert row[f"{name}_ratio"] > 0
        best = min(row["attention_seconds_original"].values())[0]
        assert row["attention_ratio"] == pytest.approx(best / row["attention_seconds"][0])
    written = json.loads((tmp_path / "report" / "bench.json").read_text())
    assert written == result
    assert (tmp_path / "report" / "bench.svg").stat().st_size > 0


def test_bench_in_few_bits(monkeypatch, capsys, pair, family):
    command = bench(pair, "--context", 160, "--batch-size", 1, "--seconds", 0)
    code, out, err = run_command(monkeypatch, capsys, *command, "--cache-bits", 4, "--dtype", "float32")
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])["rows"][0]
    assert row["cache_bytes"] < 0.5 * row["cache_bytes_formula"]
    assert row["attention_ratio"] > 0


@pytest.mark.parametrize(
    ("order", "says"),
    [(("original", "original"), "not a converted model"), (("converted", "converted"), "the baseline is")],
)
def test_bench_refuses_a_wrong_pair(monkeypatch, capsys, pair, order, says, tmp_path):
    folders = dict(zip(("original", "converted"), pair, strict=True))
    command = ["bench", folders[order[0]], "--baseline", folders[order[1]], "-o", tmp_path / "report"]
    code, out, err = run_command(monkeypatch, capsys, *command)
    assert (code, out) == (2, "")
    assert says in err
    assert not (tmp_path / "report").exists()


def test_bench_refuses_partial_rope_alone(monkeypatch, capsys, tmp_path):
    for name, (model, processor) in (
        ("original", original("llava")),
        ("partial", random_mla("llava", rank=None, modalities=("shared",))),
    ):
        save(model, processor, tmp_path / name)
    command = ["bench", tmp_path / "partial", "--baseline", tmp_path / "original"]
    code, _, err = run_command(monkeypatch, capsys, *command)
    assert code == 2
    assert "caches no latents" in err


def test_dense_ways_agree():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    weights = (q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3).softmax(-1)
    expected = weights @ v.repeat_interleave(2, dim=1)
    for name, way in dense_ways(CPU).items():
        torch.testing.assert_close(way(q, k, v, 0.3), expected, msg=lambda m, n=name: f"{n}: {m}")


def test_timing_leaves_caches_and_models_as_they_were(family):
    (base, _), (model, _) = original(family), random_mla(family)
    dense, latent = random_caches(model, 30, 2)
    before = base.config.get_text_config()._attn_implementation
    for times in (time_attention(model, dense, latent, 0.0), time_layers(base, model, dense, latent, 0.0)):
        assert best_dense(times) in times
        assert all(timing.low <= timing.median <= timing.high for timing in times.values())
    assert dense.get_seq_length() == latent.get_seq_length() == 30
    assert latent.token_modality.mask.shape == (2, 30)
    assert base.config.get_text_config()._attn_implementation == before


def test_each_function_is_called_in_turn():
    calls = []
    functions = {name: (lambda n=name: calls.append(n)) for name in ("a", "b")}
    times = time_in_turn(functions, device=CPU, seconds=0)
    assert set(times) == {"a", "b"}
    assert calls.count("a") >= 7 or calls.count("b") >= 7


def test_quartiles():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.low, timing.median, timing.high) == (1.5, 3.0, 4.5)


def test_peak_memory_sees_what_was_held_for_a_moment():
    with peak_memory(CPU) as found:
        known = torch.ones(200_000_000, dtype=torch.uint8).sum()
    assert known == 200_000_000
    if found["bytes"] is None:
        pytest.skip("this system does not tell")
    assert found["bytes"] >= 150_000_000


def test_generate_in_few_bits(monkeypatch, capsys, pair, family):
    sizes = []
    for options in ([], ["--cache-bits", 8]):
        command = ["generate", pair[1], "--prompt", " ".join(["Read all digits."] * 60), *options]
        code, out, err = run_command(monkeypatch, capsys, *command, "--max-new-tokens", 2)
        assert code == 0, err
        sizes.append(json.loads(out.splitlines()[-1])["cache_bytes"])
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(("folder", "bits", "says"), [(1, 3, "nbits is 3"), (0, 4, "for converted models")])
def test_generate_refuses_bits(monkeypatch, capsys, pair, folder, bits, says):
    command = ["generate", pair[folder], "--prompt", "Read all digits.", "--cache-bits", bits]
    code, out, err = run_command(monkeypatch, capsys, *command)
    assert (code, out) == (2, "")
    assert says in err
