// Products in float32 that every processor can do fast: written in vectors of the compiler's own.
//
// All are one product, of rows whose numbers are broadcast and of panels of lanes:
//     out[i][lane] += sum over k of a[i][k] * x[k][lane]
// A panel is two vectors wide and lies dense, `[k][PANEL]`; so many rows are summed at a time as there are
// registers for.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

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

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));

inline Vec load(const float* at) { return *(const Loose*)at; }
inline void store(float* at, Vec x) { *(Loose*)at = x; }
inline Vec highest(Vec a, Vec b) { return a > b ? a : b; }

inline long up_to(long x, long step) { return (x + step - 1) / step * step; }

template <typename T>
T* buffer(long count) {
  void* p = std::aligned_alloc(64, up_to(count * long(sizeof(T)) + 64, 64));
  if (!p) throw std::bad_alloc();
  return (T*)p;
}

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

using SumRows = void (*)(const float*, long, const float*, int, float*, long);

template <int... N>
constexpr std::array<SumRows, sizeof...(N)> all_sums(std::integer_sequence<int, N...>) {
  return {sum_rows<N + 1>...};
}
constexpr auto SUMS = all_sums(std::make_integer_sequence<int, ROWS>());

inline void product(const Product& p) {
  const int tiles = (p.rows + ROWS - 1) / ROWS;
  for (int panel = 0; panel < p.panels; ++panel)
    for (int t = 0; t < tiles; ++t) {
      const long start = long(p.rows) * t / tiles, stop = long(p.rows) * (t + 1) / tiles;
      SUMS[stop - start - 1](p.a + start * p.a_row, p.a_row, p.x + panel * p.x_panel, p.depth,
                             p.out + panel * p.out_panel + start * p.out_row, p.out_row);
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
  const float shift = 12582912.f;  // 1.5 * 2^23, after which no fraction fits
  const Vec n = (x * 1.44269504f + shift) - shift;
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

}  // namespace
