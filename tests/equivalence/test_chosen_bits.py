"""How latents are kept under a budget: what is chosen, in memory and from disk, whatever interrupts it."""

import json

import pytest
import torch
from forks import contents
from helpers import answered, original

from mha2mla_vlm import load
from mha2mla_vlm.config import AttentionSizes
from mha2mla_vlm.conversion.choice import possible
from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.estimate import predict
from mha2mla_vlm.conversion.on_disk import convert_checkpoint
from mha2mla_vlm.conversion.pipeline import convert, make_profile
from mha2mla_vlm.conversion.work_folder import WorkFolder
from mha2mla_vlm.errors import Interrupted
from mha2mla_vlm.model.cache.latent import bytes_per_token
from mha2mla_vlm.model.checkpoint import save
from mha2mla_vlm.zoo.chats import write_chats

FAMILY, NORMED = "qwen2_5_vl", "qwen3_vl"
HYBRID = "qwen3_5"  # normed, too, and most layers stay as they were
AT_READ = ConversionConfig(rotate_at="read", budget=0.2)
# of FAMILY: both are tried, and 16 bits are taken
BACK = ConversionConfig(rotate_at="write", budget=0.07, random_chats=12)
SMALL = ConversionConfig(budget=0.05, rotate_at="write")  # no sizes in 16 bits are so small
NARROW = ["only 5 chats"]


@pytest.fixture
def few(monkeypatch):
    """Few chats are enough: they take seconds."""
    monkeypatch.setattr("mha2mla_vlm.data.breadth.FEW", 2)


@pytest.mark.usefixtures("few")
def test_what_is_measured_for_the_choice_serves_each_way():
    """Exactly: the same curves, sizes and weights, and the better of the two is the default."""
    model, processor = original(FAMILY)
    chats, made = answered(FAMILY), {}
    known = make_profile(model, processor, chats, AT_READ)
    for bits in ("16", "mixed"):
        config = AT_READ.keeping(bits)
        shared, own = (convert(model, processor, chats, config, profile=p) for p in (known, None))
        assert shared.mla_config == own.mla_config
        state = own.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in shared.state_dict().items())
        assert "latent_bits" not in own.findings
        made[bits] = own
    chosen = convert(model, processor, chats, AT_READ, profile=known)
    found, kl = chosen.findings["latent_bits"], {b: m.mla_config.kl["factorization"] for b, m in made.items()}
    assert found["kl"] == kl
    assert kl["mixed"] < kl["16"]
    assert found["chosen"] == "mixed"
    assert chosen.mla_config == made["mixed"].mla_config
    assert chosen.findings["settings"]["latent_bits"] == "auto"
    low, high = chosen.findings["kl_interval"]["factorization"]
    assert low <= kl["mixed"] <= high
    with pytest.raises(ValueError, match="profile was made for"):
        convert(model, processor, chats, AT_READ, profile=make_profile(model, processor, chats, config))


@pytest.mark.usefixtures("few")
def test_sixteen_bits_are_taken_where_they_cost_little(monkeypatch):
    for module in ("choice", "driver"):  # what a model of random weights loses is not
        monkeypatch.setattr(f"mha2mla_vlm.conversion.{module}.ENOUGH", 0.1)
    model, processor = original(FAMILY)
    small = convert(model, processor, answered(FAMILY), ConversionConfig(rotate_at="read", budget=0.5))
    found = small.findings["latent_bits"]
    assert found["predicted_kl"]["mixed"] < found["predicted_kl"]["16"]
    assert list(found["kl"]) == ["16"]
    assert found["kl"]["16"] <= 0.1
    assert "0.1 is little" in found["why"]
    assert small.mla_config.latent_bits is None


@pytest.fixture
def stopped(monkeypatch):
    """Interrupt a conversion on disk after this step, once."""

    def at(step):
        finished = WorkFolder.finished_step

        def then_stop(self, **given):
            finished(self, **given)
            if self.done == step:
                monkeypatch.undo()
                raise KeyboardInterrupt

        monkeypatch.setattr(WorkFolder, "finished_step", then_stop)

    return at


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("config", "steps", "chosen"),
    [
        # 8 steps measure layers; 4 and their loss are a sweep: 16 bits, by channel, 16 bits again
        pytest.param(AT_READ, (10, 13, 15), "mixed", id="by channel"),
        pytest.param(BACK, (12, 17, 18, 20), "16", id="back to 16 bits", marks=pytest.mark.slow),
    ],
)
def test_a_choice_is_resumed_to_the_bytes_of_the_conversion_in_memory(
    config, steps, chosen, stopped, tmp_path, monkeypatch
):
    model, processor = original(FAMILY)
    folder, chats = save(model, processor, tmp_path / "model"), answered(FAMILY, 12)
    model = load(folder)
    expected = convert(model, processor, chats, config)
    assert expected.findings["latent_bits"]["chosen"] == chosen
    assert len(expected.findings["latent_bits"]["kl"]) == 2
    save(expected, processor, tmp_path / "expected")
    for step in steps:
        stopped(step)
        monkeypatch.setattr("mha2mla_vlm.data.breadth.FEW", 2)
        resume = (tmp_path / "small.partial").exists()
        with pytest.raises(Interrupted):
            convert_checkpoint(folder, chats, tmp_path / "small", config, resume=resume)
        monkeypatch.setattr("mha2mla_vlm.data.breadth.FEW", 2)
    result = convert_checkpoint(folder, chats, tmp_path / "small", config, resume=True)
    small, wanted = load(tmp_path / "small"), expected.state_dict()
    assert small.mla_config == expected.mla_config
    assert all(torch.equal(value, wanted[key]) for key, value in small.state_dict().items())
    for name in ("config.json", "conversion.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    found = json.loads((tmp_path / "small" / "conversion.json").read_text())
    assert result.summary["latent_bits_choice"] == found["latent_bits"]["why"]
    assert result.summary["kl_interval"] == found["kl_interval"]["factorization"]
    assert "small.partial" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_two_processes_choose_as_one(forks, tmp_path):
    save(*original(FAMILY), tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_chats(FAMILY, tmp_path / "data", split="train", samples=40, seed=0)
    for processes in (1, 2):
        output = tmp_path / str(processes) / "small"
        given = ("--budget", 0.2, "--rotate-at", "read", "-o", output)
        arguments = ("convert", tmp_path / "model", "--data", tmp_path / "data", *given)
        ended = forks.run(*arguments, folder=tmp_path, processes=processes)
        assert ended.code == 0, ended.said
        assert json.loads(ended.out.splitlines()[-1])["latent_bits_choice"]
    one, two = (contents(tmp_path / name) for name in ("1", "2"))
    assert one == two


def test_what_is_possible(few):
    model, _ = original(FAMILY)
    config = ConversionConfig(budget=0.2)
    assert possible(model, config, []) == (config, "")
    bits = config.keeping("mixed")
    assert possible(model, bits, NARROW) == (bits, "")  # what was asked for
    found, why = possible(model, config, NARROW)
    assert found == config.keeping("16")
    assert "calibration is narrow (only 5 chats)" in why
    found, why = possible(model, SMALL, [])
    assert found == SMALL.keeping("mixed")
    assert "no sizes in 16 bits" in why
    whole = ConversionConfig(budget=0.2, factorization="weight-svd")
    assert possible(model, whole, []).config == whole.keeping("16")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", [NORMED, pytest.param(HYBRID, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["auto", "write"])
def test_normed_keys_have_bits_by_channel_at_read_only(name, mode):
    model, processor = original(name)
    config = ConversionConfig(rotate_at=mode, budget=0.15)
    small = convert(model, processor, answered(name, 4), config)
    found, mla = small.findings["latent_bits"], small.mla_config
    assert bytes_per_token(small.config) <= 0.15 * bytes_per_token(model.config)
    assert ("mixed" in found["kl"]) == (mode == "auto")
    if mode == "write":
        assert "normed" in found["why"]
    if mla.latent_bits is not None:
        assert {spec.rotate_at for spec in mla.layers(AttentionSizes.of(model.config)) if spec} == {"read"}


@pytest.mark.usefixtures("few")
def test_an_estimate_is_made_of_what_may_be_chosen(tmp_path):
    folder, chats = save(*original(FAMILY), tmp_path / "model"), answered(FAMILY)
    for config in (AT_READ, SMALL):
        found = predict(folder, chats, config)
        share = found.bytes_per_token / found.bytes_per_token_original
        least = 0.2 if config == SMALL else 0.5  # of the original in float32 bits are half of a share
        assert least * config.budget < share <= config.budget
