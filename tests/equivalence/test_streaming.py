"""Conversion from disk, a layer at a time: the model that conversion in memory gives, whatever happens."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from forks import contents
from helpers import original, prompt_inputs, run_command, whole_logits
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mha2mla_vlm.conversion.config import ConversionConfig
from mha2mla_vlm.conversion.estimate import predict
from mha2mla_vlm.conversion.on_disk import convert_checkpoint
from mha2mla_vlm.conversion.pipeline import convert
from mha2mla_vlm.data.sources import load_records
from mha2mla_vlm.errors import InputError
from mha2mla_vlm.model.checkpoint import load, load_processor, save
from mha2mla_vlm.zoo.chats import write_chats

SIZES = ("--qk-rope-head-dim", "16", "--d-kv", "8")
FAMILY = "qwen2_5_vl"  # where one is enough
AUTO = ("--rotate-at", "auto", "--max-decode-cost", "4")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """`{family: folder}` of random originals in several shards, and of chats about them."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model, processor = original(family)
            model.save_pretrained(folder / "model", max_shard_size="3MB")
            processor.save_pretrained(folder / "model")
            (folder / "data").mkdir()
            write_chats(family, folder / "data", split="train", samples=5, seed=0)
            made[family] = folder
        return made[family]

    return get


def chats(folder):
    return load_records(folder / "data" / "chats.jsonl")


def assert_same(found, expected):
    """Two models of the same weights, bit-identical, and of the same configuration."""
    state, wanted = found.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(state[key], wanted[key])]
    assert found.mla_config == expected.mla_config


@pytest.mark.long
@pytest.mark.parametrize("factorization", ["output-weighted", "md-svd", "none"])
def test_it_is_the_conversion_in_memory(family, factorization, checkpoints, tmp_path):
    folder = checkpoints(family)
    d_kv = None if factorization == "none" else 8
    assert_streamed_alike(folder, tmp_path, qk_rope_head_dim=16, d_kv=d_kv, factorization=factorization)


@pytest.mark.long
@pytest.mark.parametrize("factorization", ["output-weighted", "md-svd"])
def test_a_budget_is_allocated_as_in_memory(family, factorization, checkpoints, tmp_path):
    small = assert_streamed_alike(
        checkpoints(family), tmp_path, budget=0.3, factorization=factorization, rope_selection="mkl"
    )
    assert len(set(zip(small.mla_config.qk_rope_head_dim, small.mla_config.kv_lora_rank, strict=True))) > 1


@pytest.mark.long
@pytest.mark.parametrize("factorization", ["output-weighted-shrunk", "md-svd"])
def test_modes_are_chosen_as_in_memory(family, factorization, checkpoints, tmp_path):
    options = {"rotate_at": "auto", "max_decode_cost": 4.0, "factorization": factorization}
    small = assert_streamed_alike(checkpoints(family), tmp_path, **options)
    assert set(small.mla_config.rotate_at) == {"write", "read"}


def assert_streamed_alike(folder, tmp_path, **options):
    """Conversion from disk gives what conversion in memory does, in every file; returns the model."""
    config = ConversionConfig(**options)
    convert_checkpoint(folder / "model", chats(folder), tmp_path / "small", config)
    model, processor = load(folder / "model"), load_processor(folder / "model")
    expected = convert(model, processor, chats(folder), config)
    small = load(tmp_path / "small")
    assert_same(small, expected)
    save(expected, processor, tmp_path / "saved")
    for name in (
        "config.json",
        "conversion.json",
        "generation_config.json",
        "tokenizer.json",
        "modeling_mha2mla.py",
    ):
        assert (tmp_path / "small" / name).read_text() == (tmp_path / "saved" / name).read_text()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    return small


def test_a_model_with_partial_rope_is_factorised_from_disk(checkpoints, tmp_path):
    folder = checkpoints(FAMILY)
    first = ConversionConfig(qk_rope_head_dim=16, factorization="none")
    convert_checkpoint(folder / "model", chats(folder), tmp_path / "partial", first)
    config = ConversionConfig(d_kv=8, factorization="md-svd")
    convert_checkpoint(tmp_path / "partial", chats(folder), tmp_path / "small", config)
    partial = load(tmp_path / "partial")
    before = {key: value.clone() for key, value in partial.state_dict().items()}
    expected = convert(partial, load_processor(folder / "model"), chats(folder), config)
    assert_same(load(tmp_path / "small"), expected)
    assert all(torch.equal(before[key], value) for key, value in partial.state_dict().items())


def test_tied_embeddings_and_bfloat16_stay(checkpoints, tmp_path):
    folder = checkpoints(FAMILY)
    model, processor = original(FAMILY)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    save(model.bfloat16(), processor, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    config = ConversionConfig(qk_rope_head_dim=16, d_kv=8)
    convert_checkpoint(tmp_path / "tied", chats(folder), tmp_path / "small", config)
    small = load(tmp_path / "small")
    assert small.dtype == torch.bfloat16
    assert small.lm_head.weight is small.get_input_embeddings().weight
    inputs = prompt_inputs(FAMILY, processor, ["image"])
    assert bool(whole_logits(small, inputs).isfinite().all())


def command(folder, output, *more, sizes=SIZES):
    data = folder / "data" / "chats.jsonl"
    return [str(x) for x in ("convert", folder / "model", "--data", data, "-o", output, *sizes, *more)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(forks, checkpoints, tmp_path_factory):
    """Files of a conversion of one family that nothing interrupts, by its sizes."""
    made = {}

    def get(sizes):
        if sizes not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            ended = forks.run(*command(checkpoints(FAMILY), folder / "small", sizes=sizes), folder=folder)
            assert ended.code == 0, ended.said
            made[sizes] = files(folder / "small")
        return made[sizes]

    return get


@pytest.fixture
def assert_resumed(forks, checkpoints, unbroken, tmp_path):
    """A run that is killed as a file gets its name resumes to what an unbroken one makes."""

    def check(place, sizes, *more, times=1):
        output = tmp_path / "small"
        arguments = command(checkpoints(FAMILY), output, *more, sizes=sizes)
        killed = forks.run(*arguments, folder=tmp_path, renamed=place, event=times)
        assert killed.code == -9
        assert not output.exists()
        again = forks.run(*arguments, folder=tmp_path)
        assert again.code == 2
        assert "--resume" in again.said
        resumed = forks.run(*arguments, "--resume", folder=tmp_path)
        assert resumed.code == 0, resumed.said
        assert json.loads(resumed.out)["output"] == str(output)
        assert files(output) == unbroken(sizes)
        assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or "states" in path.name]

    return check


@pytest.mark.parametrize(
    "place",
    [
        "progress.json",  # before anything is done
        "model-00003-of-00005.safetensors",  # a shard is written but not yet in its place
        "small",  # all is done but for the last name
    ],
)
@pytest.mark.parametrize("spill", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_to_the_same_bytes(assert_resumed, place, spill, tmp_path):
    more = ("--spill", tmp_path / "spilled") if spill else ()
    assert_resumed(place, SIZES, *more)


@pytest.mark.parametrize(
    ("place", "times"),
    [
        ("layer 2.safetensors", 1),  # while layers are measured
        ("progress.json", 6),  # while their losses are
        ("model-00002-of-00005.safetensors", 1),
    ],
)
def test_a_budget_is_resumed_to_the_same_bytes(assert_resumed, place, times):
    assert_resumed(place, ("--budget", "0.3"), times=times)


@pytest.mark.parametrize(("place", "times"), [("layer 2.safetensors", 1), ("progress.json", 7)])
def test_chosen_modes_are_resumed_to_the_same_bytes(assert_resumed, place, times):
    assert_resumed(place, AUTO, times=times)


def test_a_run_is_not_resumed_with_other_settings(forks, checkpoints, tmp_path):
    arguments = command(checkpoints(FAMILY), tmp_path / "small")
    killed = forks.run(*arguments, folder=tmp_path, renamed="model-00002-of-00005.safetensors", event=1)
    assert killed.code == -9
    again = forks.run(*arguments, "--resume", "--no-fold", folder=tmp_path)
    assert again.code == 2
    assert "begun with another config" in again.said


def launched(arguments):
    """Two processes of the command, as users start them; the last line of what they print."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = [*launch, "-m", "mha2mla_vlm", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("sizes", [SIZES, ("--budget", "0.3")])
def test_two_processes_give_what_one_gives(sizes, forks, checkpoints, tmp_path):
    folder, data = checkpoints(FAMILY), tmp_path / "data"
    data.mkdir()
    write_chats(FAMILY, data, split="train", samples=10, seed=3)
    arguments = ("convert", folder / "model", "--data", data, *sizes, "-o")
    alone = forks.run(*arguments, tmp_path / "one" / "small", folder=tmp_path)
    assert alone.code == 0, alone.said
    if sizes == SIZES:
        printed = launched([str(x) for x in (*arguments, tmp_path / "two" / "small")])
    else:
        together = forks.run(*arguments, tmp_path / "two" / "small", folder=tmp_path, processes=2)
        assert together.code == 0, together.said
        printed = together.out
    one, two = (json.loads(text.splitlines()[-1]) for text in (alone.out, printed))
    assert two["kl"] == one["kl"]
    expected, found = (contents(tmp_path / name) for name in ("one", "two"))
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


ALONE = """
import sys
import torch.distributed as dist
from mha2mla_vlm import ConversionConfig, convert, load, load_processor, load_records
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    model, processor = load(sys.argv[1]), load_processor(sys.argv[1])
    config = ConversionConfig(qk_rope_head_dim=16, d_kv=8)
    small = convert(model, processor, load_records(sys.argv[2]), config)
    print(small.mla_config.kl["factorization"])
"""


def test_one_process_of_a_group_may_convert_by_itself(forks, checkpoints, tmp_path):
    """A process group does not say that the others call it too: it would wait for them."""
    folder, script = checkpoints(FAMILY), tmp_path / "alone.py"
    script.write_text(ALONE)
    arguments = (folder / "model", folder / "data" / "chats.jsonl")
    ended = forks.run(*arguments, script=str(script), processes=2, folder=tmp_path)
    assert ended.code == 0, ended.said
    assert 0 < float(ended.out.splitlines()[-1]) < 10  # PyTorch 2.9 prints, too


def test_an_adapter_is_merged_first(checkpoints, tmp_path, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    folder, data = checkpoints(FAMILY), tmp_path / "data"
    data.mkdir()
    write_chats(FAMILY, data, split="train", samples=6, seed=3)
    names = r".*language_model.*\.(q|k|v|gate)_proj"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=names, init_lora_weights=False)
    adapted = peft.get_peft_model(load(folder / "model"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    model = shutil.copytree(folder / "model", tmp_path / "model")
    (model / "README.md").write_text("---\nlicense: mit\nbase_model: org/first\n---\n")
    save(adapted.merge_and_unload(), load_processor(folder / "model"), tmp_path / "merged")

    def run(output, *model):
        given = ("--data", data / "chats.jsonl", "-o", tmp_path / output, *SIZES)
        return run_command(monkeypatch, capsys, "convert", *model, *given)

    assert run("one", model, "--adapter", tmp_path / "adapter")[0] == 0
    assert run("two", tmp_path / "merged")[0] == 0
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert replace(two.mla_config, original=None) == one.mla_config
    assert all(torch.equal(value, two.state_dict()[key]) for key, value in one.state_dict().items())
    assert not (tmp_path / "one.merged").exists()
    card = ModelCard.load(tmp_path / "one" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "org/first")
    assert "Converted from `model`, after the adapter `adapter` was merged into it" in card.text
    assert str(tmp_path) not in card.content + (tmp_path / "one" / "conversion.json").read_text()
    code, _, err = run("three", folder / "model", "--adapter", data)
    assert code == 2
    assert "cannot merge the adapter" in " ".join(err.split())
    assert not list(tmp_path.glob("three*"))


def test_too_many_processes_for_the_chats_are_refused(forks, checkpoints, tmp_path):
    arguments = command(checkpoints(FAMILY), tmp_path / "small")
    ended = forks.run(*arguments, processes=2, folder=tmp_path)
    assert ended.code != 0
    assert "too few for 2 processes" in ended.said
    assert not list(tmp_path.glob("small*"))


def broken(folder, target, change):
    """A copy of a checkpoint with something wrong."""
    shutil.copytree(folder / "model", target)
    change(target, sorted(target.glob("*.safetensors")))
    return target


def test_broken_shards_are_named_before_work_starts(checkpoints, tmp_path):
    folder, config = checkpoints(FAMILY), ConversionConfig(qk_rope_head_dim=16, d_kv=8)

    def cut(_, shards):
        shards[1].write_bytes(shards[1].read_bytes()[:-100])

    def remove(_, shards):
        shards[1].unlink()

    def to_bin(target, shards):
        for shard in shards:
            shard.unlink()
        (target / "model.safetensors.index.json").unlink()
        torch.save({}, target / "pytorch_model.bin")

    for change, says in ((cut, "00002-of"), (remove, "00002-of"), (to_bin, "pytorch_model.bin: save it as")):
        source = broken(folder, tmp_path / change.__name__, change)
        with pytest.raises(InputError, match=says):
            convert_checkpoint(source, chats(folder), tmp_path / "small", config)
    assert not list(tmp_path.glob("small*"))


def test_numbers_that_are_not_finite_name_their_layer(checkpoints, tmp_path):
    def spoil(_, shards):
        for shard in shards:
            tensors = load_file(shard)
            for key in tensors:
                if ".layers.2.self_attn.k_proj.weight" in key:
                    tensors[key] = tensors[key].clone()
                    tensors[key][0, 0] = torch.nan
            save_file({k: v.clone() for k, v in tensors.items()}, shard, metadata={"format": "pt"})

    folder = checkpoints(FAMILY)
    source = broken(folder, tmp_path / "spoiled", spoil)
    with pytest.raises(InputError, match="layer 2: calibration gives numbers that are not finite"):
        convert_checkpoint(
            source, chats(folder), tmp_path / "small", ConversionConfig(qk_rope_head_dim=16, d_kv=8)
        )
    assert json.loads((tmp_path / "small.partial" / "progress.json").read_text())["done"] == 2


def test_a_full_disk_is_said_and_what_was_done_is_kept(forks, checkpoints, tmp_path):
    output = tmp_path / "small"
    arguments = command(checkpoints(FAMILY), output)
    full = forks.run(*arguments, largest=1_000_000, folder=tmp_path)
    assert full.code == 2, full.said
    assert "layer 0: cannot write in" in full.said
    assert "resume with --resume" in full.said
    assert forks.run(*arguments, "--resume", folder=tmp_path).code == 0
    load(output)


@pytest.mark.parametrize("sizes", [SIZES, ("--rotate-at", "write", "--budget", "0.25")])
def test_a_dry_run_estimates_sizes(monkeypatch, capsys, family, sizes, checkpoints, tmp_path):
    folder = checkpoints(family)
    arguments = command(folder, tmp_path / "small", sizes=sizes)
    code, out, err = run_command(monkeypatch, capsys, *arguments, "--dry-run")
    assert code == 0, err
    assert not list(tmp_path.iterdir())
    predicted = json.loads(out)
    code, out, err = run_command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    found = json.loads(out)
    for name in ("bytes_per_token", "bytes_per_token_original"):
        assert predicted[name] == found[name]
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert predicted["output_bytes"] == pytest.approx(size, rel=0.02)
    assert predicted["phases"].keys() == found["seconds"].keys()


def test_a_dry_run_refuses_what_conversion_would(checkpoints):
    folder = checkpoints(FAMILY)
    with pytest.raises(InputError, match="give at least 2"):
        predict(folder / "model", chats(folder)[:1], ConversionConfig(qk_rope_head_dim=16))
    with pytest.raises(InputError, match="give an even number"):
        predict(folder / "model", chats(folder), ConversionConfig(qk_rope_head_dim=15))
