// Decoding over latents on a CPU with AVX-512 BF16; model/absorbed.py is its specification.
//
// One kernel does it all: it moves the key half of the up projections to the queries, attends over the
// cache in one pass (scores, softmax and sums of a tile of tokens while they are in the L2 cache), and
// applies the value half. Everything is one product of bfloat16 pairs, summed in float32:
//     out[i][lane] += sum over k of a[i][k] * x[k][lane]
// where a is queries or weights, and x is rows packed so that a vector holds 16 lanes of pairs. Tokens in few
// bits become numbers a tile at a time.
//
// Shapes: B batch, T new tokens, S all tokens, G KV heads, M query heads per KV head, R rope dims, N other
// dims, D head dim, r latent dims, K modalities; Q = G * M * T rows, ordered by KV head, head, token.

#include "cpu_source.h"

#include <cmath>
#include <vector>

extern "C" {

struct Up {
  const bf16 *key, *value;  // [G, N, r] and [G, D, r], rows dense
  long group;               // numbers from one KV head to the next
  const bf16 *key_bias, *value_bias;  // [G, N] and [G, D], or null
  long bias_group;
};

struct Call {
  int batch, groups, row_group, new_tokens, rope, nope, head, rank, kinds, threads;
  long total;
  float scaling;
  const bf16 *q_rope, *q_nope;  // [B, Q, R] and [B, Q, N], dense
  Up up[2];
  Source latent, k_rope;  // [B, 1, S, r] and [B, G, S, R]
  const uint8_t* visual;  // [B, S], or null where there is one modality
  long visual_batch;
  const uint8_t* mask;  // [B, T, S], what is seen, or null
  long mask_batch, mask_row;
  const int32_t* lengths;  // [B], tokens of each row, or null where all have `total`
  bf16* out;  // [B, Q, D], dense
};
}

namespace {

constexpr int MOST_PARTS = 64;  // threads that share the tokens of a row of the batch

// The sums of one thread's tokens.
struct Part {
  float *sums, *top, *mass, *text;  // [K, Q, r], [Q], [Q], [Q]
};

struct Sizes {
  int rows, lanes, rank, pairs, columns;  // lanes: rows, up to whole vectors
  int sums_row, query_row;  // float32 and pairs to the next row: a cache line over, not to share cache sets
  long queries, constants;  // of a row of the batch
  explicit Sizes(const Call& c)
      : rows(c.groups * c.row_group),
        lanes(up_to(rows, LANES)),
        rank(up_to(c.rank, 32)),
        pairs((c.rank + 1) / 2),
        columns(up_to(c.rank, LANES)),
        sums_row(rank + LANES),
        query_row(rank / 2 + LANES),
        queries(long(c.kinds) * rows * query_row),
        constants(long(c.kinds) * lanes) {}
};

// What a thread works in; kept from call to call, and enlarged when a call needs more.
struct Scratch {
  __m512i *rows = nullptr, *columns = nullptr, *queries = nullptr;
  float *scores = nullptr, *other = nullptr, *turned = nullptr;
  uint32_t *weights = nullptr, *pairs = nullptr;
  bf16 *latent = nullptr, *keys = nullptr;  // tiles of quantised tokens
  long row_room = 0, width_room = 0, tile_room = 0;

  void fit(const Call& c, const Sizes& z) {
    const long rows_wanted = std::max(z.lanes, c.batch * c.row_group), width_wanted = std::max({z.rank, up_to(c.rope, 32), up_to(c.nope, 32), 32});
    const long tile_wanted = std::max(TILE, up_to(std::max(c.nope, c.head), LANES));
    if (rows_wanted <= row_room && width_wanted <= width_room && tile_wanted <= tile_room) return;
    row_room = std::max(row_room, rows_wanted), width_room = std::max(width_room, width_wanted);
    tile_room = std::max(tile_room, tile_wanted);
    for (void* p : {(void*)rows, (void*)columns, (void*)queries, (void*)scores, (void*)other, (void*)turned,
                    (void*)weights, (void*)pairs, (void*)latent, (void*)keys})
      std::free(p);
    rows = buffer<__m512i>(std::max(TILE / LANES * width_room / 2, row_room));
    queries = buffer<__m512i>(2 * row_room / LANES * width_room / 2);
    turned = buffer<float>(TILE * row_room);
    columns = buffer<__m512i>(tile_room / 2 * (width_room / LANES));
    scores = buffer<float>(row_room * TILE);
    other = buffer<float>(row_room * std::max<long>(TILE, width_room));
    weights = buffer<uint32_t>(2 * row_room * TILE / 2);
    pairs = buffer<uint32_t>(2 * row_room * width_room / 2);
    latent = buffer<bf16>(TILE * width_room + 32);  // what is unpacked may write so many more
    keys = buffer<bf16>(TILE * width_room + 32);
  }
};

thread_local Scratch scratch;

// Rows of the batch from `start` to `stop` that meet an up projection together, which is read once for them.
struct Share {
  int start, stop;
};

// Of one KV head, queries[b][k][row] = q_nope Wk, as pairs, and constants[b][k][row] = q_nope . bk
void absorb(const Call& c, const Sizes& z, Share share, int g, uint32_t* queries, float* constants) {
  Scratch& s = scratch;
  const int nope_pairs = up_to(c.nope, 2) / 2, count = (share.stop - share.start) * c.row_group;
  const auto nope_of = [&](int i) {
    const int b = share.start + i / c.row_group;
    return c.q_nope + (long(b) * z.rows + g * c.row_group + i % c.row_group) * c.nope;
  };
  for (int i = 0; i < count; ++i) {
    std::memset(s.pairs + i * nope_pairs, 0, nope_pairs * 4);
    std::memcpy(s.pairs + i * nope_pairs, nope_of(i), c.nope * 2);
  }
  for (int k = 0; k < c.kinds; ++k) {
    const Up& up = c.up[k];
    pack_columns(up.key + g * up.group, c.rank, c.nope, c.rank, s.columns, 8 * long(c.rank));
    std::memset(s.other, 0, count * long(z.rank) * 4);
    product(count, z.columns / LANES, {s.pairs, nope_pairs, s.columns, nope_pairs, nope_pairs, s.other, z.rank});
    for (int i = 0; i < count; ++i) {
      const int b = share.start + i / c.row_group, row = g * c.row_group + i % c.row_group;
      round_row(s.other + long(i) * z.rank, z.rank, queries + b * z.queries + (long(k) * z.rows + row) * z.query_row);
      float sum = 0;
      for (int n = 0; up.key_bias && n < c.nope; ++n)
        sum += number(nope_of(i)[n]) * number(up.key_bias[g * up.bias_group + n]);
      constants[b * z.constants + k * z.lanes + row] = sum;
    }
  }
}

// Which of 16 tokens are visual, for each block of a tile; returns how many of all.
int visual_bits(const Call& c, int b, long token, int count, uint32_t* seen) {
  int visual = 0;
  for (int at = 0; at < TILE; at += LANES) {
    seen[at / LANES] = 0;
    if (!c.visual || at >= count) continue;
    const uint32_t some = count - at >= LANES ? 0xffff : (1u << (count - at)) - 1;
    const __m128i bytes = _mm_maskz_loadu_epi8(some, c.visual + b * c.visual_batch + token + at);
    seen[at / LANES] = _mm_test_epi8_mask(bytes, bytes);
    visual += __builtin_popcount(seen[at / LANES]);
  }
  return visual;
}

// Queries as lanes, for `score`.
void pack_queries(const Call& c, const Sizes& z, const uint32_t* queries) {
  for (int k = 0; k < c.kinds; ++k)
    for (int i = 0; i < z.rows; i += LANES)
      pack_rows((const bf16*)(queries + (long(k) * z.rows + i) * z.query_row), 2L * z.query_row, z.rows - i, c.rank,
                scratch.queries + (long(k) * z.lanes + i) / LANES * z.pairs);
}

// to[i][token] = queries[i] . latent[token] + constant, for all rows and a tile of tokens
void score_latent(const Sizes& z, int count, Rows latent, const __m512i* queries, const float* constants, float* to,
                  Fetch* fetch) {
  Scratch& s = scratch;
  for (int t = 0; t < count; ++t) std::memcpy(s.turned + long(t) * z.lanes, constants, z.lanes * 4);
  product(count, z.lanes / LANES,
          {(const uint32_t*)latent.at, latent.row / 2, queries, z.pairs, z.pairs, s.turned, z.lanes}, fetch);
  for (int at = 0; at < count; at += LANES) {  // numbers of 32 bits turn as pairs do
    pack_rows((const bf16*)(s.turned + long(at) * z.lanes), 2L * z.lanes, count - at, 2 * z.rows, s.rows);
    for (int i = 0; i < z.rows; ++i) _mm512_storeu_si512(to + i * TILE + at, s.rows[i]);
  }
}

// Scores of a tile of tokens, not yet scaled.
void score(const Call& c, const Sizes& z, int b, long token, int count, Rows latent, const uint32_t* seen,
           int visual, const float* constants, Fetch* fetch) {
  Scratch& s = scratch;
  const int first = visual == count ? c.kinds - 1 : 0, last = visual ? c.kinds - 1 : 0;
  for (int k = first; k <= last; ++k) {
    const __m512i* queries = s.queries + long(k) * z.lanes / LANES * z.pairs;
    score_latent(z, count, latent, queries, constants + k * z.lanes, k == first ? s.scores : s.other, fetch);
  }
  for (int i = 0; first != last && i < z.rows; ++i)
    for (int at = 0; at < TILE; at += LANES)
      _mm512_mask_storeu_ps(s.scores + i * TILE + at, seen[at / LANES], _mm512_loadu_ps(s.other + i * TILE + at));
  for (int g = 0; g < c.groups; ++g) {
    const long row = long(g) * c.row_group;
    const Rows keys = rows_of(c.k_rope, b, g, token, count, c.rope, s.keys);
    const uint32_t* q = (const uint32_t*)(c.q_rope + (long(b) * z.rows + row) * c.rope);
    product_with_rows(c.row_group, q, c.rope / 2, keys, count, c.rope, s.rows, s.scores + row * TILE);
  }
}

// A row's sums so far, as they are under a higher top.
void raise_top(const Call& c, const Sizes& z, int row, float top, Part part) {
  const float scale = std::exp(part.top[row] - top);
  for (int k = 0; k < c.kinds; ++k) {
    float* sums = part.sums + (long(k) * z.rows + row) * z.sums_row;
    for (int at = 0; at < z.rank; at += LANES)
      _mm512_store_ps(sums + at, _mm512_mul_ps(_mm512_load_ps(sums + at), _mm512_set1_ps(scale)));
  }
  part.mass[row] *= scale, part.text[row] *= scale, part.top[row] = top;
}

// Softmax weights of a tile as pairs, by modality, from its scores; the sums so far are scaled to the new top.
void weigh(const Call& c, const Sizes& z, int b, long token, int count, const uint32_t* seen, bool both, Part part) {
  Scratch& s = scratch;
  const __m512 scaling = _mm512_set1_ps(c.scaling);
  const int blocks = (count + LANES - 1) / LANES;
  for (int i = 0; i < z.rows; ++i) {
    const uint8_t* mask = c.mask ? c.mask + b * c.mask_batch + (i % c.new_tokens) * c.mask_row + token : nullptr;
    float* row = s.scores + i * TILE;
    __mmask16 valid[TILE / LANES];
    __m512 highest = _mm512_set1_ps(LOWEST);
    for (int j = 0; j < blocks; ++j) {
      valid[j] = count - j * LANES >= LANES ? 0xffff : (1u << (count - j * LANES)) - 1;
      if (mask) {
        const __m128i bytes = _mm_maskz_loadu_epi8(valid[j], mask + j * LANES);
        valid[j] = _mm_test_epi8_mask(bytes, bytes);
      }
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(row + j * LANES), scaling);
      _mm512_storeu_ps(row + j * LANES, value);
      highest = _mm512_mask_max_ps(highest, valid[j], highest, value);
    }
    const float top = std::max(part.top[i], _mm512_reduce_max_ps(highest));
    if (top > part.top[i]) raise_top(c, z, i, top, part);
    __m512 mass = _mm512_setzero_ps(), text = _mm512_setzero_ps();
    bf16* to = (bf16*)s.weights + i * TILE;
    for (int j = 0; j < TILE / LANES; ++j) {
      const bool inside = j < blocks;
      const __mmask16 is_visual = inside ? seen[j] : 0;
      const __m512 shifted = _mm512_sub_ps(_mm512_loadu_ps(row + j * LANES), _mm512_set1_ps(top));
      const __m512 value = inside ? _mm512_maskz_mov_ps(valid[j], exp_of(shifted)) : _mm512_setzero_ps();
      mass = _mm512_add_ps(mass, value);
      text = _mm512_mask_add_ps(text, ~is_visual, text, value);
      const __mmask16 first = both ? ~is_visual : 0xffff;
      _mm256_storeu_si256((__m256i*)(to + j * LANES), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(first, value)));
      if (both)
        _mm256_storeu_si256((__m256i*)(to + z.rows * TILE + j * LANES),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_mov_ps(is_visual, value)));
    }
    part.mass[i] += _mm512_reduce_add_ps(mass);
    part.text[i] += _mm512_reduce_add_ps(text);
  }
}

// The tile of tokens that comes next.
Fetch ahead(const Call& c, int b, long token, long stop) {
  const long count = std::min<long>(TILE, stop - token);
  Fetch fetch;
  if (count <= 0) return fetch;
  const Span latent = span_of(c.latent, b, token, count), keys = span_of(c.k_rope, b, token, count);
  fetch.at = latent.at, fetch.lines = latent.bytes / 64;
  fetch.next = keys.at, fetch.next_lines = keys.bytes / 64, fetch.distance = keys.distance;
  fetch.regions = c.groups;
  return fetch;
}

// Sums over the tokens `start` to `stop` of a row of the batch.
void attend(const Call& c, const Sizes& z, int b, long start, long stop, const uint32_t* queries,
            const float* constants, Part part) {
  Scratch& s = scratch;
  pack_queries(c, z, queries);
  std::memset(part.sums, 0, long(c.kinds) * z.rows * z.sums_row * 4);
  std::fill(part.top, part.top + z.rows, LOWEST);
  std::memset(part.mass, 0, z.rows * 4);
  std::memset(part.text, 0, z.rows * 4);
  for (long token = start; token < stop; token += TILE) {
    const int count = int(std::min<long>(TILE, stop - token));
    uint32_t seen[TILE / LANES];
    const int visual = visual_bits(c, b, token, count, seen);
    Fetch fetch = ahead(c, b, token + TILE, stop);
    const Rows latent = rows_of(c.latent, b, 0, token, count, c.rank, s.latent);
    score(c, z, b, token, count, latent, seen, visual, constants, &fetch);
    const bool both = visual && visual < count;
    weigh(c, z, b, token, count, seen, both, part);
    pack_columns(latent.at, latent.row, count, c.rank, s.columns);
    const int pairs = (count + 1) / 2;
    for (int k = 0; k < (both ? 2 : 1); ++k) {
      const int kind = both ? k : visual ? c.kinds - 1 : 0;
      const uint32_t* weights = s.weights + long(k) * z.rows * (TILE / 2);
      float* sums = part.sums + long(kind) * z.rows * z.sums_row;
      product(z.rows, z.columns / LANES, {weights, TILE / 2, s.columns, pairs, pairs, sums, z.sums_row}, &fetch);
    }
  }
}

// The parts of a row's tokens, put together into the first, as shares of 1; returns the share of text.
float merge(const Call& c, const Sizes& z, int row, const Part* parts, int count) {
  float shares[MOST_PARTS], top = LOWEST, mass = 0, text = 0;
  for (int p = 0; p < count; ++p) top = std::max(top, parts[p].top[row]);
  for (int p = 0; p < count; ++p) {
    shares[p] = std::exp(parts[p].top[row] - top);
    mass += parts[p].mass[row] * shares[p], text += parts[p].text[row] * shares[p];
  }
  const float whole = mass > 0 ? 1.f / mass : 0.f;
  for (int k = 0; k < c.kinds; ++k) {
    const long at_row = (long(k) * z.rows + row) * z.sums_row;
    for (int at = 0; at < z.rank; at += LANES) {
      __m512 sum = _mm512_setzero_ps();
      for (int p = 0; p < count; ++p)
        sum = _mm512_fmadd_ps(_mm512_load_ps(parts[p].sums + at_row + at), _mm512_set1_ps(shares[p]), sum);
      _mm512_store_ps(parts[0].sums + at_row + at, _mm512_mul_ps(sum, _mm512_set1_ps(whole)));
    }
  }
  return text * whole;
}

// The outputs of the rows of one KV head, from `parts[b * count + p]` of their tokens.
void expand(const Call& c, const Sizes& z, Share share, int g, const Part* parts, int count) {
  Scratch& s = scratch;
  const int rows = (share.stop - share.start) * c.row_group;
  const auto batch_of = [&](int i) { return share.start + i / c.row_group; };
  const auto row_of = [&](int i) { return g * c.row_group + i % c.row_group; };
  float* output = s.scores;  // [rows, TILE]
  std::vector<float> text_share(rows);
  bool used[2] = {false, false};
  for (int i = 0; i < rows; ++i) {
    text_share[i] = merge(c, z, row_of(i), parts + batch_of(i) * count, count);
    used[0] |= c.kinds == 1 || text_share[i] > 0;
    used[1] |= c.kinds == 2 && text_share[i] < 1;
  }
  const long query_row = z.rank / 2;
  for (int k = 0; k < c.kinds; ++k)
    for (int i = 0; used[k] && i < rows; ++i)
      round_row(parts[batch_of(i) * count].sums + (long(k) * z.rows + row_of(i)) * z.sums_row, z.rank,
                s.pairs + (long(k) * rows + i) * query_row);
  for (int d = 0; d < c.head; d += TILE) {
    const int lanes = std::min(TILE, c.head - d), blocks = (lanes + LANES - 1) / LANES;
    std::memset(output, 0, rows * TILE * 4);
    for (int k = 0; k < c.kinds; ++k) {
      if (!used[k]) continue;
      const bf16* weights = c.up[k].value + g * c.up[k].group + long(d) * c.rank;
      const uint32_t* a = s.pairs + long(k) * rows * query_row;
      product_with_rows(rows, a, query_row, {weights, c.rank}, lanes, c.rank, s.rows, output, LANES * long(c.rank));
    }
    for (int i = 0; i < rows; ++i) {
      for (int k = 0; k < c.kinds; ++k) {
        const float share = c.kinds == 1 ? 1.f : k == 0 ? text_share[i] : 1.f - text_share[i];
        for (int j = 0; c.up[k].value_bias && j < lanes; ++j)
          output[i * TILE + j] += share * number(c.up[k].value_bias[g * c.up[k].bias_group + d + j]);
      }
      alignas(64) bf16 rounded[TILE];
      for (int j = 0; j < blocks; ++j) round_row(output + i * TILE + j * LANES, LANES, (uint32_t*)rounded + j * LANES / 2);
      std::memcpy(c.out + (long(batch_of(i)) * z.rows + row_of(i)) * c.head + d, rounded, lanes * 2);
    }
  }
}

}  // namespace

extern "C" void mha2mla_decode(const Call* call) {
  const Call& c = *call;
  const Sizes z(c);
  const int parts = std::min(MOST_PARTS, std::max(1, (c.threads + c.batch - 1) / c.batch));
  const long part_size = long(c.kinds) * z.rows * z.sums_row + 3L * up_to(z.rows, LANES);
  thread_local static float* memory = nullptr;
  thread_local static long room = 0;
  const long wanted = c.batch * (parts * part_size + z.queries + z.constants);
  if (wanted > room) {
    std::free(memory);
    memory = buffer<float>(wanted);
    room = wanted;
  }
  float* sums = memory;
  uint32_t* queries = (uint32_t*)(sums + c.batch * parts * part_size);
  float* constants = (float*)(queries + c.batch * z.queries);
  const auto part_of = [&](int b, int p) {
    float* at = sums + (long(b) * parts + p) * part_size;
    float* tail = at + long(c.kinds) * z.rows * z.sums_row;
    const int step = up_to(z.rows, LANES);
    return Part{at, tail, tail + step, tail + 2 * step};
  };
  std::vector<Part> found;
  for (int b = 0; b < c.batch; ++b)
    for (int p = 0; p < parts; ++p) found.push_back(part_of(b, p));
  const long tokens = up_to(int((c.total + parts - 1) / parts), TILE);
  const int shares = std::min(c.batch, (c.threads + c.groups - 1) / c.groups);
  const auto share_of = [&](int i) { return Share{c.batch * i / shares, c.batch * (i + 1) / shares}; };
#pragma omp parallel num_threads(c.threads)
  {
    scratch.fit(c, z);
#pragma omp for collapse(2)
    for (int i = 0; i < shares; ++i)
      for (int g = 0; g < c.groups; ++g) absorb(c, z, share_of(i), g, queries, constants);
#pragma omp for collapse(2) schedule(dynamic)
    for (int b = 0; b < c.batch; ++b)
      for (int p = 0; p < parts; ++p) {
        const long total = c.lengths ? c.lengths[b] : c.total;
        attend(c, z, b, std::min(total, p * tokens), std::min(total, (p + 1) * tokens), queries + b * z.queries,
               constants + b * z.constants, found[b * parts + p]);
      }
#pragma omp for collapse(2)
    for (int i = 0; i < shares; ++i)
      for (int g = 0; g < c.groups; ++g) expand(c, z, share_of(i), g, found.data(), parts);
  }
}
