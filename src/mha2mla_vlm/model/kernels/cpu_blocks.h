// What the CPU kernel of keys that are rotated at read is given, and queries absorbed for a block of the plan.
//
// Shapes: those of cpu_rotated.cpp.

#pragma once

#include "cpu_vectors.h"

#include <cmath>
#include <utility>

extern "C" {

struct Up {
  const float *rope, *bias;  // [G, R, r], rows dense, and [G, R] or null
  long group, bias_group;   // numbers from one KV head to the next
};

struct Blocks {  // the first `made` pairs are made of latents, the others are sums over terms
  int kind, made, terms, nodes, count, width;
  const int32_t *start, *stop;  // [n]
  const float *cos, *sin;       // [B, n, N, G, C - made]
  const float* basis;           // [B, n, J, W]
  const int32_t *axis, *node;   // [J]
  const int32_t* axes;          // [G, C - made]
};

struct Call {
  int batch, groups, row_group, new_tokens, rope, rank, kinds, threads, plans, half;  // half: latents in bfloat16
  long total;
  const float* q_rope;         // [B, Q, R], scaled
  const float* q_latent[2];    // [B, Q, r], or null
  const float* text_constant;  // [B, Q], or null
  Up up[2];
  const void* latent;  // [B, S, r], or bytes [B, S, b]; from one to the next in numbers or bytes
  long latent_batch, latent_token;
  const int32_t* pages;  // [B, pages], or null; `latent_batch` is then from page to page
  long pages_row, page;  // tokens of a page
  const int32_t* lengths;  // [B], tokens of each row, or null where all have `total`
  int packed;          // whether they are bytes, in which
  int channels[4];     // so many channels have 16, 8, 4 and 2 bits (model/cache/packed.py)
  const float *cos, *sin;  // [B, pairs that are made, S], with a tile of room
  long table_batch, table_pair;
  const int32_t* pairs;  // [G, C], numbers of those
  const Blocks* plan;
  const uint8_t* visual;  // [B, S], of blocks of both modalities
  long visual_batch;
  const uint8_t* mask;  // [B, T, S], what is seen, or null
  long mask_batch, mask_row;
  float *sums, *text;  // [K, B, Q, r] and [B, Q]
};
}

namespace {

constexpr int TILE = 64, PANELS = TILE / PANEL;  // tokens
constexpr int TEXT = 0, MIXED = 1;
constexpr float LOWEST = -1e30f;
constexpr float OF_A_TILE = 8000;  // length of integers that meet a tile's of any size, so that sums fit 32 bits
constexpr int PARTS = 6;  // of the tokens for each thread, so that none waits long for another

struct Item {  // some tokens of one block
  const Blocks* blocks;
  int block;
  long start, stop;
};

// The sums of one part of a row's tokens.
struct Part {
  float *sums, *top, *mass, *text;  // [K, Q, lanes of r], [Q], [Q], [Q]
};

struct Sizes {
  int rows, half, rank, row;  // rank: up to whole panels; row: numbers to the next, not to share cache sets
  int terms = 1, made = 0;    // at most
  explicit Sizes(const Call& c)
      : rows(c.groups * c.row_group), half(c.rope / 2), rank(up_to(c.rank, PANEL)), row(rank + 16) {
    for (int i = 0; i < c.plans; ++i)
      terms = std::max(terms, c.plan[i].terms), made = std::max(made, c.plan[i].made);
  }
};

// Rows that meet latents, in float32 or as pairs.
struct Rows {
  const float* numbers;
  long row;
  const int32_t* pairs;
  const float* worth;
};

// The terms of the rows of each KV head, `[G, J, M * T]`, and what is added to them.
struct Absorbed {
  Rows rows;
  const float* constants;
  int terms;
};

// The up projections, as rows `[K, G, R]`, and as panels `[K, G, panels of r, R]`.
struct Weights {
  float *rows, *panels;
  int32_t* pairs;
  float* worth;
};

bool in_pairs(const Call& c) { return HAS_PAIRS && c.half; }

// What a thread works in; kept from call to call, and enlarged when a call needs more.
struct Scratch {
  float *latent, *tokens, *absorbed, *constants, *turned, *scores, *other, *terms, *keys, *seen, *token;
  float* lanes;  // rows of some tokens, before they are turned to lanes
  float *worth, *row_worth, *weight_worth;  // what the integers of a pair are worth, of each token and row
  float* ones;  // of each latent dim
  int32_t *pairs, *latent_pairs, *row_pairs, *weight_pairs;  // of `tokens`, `latent`, `absorbed`, and weights
  char* memory = nullptr;
  long room = 0;

  void fit(const Call& c, const Sizes& z) {
    const long rows = 2L * z.terms * z.rows, group = long(z.terms) * c.row_group;
    const long tile = long(TILE) * z.rank, numbers = in_pairs(c) ? 0 : tile, halves = in_pairs(c) ? tile / 2 : 0;
    const std::pair<void*, long> parts[] = {
        {&latent, numbers},        {&tokens, numbers}, {&absorbed, rows * z.row}, {&constants, rows},
        {&turned, group * c.rope}, {&scores, long(z.rows) * TILE}, {&other, long(z.rows) * TILE},
        {&terms, group * TILE},    {&keys, 2L * z.made * TILE},    {&seen, long(c.new_tokens) * TILE},
        {&token, z.rank},          {&lanes, long(LANES) * z.rank}, {&worth, TILE},
        {&row_worth, rows},
        {&weight_worth, z.rows},   {&ones, z.rank},   {&pairs, halves},          {&latent_pairs, halves},
        {&row_pairs, rows * (z.rank / 2)}, {&weight_pairs, long(z.rows) * TILE / 2}};
    long wanted = 0;
    for (const auto& part : parts) wanted += up_to(part.second, 16) + 16;
    if (wanted > room) {
      std::free(memory);
      memory = (char*)buffer<float>(wanted);
      room = wanted;
    }
    char* at = memory;
    for (const auto& part : parts) {
      *(char**)part.first = at;
      at += (up_to(part.second, 16) + 16) * 4;
    }
    std::fill(ones, ones + z.rank, 1.f);
  }
};

thread_local Scratch scratch;

// Where a token's latent lies, in numbers or bytes.
long place_of(const Call& c, int b, long token) {
  if (!c.pages) return b * c.latent_batch + token * c.latent_token;
  return c.pages[b * c.pages_row + token / c.page] * c.latent_batch + token % c.page * c.latent_token;
}

// A token's latent as float32.
void unpack(const Call& c, long at, float* to) {
  if (c.packed)
    unpack_row((const uint8_t*)c.latent + at, c.channels, to);
  else
    widen(c.latent, at, c.half, c.rank, to);
}

// The rows of one KV head.
void lay_out_up(const Call& c, const Sizes& z, int k, int g, Weights w) {
  const long head = (long(k) * c.groups + g) * c.rope;
  float* panels = w.panels + head * z.rank;
  for (int i = 0; i < c.rope; ++i) {
    float* row = w.rows + (head + i) * z.row;
    std::memset(row, 0, z.row * 4);
    std::memcpy(row, c.up[k].rope + g * c.up[k].group + long(i) * c.rank, c.rank * 4L);
    for (int at = 0; at < z.rank; at += PANEL)
      std::memcpy(panels + (long(at) * c.rope + long(i) * PANEL), row + at, PANEL * 4);
    if (in_pairs(c)) w.worth[head + i] = pair_row(row, z.rank, w.pairs + (head + i) * (z.rank / 2));
  }
}

// Queries of one KV head turned back to the nodes of a block: turned[j][row] of the pairs that are not made.
void turn(const Call& c, const Sizes& z, const Item& item, int b, int g, float* turned) {
  const Blocks& p = *item.blocks;
  const int some = z.half - p.made;
  const long node = (long(b) * p.count + item.block) * p.nodes;
  const auto place = [&](int j) { return ((node + p.node[j]) * c.groups + g) * some; };
  const int32_t* axes = p.axes + long(g) * some;
  const float *first_cos = p.cos + place(0), *first_sin = p.sin + place(0);
  for (int j = 0; j < p.terms; ++j)
    for (int i = 0; i < c.row_group; ++i) {
      const float* a = c.q_rope + (long(b) * z.rows + g * c.row_group + i) * c.rope + p.made;
      const float *b = a + z.half, *cos = p.cos + place(j), *sin = p.sin + place(j);
      float *to_a = turned + (long(j) * c.row_group + i) * 2 * some, *to_b = to_a + some;
      const int32_t axis = p.axis[j];
      for (int n = 0; n < some; ++n) {
        const float own = axes[n] == axis ? 1.f : 0.f;
        const float x = j ? (cos[n] - first_cos[n]) * own : cos[n], y = j ? (sin[n] - first_sin[n]) * own : sin[n];
        to_a[n] = a[n] * x + b[n] * y, to_b[n] = b[n] * x - a[n] * y;
      }
    }
}

// Terms `j` to `last` of one KV head, from the pairs of their axis.
void absorb_terms(const Call& c, const Sizes& z, const Blocks& p, int k, int g, int j, int last, Weights w,
                  float* absorbed) {
  const int some = z.half - p.made;
  int low = 0, high = some;
  if (j) {
    const int32_t* axes = p.axes + long(g) * some;
    while (low < high && axes[low] != p.axis[j]) ++low;
    while (high > low && axes[high - 1] != p.axis[j]) --high;
  }
  const float* panels = w.panels + (long(k) * c.groups + g) * c.rope * z.rank;
  const int rows = (last - j) * c.row_group;
  for (int side = 0; side < 2; ++side)
    product(Product{rows, scratch.turned + long(j) * c.row_group * 2 * some + side * some + low, 2L * some,
             panels + (side * z.half + p.made + low) * long(PANEL), long(c.rope) * PANEL, high - low, z.rank / PANEL,
             absorbed + long(j) * c.row_group * z.row, z.row});
}

// Of one block: absorbed[g][j][row] = turned query Wk, to whose first term the unrotated dims add; in the first or
// second `slot`.
Absorbed absorb(const Call& c, const Sizes& z, const Item& item, int b, int k, int slot, Weights w) {
  const Blocks& p = *item.blocks;
  Scratch& s = scratch;
  const float* nope = c.q_latent[k] ? c.q_latent[k] + long(b) * z.rows * c.rank : nullptr;
  const float* constant = c.text_constant && k == TEXT ? c.text_constant + long(b) * z.rows : nullptr;
  if (!p.terms) return {{nope, c.rank, nullptr, nullptr}, constant, nope ? 1 : 0};
  const int some = z.half - p.made;
  const long rows = long(p.terms) * z.rows;
  float *all = s.absorbed + slot * rows * z.row, *constants = s.constants + slot * rows;
  std::memset(all, 0, rows * z.row * 4);
  for (int g = 0; g < c.groups; ++g) {
    float* absorbed = all + long(g) * p.terms * c.row_group * z.row;
    turn(c, z, item, b, g, s.turned);
    const int32_t* axes = p.axes + long(g) * some;
    const bool one = std::all_of(axes, axes + some, [](int32_t axis) { return axis == 0; });
    for (int j = 0, last; j < p.terms; j = last) {  // together where they are of the same pairs
      for (last = j + 1; (j || one) && last < p.terms && p.axis[last] == p.axis[j];) ++last;
      absorb_terms(c, z, p, k, g, j, last, w, absorbed);
    }
    const float* bias = c.up[k].bias ? c.up[k].bias + g * c.up[k].bias_group + p.made : nullptr;
    for (int i = 0; i < p.terms * c.row_group; ++i) {
      const int row = g * c.row_group + i;  // of the first term
      float sum = constant && i < c.row_group ? constant[row] : 0.f;
      const float* turned = s.turned + long(i) * 2 * some;
      for (int n = 0; bias && n < some; ++n) sum += turned[n] * bias[n] + turned[some + n] * bias[z.half + n];
      constants[long(g) * p.terms * c.row_group + i] = sum;
      for (int n = 0; nope && i < c.row_group && n < c.rank; ++n)
        absorbed[i * long(z.row) + n] += nope[long(row) * c.rank + n];
    }
  }
  return {{all, z.row, nullptr, nullptr}, constants, p.terms};
}

// The same rows as pairs, in the first or second `slot`.
void pair_rows(const Call& c, const Sizes& z, int slot, Absorbed& absorbed) {
  if (!in_pairs(c) || !absorbed.terms) return;
  Scratch& s = scratch;
  const long count = long(absorbed.terms) * z.rows, first = slot * count;
  for (long i = 0; i < count; ++i) {
    const float* row = absorbed.rows.numbers + i * absorbed.rows.row;
    std::memcpy(s.token, row, c.rank * 4L);
    std::memset(s.token + c.rank, 0, (z.rank - c.rank) * 4L);
    s.row_worth[first + i] = pair_row(s.token, z.rank, s.row_pairs + (first + i) * (z.rank / 2));
  }
  absorbed.rows = {nullptr, 0, s.row_pairs + first * (z.rank / 2), s.row_worth + first};
}

}  // namespace
