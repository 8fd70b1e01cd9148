// Products that every processor can do fast: written in vectors of the compiler's own.
//
// All are one product, of rows whose numbers are broadcast and of panels of lanes:
//     out[i][lane] += sum over k of a[i][k] * x[k][lane]
// A panel is two vectors wide and lies dense, `[k][PANEL]`; so many rows are summed at a time as there are
// registers for. Numbers are float32, or, where they come from bfloat16 and the processor multiplies pairs of 16 bits
// (x86-64 from AVX2 on), integers with a scale for each row and lane, twice as many at a time. Their rounding
// is a tenth of bfloat16's, and their sums stay within 32 bits: rows and lanes are scaled to a length whose square does.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;
constexpr float SHIFT = 12582912;  // 1.5 * 2^23: a sum with it is rounded to a whole number, its last bits

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef int32_t LooseInt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int16_t LooseShort __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

inline Vec load(const float* at) { return *(const Loose*)at; }
inline void store(float* at, Vec x) { *(Loose*)at = x; }
inline Int load(const int32_t* at) { return *(const LooseInt*)at; }
inline Vec highest(Vec a, Vec b) { return a > b ? a : b; }

template <int STEP, int... I>
inline Vec swapped(Vec x, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(x, Int{(I ^ STEP)...});
}

// All lanes put together, by halves
template <typename F>
inline float across(Vec x, F put) {
  constexpr auto LANE = std::make_integer_sequence<int, LANES>();
  if constexpr (LANES > 8) x = put(x, swapped<8>(x, LANE));
  if constexpr (LANES > 4) x = put(x, swapped<4>(x, LANE));
  x = put(x, swapped<2>(x, LANE));
  return put(x, swapped<1>(x, LANE))[0];
}
inline float sum_of(Vec x) {
  return across(x, [](Vec a, Vec b) { return a + b; });
}
inline float top_of(Vec x) { return across(x, highest); }

inline long up_to(long x, long step) { return (x + step - 1) / step * step; }

template <typename T>
T* buffer(long count) {
  void* p = std::aligned_alloc(64, up_to(count * long(sizeof(T)) + 64, 64));
  if (!p) throw std::bad_alloc();
  return (T*)p;
}

// sum + a0 * b0 + a1 * b1 of the pairs of 16 bits in each lane
#if defined(__AVX512VNNI__)
constexpr bool HAS_PAIRS = true;
inline Int add_pairs(Int sum, Int a, Int b) {
  return (Int)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
#elif defined(__AVX512BW__)
constexpr bool HAS_PAIRS = true;
inline Int add_pairs(Int sum, Int a, Int b) { return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
constexpr bool HAS_PAIRS = true;
inline Int add_pairs(Int sum, Int a, Int b) {
  return (Int)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
}
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool HAS_PAIRS = true;
inline Int add_pairs(Int sum, Int a, Int b) { return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
constexpr bool HAS_PAIRS = false;
inline Int add_pairs(Int sum, Int, Int) { return sum; }
#endif

struct Product {
  int rows;
  const float* a;
  long a_row;
  const float* x;  // [panels][depth][PANEL], panels `x_panel` apart
  long x_panel;
  int depth, panels;
  float* out;  // rows `out_row` apart, panels `out_panel` apart
  long out_row, out_panel = PANEL;
};

struct PairProduct {  // the same of pairs, `depth` of them
  int rows;
  const int32_t* a;
  const float* a_scale;
  long a_row;
  const int32_t* x;
  const float* x_scale;  // of all lanes
  long x_panel;
  int depth, panels;
  float* out;
  long out_row, out_panel = PANEL;
};

template <int N>
void sum_pairs(const PairProduct& p, long row, int panel) {
  Int sum[N][2] = {};
  const int32_t *a = p.a + row * p.a_row, *x = p.x + panel * p.x_panel;
  const long a_row = p.a_row;
  for (int k = 0; k < p.depth; ++k, x += PANEL) {
    const Int first = load(x), second = load(x + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Int number = Int{} + a[i * a_row + k];
      sum[i][0] = add_pairs(sum[i][0], number, first), sum[i][1] = add_pairs(sum[i][1], number, second);
    }
  }
  const float *a_scale = p.a_scale + row, *x_scale = p.x_scale + panel * PANEL;
  const Vec scale[2] = {load(x_scale), load(x_scale + LANES)};
  float* out = p.out + panel * p.out_panel + row * p.out_row;
  const long out_row = p.out_row;
#pragma GCC unroll 16  // or sums go through memory
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = out + i * out_row + v * LANES;
      store(to, load(to) + __builtin_convertvector(sum[i][v], Vec) * (a_scale[i] * scale[v]));
    }
}

template <int N>
void sum_rows(const float* a, long a_row, const float* x, int depth, float* out, long out_row) {
  Vec sum[N][2];
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < 2; ++v) sum[i][v] = load(out + i * out_row + v * LANES);
  for (int k = 0; k < depth; ++k, x += PANEL) {
    const Vec first = load(x), second = load(x + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const float number = a[i * a_row + k];
      sum[i][0] += number * first, sum[i][1] += number * second;
    }
  }
  for (int i = 0; i < N; ++i)
    for (int v = 0; v < 2; ++v) store(out + i * out_row + v * LANES, sum[i][v]);
}

template <int N>
void sum_rows(const Product& p, long row, int panel) {
  sum_rows<N>(p.a + row * p.a_row, p.a_row, p.x + panel * p.x_panel, p.depth,
              p.out + panel * p.out_panel + row * p.out_row, p.out_row);
}

template <typename P>
using Sum = void (*)(const P&, long, int);
template <int... N>
constexpr std::array<Sum<Product>, ROWS> sums_of(const Product*, std::integer_sequence<int, N...>) {
  return {sum_rows<N + 1>...};
}
template <int... N>
constexpr std::array<Sum<PairProduct>, ROWS> sums_of(const PairProduct*, std::integer_sequence<int, N...>) {
  return {sum_pairs<N + 1>...};
}

template <typename P>
void product(const P& p) {
  constexpr auto SUMS = sums_of((const P*)nullptr, std::make_integer_sequence<int, ROWS>());
  const int tiles = (p.rows + ROWS - 1) / ROWS;
  for (int t = 0; t < tiles; ++t)
    for (int panel = 0; panel < p.panels; ++panel) {
      const long start = long(p.rows) * t / tiles, stop = long(p.rows) * (t + 1) / tiles;
      SUMS[stop - start - 1](p, start, panel);
    }
}

constexpr float LENGTH = 45000, LARGEST = 32000;  // of integers whose products' sums fit 32 bits

// A row of whole vectors as pairs of integers, together of at most a length; returns what one of them is worth.
// NaN stays.
inline float pair_row(const float* row, int count, int32_t* to, float length = LENGTH) {
  Vec squares = {}, most = {};
  for (int k = 0; k < count; k += LANES) {
    const Vec x = load(row + k);
    squares += x * x, most = highest(highest(most, x), -x);
  }
  const float sum = sum_of(squares), top = top_of(most);
  const float worth = sum > 0 ? std::max(std::sqrt(sum) / length, top / LARGEST) : sum;
  const float scale = worth > 0 ? 1 / worth : 0.f;
  for (int k = 0; k < count; k += LANES) {
    const Int bits = (Int)(load(row + k) * scale + SHIFT);
    *(LooseShort*)((int16_t*)to + k) = __builtin_convertvector(bits, LooseShort);
  }
  return worth;
}

// Two rows of integers as the pairs of lanes, in panels that are `panel` apart.
inline void pair_lanes(const int16_t* one, const int16_t* two, int count, int32_t* to, long panel) {
  for (int k = 0; k < count; k += LANES) {
    const Int first = __builtin_convertvector(*(const LooseShort*)(one + k), Int);
    const Int second = __builtin_convertvector(*(const LooseShort*)(two + k), Int);
    *(LooseInt*)(to + k / PANEL * panel + k % PANEL) = (first & 0xffff) | second << 16;
  }
}

// Lanes i and i + step change places between two vectors, where i has not the bit of the step.
template <int STEP, int... I>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  const Vec low = __builtin_shuffle(a, b, Int{(I & STEP ? LANES + I - STEP : I)...});
  b = __builtin_shuffle(a, b, Int{(I & STEP ? LANES + I : I + STEP)...});
  a = low;
}

template <int STEP>
inline void exchange_all(Vec* x) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & STEP)) exchange<STEP>(x[i], x[i + STEP], std::make_integer_sequence<int, LANES>());
}

// to[k][t] = from[t][k] for a square of lanes
inline void turn_square(const float* from, long from_row, float* to, long to_row) {
  Vec x[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) x[i] = load(from + i * from_row);
  exchange_all<1>(x), exchange_all<2>(x);
  if constexpr (LANES > 4) exchange_all<4>(x);
  if constexpr (LANES > 8) exchange_all<8>(x);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to + i * to_row, x[i]);
}

// e^x for x <= 0, to float32's precision; the constants are those of Cephes' expf
inline Vec exp_of(Vec x) {
  x = highest(x, Vec{} - 87.f);
  const Vec n = (x * 1.44269504f + SHIFT) - SHIFT;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = Vec{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
  y = y * r * r + r + 1.f;
  return y * (Vec)((__builtin_convertvector(n, Int) + 127) << 23);
}

// Numbers as float32, from float32 or bfloat16
inline void widen(const void* from, long at, bool half, int count, float* to) {
  if (!half) {
    std::memcpy(to, (const float*)from + at, count * 4L);
    return;
  }
  const uint16_t* codes = (const uint16_t*)from + at;
  uint32_t* bits = (uint32_t*)to;
  for (int i = 0; i < count; ++i) bits[i] = uint32_t(codes[i]) << 16;
}

// Float16, of any kind
inline float number_of(uint16_t half) {
  const uint32_t size = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  float value;
  std::memcpy(&value, &size, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((half & 0x7c00) == 0x7c00) bits = size | 0x7f800000;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Numbers of float16 and middles of steps of 8, 4 and 2 bits, of which a byte holds some from equal parts
inline void unpack_row(const uint8_t* from, const int* channels, float* to) {
  for (int i = 0; i < channels[0]; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, 2);
    to[i] = number_of(half);
  }
  from += 2 * channels[0], to += channels[0];
  for (int number = 1; number < 4; ++number) {
    const int bits = 16 >> number, parts = 8 / bits, count = channels[number] / parts;
    const float middle = float((1 << bits) - 1) / 2;
    for (int part = 0; part < parts; ++part, to += count)
      for (int i = 0; i < count; ++i) to[i] = float(from[i] >> part * bits & ((1 << bits) - 1)) - middle;
    from += count;
  }
}

}  // namespace
