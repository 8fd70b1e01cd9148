"""What attention must take at least: against cases counted by hand, and against the bytes of real caches."""

import pytest
import torch

from mha2mla_vlm.bench.roofline import (
    CARDS,
    KERNEL_SECONDS,
    Card,
    Work,
    latent_work,
    limits,
    original_work,
)
from mha2mla_vlm.config import AttentionSizes, LatentBits, LayerSpec
from mha2mla_vlm.model.cache.latent import LatentLayer

SIZES = AttentionSizes(layers=2, heads=4, kv_heads=2, head_dim=8, hidden=32)
IN_AND_OUT = 2 * 4 * 8 * 2  # bytes of a row's queries and outputs
DECOUPLED = ("text", "vision")


def test_original_counted_by_hand():
    work = original_work(SIZES, context=10, batch=3)
    assert work.bytes == 30 * (2 * 2 * 8 * 2) + 3 * IN_AND_OUT  # keys and values of 2 heads of 8 dims
    assert work.products == 30 * (4 * 8 + 4 * 8)  # scores and values of 4 query heads
    assert work.float32 == 30 * 4 * 4
    assert work.kernels == 2


def test_at_write_counted_by_hand():
    spec = LayerSpec(rope_dim=4, rank=6, modalities=DECOUPLED)
    work = latent_work(spec, SIZES, context=10, batch=3)
    ups = 2 * 6 * (2 * (4 + 8)) * 2  # for two modalities, of 4 unrotated dims and 8 of values a KV head
    assert work.bytes == 30 * (2 * (6 + 2 * 4) + 1) + ups + 3 * IN_AND_OUT
    once = 2 * 6 * 4 * (4 + 8)  # 4 heads' queries to latents, latents to their values
    assert work.products == 30 * 4 * (4 + 6 + 6) + 3 * once
    assert work.bfloat16 == 0
    assert work.kernels == 4


def test_at_read_counted_by_hand():
    spec = LayerSpec(rope_dim=8, rank=6, rotate_at="read")
    work = latent_work(spec, SIZES, context=10, batch=3)
    ups = 6 * (2 * (8 + 8)) * 2
    tables = 2 * 4 * 2  # cos and sin of 4 pairs
    assert work.bytes == 30 * (2 * 6 + tables) + ups + 3 * IN_AND_OUT
    made = 2 * 8 * 6  # 2 heads' keys of 8 dims, of 6 latent dims each
    assert work.products == 30 * (4 * (8 + 6) + made) + 3 * 6 * 4 * 8
    assert work.float32 == 30 * (4 * 4 + 8)  # softmax, and 16 numbers rounded by twos
    assert work.bfloat16 == 30 * 4 * 8  # 8 pairs
    assert work.kernels == 3  # no query meets a latent


def test_bytes_by_channel():
    bits = LatentBits(sixteen=2, eight=2, four=4, two=4)
    spec = LayerSpec(rope_dim=4, rank=12, bits=bits)
    plain, packed = (latent_work(spec, SIZES, 10, 1, unpacked_first=first) for first in (False, True))
    row = 4 + 2 + 2 + 1
    ups = 12 * (2 * (4 + 8)) * 2
    assert plain.bytes == 10 * (row + 2 * 4) + ups + IN_AND_OUT
    assert packed.bytes - plain.bytes == 10 * 2 * 2 * (12 + 2 * 4)  # written, and read again
    assert packed.kernels - plain.kernels == 2  # latents and rotated keys
    assert plain.products == packed.products


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(rope_dim=4, rank=6),
        LayerSpec(rope_dim=8, rank=6, rotate_at="read"),
    ],
)
def test_a_token_costs_the_bytes_that_the_cache_holds(spec):
    rank, rope = spec.widths(SIZES)
    layer = LatentLayer()
    tokens = torch.zeros(1, 1, 10, rank, dtype=torch.bfloat16), torch.zeros(1, 2, 10, rope // 2).bfloat16()
    layer.update(*tokens)
    held = layer.keys.nbytes + layer.values.nbytes
    longer, shorter = (latent_work(spec, SIZES, context, 1).bytes for context in (20, 10))
    tables = 10 * 2 * 4 * 2 if spec.at_read else 0
    assert longer - shorter == held + tables


def test_the_longest_part_counts_and_kernels_come_to_it():
    card = Card(bandwidth=10, tensor=4, float32=2, bfloat16=4)
    found = limits(Work(bytes=20, products=1, float32=0.5, bfloat16=1, kernels=3), card)
    assert found[:3] == (2, 0.5, 1)
    assert found.seconds == 2 + 3 * KERNEL_SECONDS
    assert limits(Work(bytes=1, products=8), card).seconds == 4


def test_cards_are_in_the_order_of_their_bandwidth():
    seconds = [limits(original_work(SIZES, 10**9, 1), card).seconds for card in CARDS.values()]
    assert seconds == sorted(seconds)
