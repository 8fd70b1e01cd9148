"""What a decoding step of attention must take on a GPU at least, from its bytes and operations alone.

A roofline: a layer's step cannot be shorter than its bytes at the card's bandwidth, nor than its products at
the peak of the tensor cores, nor than its other operations at the rate of the vector units. The longest of
the three is taken as if the others hid behind it, and every kernel costs what a node of a CUDA graph costs.
Nothing is measured here but that cost.

Shapes: B batch, S cached tokens, H query heads, G KV heads, D head dim, R rope dims, N = D - R, r latent
dims, K modalities. Seconds and bytes; a multiply-add is one product, two operations of a card's peak.
"""

from typing import NamedTuple

from mha2mla_vlm.config import AttentionSizes, LayerSpec

KERNEL_SECONDS = 3.5e-6  # of one in a CUDA graph, of what 2 and 4 take over 1,024 tokens (docs/gpu, H200)
SOFTMAX = 4  # instructions for each score: scale and subtract, maximum, exponential, sum
ROTATE = 4  # for each pair: two products, two multiply-adds
UNPACK = 4  # for each channel: shift, mask, to a number, subtract


class Card(NamedTuple):
    """Peaks of a GPU: bytes a second, and operations a second (a multiply-add is two)."""

    bandwidth: float
    tensor: float  # bfloat16 with float32 sums, dense
    float32: float  # vector units
    bfloat16: float  # vector units


# NVIDIA's data sheets of the SXM cards (A100 80 GB, H100, H200); vector bfloat16: the white papers of the
# architectures (Ampere: table of peaks; Hopper: twice float32), of which H200 has the same chip as H100.
CARDS = {
    "H200": Card(bandwidth=4.8e12, tensor=989e12, float32=67e12, bfloat16=134e12),
    "H100": Card(bandwidth=3.35e12, tensor=989e12, float32=67e12, bfloat16=134e12),
    "A100": Card(bandwidth=2.039e12, tensor=312e12, float32=19.5e12, bfloat16=39e12),
}


class Work(NamedTuple):
    """What attention of one layer does for one new token of each of B rows."""

    bytes: float
    products: float  # multiply-adds of matrix products
    float32: float = 0.0  # instructions for single numbers
    bfloat16: float = 0.0
    kernels: int = 0


class Limits(NamedTuple):
    """Seconds that each part of a card needs for some work."""

    bytes: float
    products: float
    vector: float
    kernels: float

    @property
    def seconds(self) -> float:
        """The least that the work takes: the longest part, and what starting kernels costs."""
        return max(self.bytes, self.products, self.vector) + self.kernels


def original_work(sizes: AttentionSizes, context: int, batch: int, itemsize: int = 2) -> Work:
    """The original's: all keys and values are read, in two kernels (splits of the cache, their merging)."""
    tokens = batch * context
    return Work(
        bytes=tokens * sizes.numbers_per_token * itemsize + _in_and_out(sizes, batch, itemsize),
        products=tokens * sizes.products,
        float32=SOFTMAX * tokens * sizes.heads,
        kernels=2,
    )


def latent_work(
    spec: LayerSpec,
    sizes: AttentionSizes,
    context: int,
    batch: int,
    itemsize: int = 2,
    *,
    unpacked_first: bool = False,
) -> Work:
    """A converted layer's, from queries to the heads' outputs.

    What a step makes once for all layers is left out. Where latents have bits by channel, `unpacked_first`
    says that a kernel of its own makes numbers of them, as the Triton kernels do. `spec` must have a rank.
    """
    assert spec.rank is not None, "without a latent attention is the original's"
    tokens, nope = batch * context, sizes.head_dim - spec.rope_dim
    kinds, rank, keys = len(spec.modalities), spec.rank, sizes.kv_heads * spec.rope_dim
    read = spec.token_bytes(sizes, itemsize) + (kinds > 1)  # and a byte that says which modality it is
    single = SOFTMAX * sizes.heads
    kernels = 3 + (nope > 0)  # splits, merging, value up projections; what moves queries to the latents
    turned = 0
    if spec.at_read:  # each key is rounded, two numbers at a time, and rotated by tables of cos and sin
        read += itemsize * min(sizes.head_dim, keys)
        single += keys // 2
        turned = ROTATE * (keys // 2)
    if spec.bits is not None:
        single += UNPACK * rank
        if unpacked_first:
            read += 2 * itemsize * sum(spec.widths(sizes))  # written, and read again
            kernels += 1 if spec.at_read else 2
    ups = kinds * rank * spec.outputs(sizes) * itemsize
    once = kinds * rank * sizes.heads * (nope + sizes.head_dim)  # queries to latents, latents to values
    return Work(
        bytes=tokens * read + ups + _in_and_out(sizes, batch, itemsize),
        products=tokens * spec.products(sizes) + batch * once,
        float32=tokens * single,
        bfloat16=tokens * turned,
        kernels=kernels,
    )


def _in_and_out(sizes: AttentionSizes, batch: int, itemsize: int) -> int:
    """Bytes of the queries and of the heads' outputs."""
    return 2 * batch * sizes.heads * sizes.head_dim * itemsize


def limits(work: Work, card: Card) -> Limits:
    """What the parts of a card need for some work, in seconds."""
    return Limits(
        bytes=work.bytes / card.bandwidth,
        products=2 * work.products / card.tensor,
        vector=2 * (work.float32 / card.float32 + work.bfloat16 / card.bfloat16),
        kernels=work.kernels * KERNEL_SECONDS,
    )
