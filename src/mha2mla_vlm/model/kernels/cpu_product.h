// What both halves of the CPU kernel are made of: bfloat16 pairs, packed as lanes of a vector, and their products.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int LANES = 16;   // float32 in a vector
constexpr int TILE = 64;    // tokens at a time
constexpr int MOST_SUMS = 24;   // vectors that a product keeps in registers
constexpr float LOWEST = -1e30f;

using bf16 = uint16_t;

int up_to(int size, int step) { return (size + step - 1) / step * step; }

float number(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

__m512i load(const bf16* row, int count) {  // up to 32 numbers, the others 0
  if (count >= 32) return _mm512_loadu_si512(row);
  return count <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16((1u << count) - 1, row);
}

// exp of numbers up to 0, to 2e-7 of their size; what is below -87 gives 2e-38
__m512 exp_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.f));
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), x);
  rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f), rest);
  __m512 sum = _mm512_set1_ps(1.f / 720);
  for (float term : {1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return _mm512_scalef_ps(sum, whole);
}

// Memory to bring into the L2 cache while something is computed, line by line: a region, then others of one
// size at equal distances.
struct Fetch {
  const char* at = nullptr;
  long lines = 0;
  const char* next = nullptr;
  long next_lines = 0, distance = 0;
  int regions = 0;

  const char* take(long wanted, long* lines_taken) {
    if (lines == 0 && regions > 0) {
      at = next, lines = next_lines;
      next += distance, --regions;
    }
    const char* from = at;
    *lines_taken = std::min(wanted, lines);
    at += *lines_taken * 64, lines -= *lines_taken;
    return from;
  }
};

// What `product` works on; rows of `a` are `a_row` pairs apart, vectors of x for the next 16 lanes `x_block`
// vectors, rows of `out` `out_row` numbers.
struct Operands {
  const uint32_t* a;
  long a_row;
  const __m512i* x;
  long x_block;
  int pairs;
  float* out;
  long out_row;
  const char* fetch = nullptr;
  long fetch_lines = 0;
};

template <int ROWS, int BLOCKS>
void product_of(const Operands& o) {
  __m512 sum[ROWS][BLOCKS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < BLOCKS; ++j) sum[i][j] = _mm512_loadu_ps(o.out + i * o.out_row + j * LANES);
  for (int k = 0; k < o.pairs; ++k) {
    if (k < o.fetch_lines) _mm_prefetch(o.fetch + 64 * k, _MM_HINT_T1);
    __m512bh lanes[BLOCKS];
    for (int j = 0; j < BLOCKS; ++j) lanes[j] = (__m512bh)_mm512_load_si512(o.x + j * o.x_block + k);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32(o.a[i * o.a_row + k]);
#pragma GCC unroll 4
      for (int j = 0; j < BLOCKS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], one, lanes[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < BLOCKS; ++j) _mm512_storeu_ps(o.out + i * o.out_row + j * LANES, sum[i][j]);
}

template <int ROWS, int BLOCKS>
void product_sized(int rows, const Operands& o) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS)
      product_of<ROWS, BLOCKS>(o);
    else
      product_sized<ROWS - 1, BLOCKS>(rows, o);
  }
}

// out[i][lane] += sum over k of a[i][k] x[k][lane], for rows i and 16 lanes of each of `blocks` blocks.
void product(int rows, int blocks, Operands o, Fetch* fetch = nullptr) {
  while (blocks > 0) {
    const int some = blocks >= 4 ? 4 : std::min(blocks, 2), most = some == 1 ? MOST_SUMS / 2 : MOST_SUMS / some;
    const int parts = (rows + most - 1) / most;
    Operands part = o;
    for (int done = 0, left = parts; left > 0; --left) {
      const int size = (rows - done + left - 1) / left;
      if (fetch) part.fetch = fetch->take(o.pairs, &part.fetch_lines);
      if (some == 4)
        product_sized<MOST_SUMS / 4, 4>(size, part);
      else if (some == 2)
        product_sized<MOST_SUMS / 2, 2>(size, part);
      else
        product_sized<MOST_SUMS / 2, 1>(size, part);
      done += size, part.a += size * o.a_row, part.out += size * o.out_row;
    }
    blocks -= some, o.x += some * o.x_block, o.out += some * LANES;
  }
}

// 16 rows as lanes: x[k] holds the k-th pair of each row; what is `ahead` numbers further is fetched meanwhile
void pack_rows(const bf16* from, long row, int rows, int width, __m512i* x, long ahead = 0) {
  for (int at = 0; at < width; at += 32) {
    __m512i r[16], t[16];
    if (ahead)
      for (int i = 0; i < 16; ++i) _mm_prefetch((const char*)(from + i * row + at + ahead), _MM_HINT_T1);
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? load(from + i * row + at, width - at) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    const int pairs = std::min(16, (width - at + 1) / 2);
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < pairs; ++i) _mm512_store_si512(x + at / 2 + i, r[i]);
  }
}

// columns as lanes: x[c * pairs + k] holds rows 2k and 2k + 1 of columns 16c to 16c + 15
void pack_columns(const bf16* from, long row, int rows, int width, __m512i* x, long ahead = 0) {
  alignas(64) static const int16_t order[64] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
  const int pairs = (rows + 1) / 2;
  for (int k = 0; k < pairs; ++k) {
    const bf16 *one = from + 2 * k * row, *two = one + row;
    for (int at = 0; at < width; at += 32) {
      if (ahead) _mm_prefetch((const char*)(one + ahead), _MM_HINT_T1), _mm_prefetch((const char*)(two + ahead), _MM_HINT_T1);
      const __m512i a = load(one, width - at);
      const __m512i b = 2 * k + 1 < rows ? load(two, width - at) : _mm512_setzero_si512();
      _mm512_store_si512(x + at / 16 * pairs + k, _mm512_permutex2var_epi16(a, low, b));
      if (width - at > 16)
        _mm512_store_si512(x + (at / 16 + 1) * pairs + k, _mm512_permutex2var_epi16(a, high, b));
      one += 32, two += 32;
    }
  }
}

// Dense rows of numbers, `row` apart.
struct Rows {
  const bf16* at;
  long row;
};

// out[i][j] += a[i] . rows[j] for a tile of rows, which are packed in `room`
void product_with_rows(int count, const uint32_t* a, long a_row, Rows x, int lanes, int width, __m512i* room,
                       float* out, long ahead = 0) {
  const int pairs = (width + 1) / 2, blocks = (lanes + LANES - 1) / LANES;
  for (int j = 0; j < blocks; ++j)
    pack_rows(x.at + j * LANES * x.row, x.row, lanes - j * LANES, width, room + j * pairs, ahead);
  product(count, blocks, {a, a_row, room, pairs, pairs, out, TILE});
}

void round_row(const float* from, int width, uint32_t* to) {  // float32 to pairs of bfloat16
  for (int at = 0; at < width; at += LANES)
    _mm256_storeu_si256((__m256i*)((bf16*)to + at), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + at)));
}

template <typename X>
X* buffer(long count) {
  return (X*)std::aligned_alloc(64, std::max(64L, (count * long(sizeof(X)) + 63) / 64 * 64));
}

}  // namespace
