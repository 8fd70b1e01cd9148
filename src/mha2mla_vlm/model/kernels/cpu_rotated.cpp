// Decoding over latents whose keys are rotated at read, on any CPU; model/interpolated.py is its specification.
//
// Threads share the tokens. For each block of the plan (model/blocks.py) the query, turned to the nodes of the
// block, is absorbed once. Then tile by tile, while a tile's latents are in the L2 cache: scores of the absorbed
// terms, keys of the pairs that are made, rotated, and their scores, softmax, and sums of latents.
//
// Shapes: B batch, T new tokens, S all tokens, G KV heads, R rope dims, C = R / 2 pairs, r latent dims, K
// modalities, n blocks of W tokens, N nodes, J terms; Q = G * M * T rows, ordered by KV head, head, token.

#include "cpu_vectors.h"

#include <cmath>
#include <vector>

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
  const void* latent;  // [B, S, r]
  long latent_batch, latent_token;
  const float *cos, *sin;  // [B, P, S], with a tile of room
  long table_batch, table_pair;
  const int32_t* pairs;  // [G, C]
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

// What a thread works in; kept from call to call, and enlarged when a call needs more.
struct Scratch {
  float *latent, *tokens, *absorbed, *constants, *turned, *scores, *other, *terms, *keys, *seen, *token, *worth, *row_worth;
  int32_t *pairs, *row_pairs;  // of `tokens` and `absorbed`
  char* memory = nullptr;
  long room = 0;

  void fit(const Call& c, const Sizes& z) {
    const long rows = long(z.terms + 1) * z.rows, group = long(z.terms) * c.row_group, tile = long(TILE) * z.rank;
    const std::pair<void*, long> parts[] = {
        {&latent, tile},           {&tokens, tile},   {&absorbed, rows * z.row}, {&constants, rows},
        {&turned, group * c.rope}, {&scores, long(z.rows) * TILE}, {&other, long(z.rows) * TILE},
        {&terms, group * TILE},    {&keys, 2L * z.made * TILE},    {&seen, long(c.new_tokens) * TILE},
        {&token, z.rank},          {&worth, TILE},    {&row_worth, rows},
        {&pairs, tile / 2},        {&row_pairs, rows * (z.rank / 2)}};
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
  }
};

thread_local Scratch scratch;

bool in_pairs(const Call& c) { return HAS_PAIRS && c.half; }

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

// Of one block: absorbed[g][j][row] = turned query Wk, to whose first term the unrotated dims add.
Absorbed absorb(const Call& c, const Sizes& z, const Item& item, int b, int k, Weights w) {
  const Blocks& p = *item.blocks;
  Scratch& s = scratch;
  const float* nope = c.q_latent[k] ? c.q_latent[k] + long(b) * z.rows * c.rank : nullptr;
  const float* constant = c.text_constant && k == TEXT ? c.text_constant + long(b) * z.rows : nullptr;
  if (!p.terms) return {{nope, c.rank, nullptr, nullptr}, constant, nope ? 1 : 0};
  const int some = z.half - p.made;
  std::memset(s.absorbed, 0, long(p.terms) * z.rows * z.row * 4);
  for (int g = 0; g < c.groups; ++g) {
    float* absorbed = s.absorbed + long(g) * p.terms * c.row_group * z.row;
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
      s.constants[long(g) * p.terms * c.row_group + i] = sum;
      for (int n = 0; nope && i < c.row_group && n < c.rank; ++n) absorbed[i * long(z.row) + n] += nope[long(row) * c.rank + n];
    }
  }
  return {{s.absorbed, z.row, nullptr, nullptr}, s.constants, p.terms};
}

// The same rows as pairs, one of two modalities.
void pair_rows(const Call& c, const Sizes& z, int k, Absorbed& absorbed) {
  if (!in_pairs(c) || !absorbed.terms) return;
  Scratch& s = scratch;
  const long first = long(k) * z.rows, count = long(absorbed.terms) * z.rows;
  for (long i = 0; i < count; ++i) {
    const float* row = absorbed.rows.numbers + i * absorbed.rows.row;
    std::memcpy(s.token, row, c.rank * 4L);
    std::memset(s.token + c.rank, 0, (z.rank - c.rank) * 4L);
    s.row_worth[first + i] = pair_row(s.token, z.rank, s.row_pairs + (first + i) * (z.rank / 2));
  }
  absorbed.rows = {nullptr, 0, s.row_pairs + first * (z.rank / 2), s.row_worth + first};
}

// A tile's latents as panels of latent dims `[panels of r][TILE]` and of tokens `[panels of TILE][r]`.
void load_tile(const Call& c, const Sizes& z, int b, long token, int count) {
  Scratch& s = scratch;
  std::memset(s.token, 0, z.rank * 4);
  for (int t = 0; t < TILE; ++t) {
    if (t < count)
      widen(c.latent, b * c.latent_batch + (token + t) * c.latent_token, c.half, c.rank, s.token);
    else if (t == count)
      std::memset(s.token, 0, z.rank * 4);
    for (int at = 0; at < z.rank; at += PANEL)
      std::memcpy(s.latent + (long(at) * TILE + long(t) * PANEL), s.token + at, PANEL * 4);
  }
  for (int t = 0; t < TILE; t += LANES)
    for (int at = 0; at < z.rank; at += LANES) {
      const float* from = s.latent + long(at / PANEL) * PANEL * TILE + long(t) * PANEL + at % PANEL;
      turn_square(from, PANEL, s.tokens + (long(t / PANEL) * z.rank + at) * PANEL + t % PANEL, PANEL);
    }
  for (int q = 0; in_pairs(c) && q < PANELS; ++q)
    pair_panel(s.tokens + long(q) * z.rank * PANEL, z.rank, s.pairs + long(q) * (z.rank / 2) * PANEL, s.worth + q * PANEL);
}

// Add to out[row][token] what some rows give with the tile's tokens.
void meet(const Call& c, const Sizes& z, int rows, Rows a, float* out, long out_row, long out_panel) {
  const Scratch& s = scratch;
  if (a.pairs)
    product(PairProduct{rows, a.pairs, a.worth, z.rank / 2, s.pairs, s.worth, long(z.rank / 2) * PANEL, z.rank / 2, PANELS, out,
                        out_row, out_panel});
  else
    product(Product{rows, a.numbers, a.row, s.tokens, long(z.rank) * PANEL, c.rank, PANELS, out, out_row, out_panel});
}

// The rows from `start` on.
Rows from_row(const Sizes& z, Rows a, long start) {
  if (a.pairs) return {nullptr, 0, a.pairs + start * (z.rank / 2), a.worth + start};
  return {a.numbers + start * a.row, a.row, nullptr, nullptr};
}

// Add the scores of the pairs that are made, of the rows of one KV head.
void score_made(const Call& c, const Sizes& z, const Blocks& p, int b, int k, int g, long token, Weights w, float* to) {
  Scratch& s = scratch;
  const int made = p.made;
  const long head = (long(k) * c.groups + g) * c.rope, panel = 2L * made * PANEL;
  for (int side = 0; side < 2; ++side) {
    const float* bias = c.up[k].bias ? c.up[k].bias + g * c.up[k].bias_group + side * z.half : nullptr;
    for (int q = 0; q < PANELS; ++q)
      for (int n = 0; n < made; ++n) {
        float* at = s.keys + q * panel + (side * long(made) + n) * PANEL;
        std::fill(at, at + PANEL, bias ? bias[n] : 0.f);
      }
    const Rows up{w.rows, z.row, in_pairs(c) ? w.pairs : nullptr, w.worth};
    meet(c, z, made, from_row(z, up, head + side * z.half), s.keys + side * long(made) * PANEL, PANEL, panel);
  }
  for (int n = 0; n < made; ++n) {
    const long at = b * c.table_batch + c.pairs[long(g) * z.half + n] * c.table_pair + token;
    for (int t = 0; t < TILE; t += LANES) {
      float *first = s.keys + t / PANEL * panel + long(n) * PANEL + t % PANEL, *second = first + long(made) * PANEL;
      const Vec x = load(first), y = load(second), cos = load(c.cos + at + t), sin = load(c.sin + at + t);
      store(first, x * cos - y * sin), store(second, y * cos + x * sin);
    }
  }
  const float* query = c.q_rope + (long(b) * z.rows + g * c.row_group) * c.rope;
  for (int side = 0; side < 2; ++side)
    product(Product{c.row_group, query + side * z.half, c.rope, s.keys + side * long(made) * PANEL, panel, made, PANELS, to, TILE});
}

// Scores of a tile of tokens of one modality, to[row][token].
void score(const Call& c, const Sizes& z, const Item& item, int b, int k, long token, Absorbed absorbed, Weights w,
           float* to) {
  const Blocks& p = *item.blocks;
  Scratch& s = scratch;
  const int some = c.row_group, terms = absorbed.terms;
  for (int g = 0; g < c.groups; ++g) {
    float* scores = to + long(g) * some * TILE;
    float* out = terms > 1 ? s.terms : scores;
    for (int i = 0; i < std::max(1, terms) * some; ++i) {
      const float constant = absorbed.constants ? absorbed.constants[long(g) * std::max(1, terms) * some + i] : 0.f;
      std::fill(out + i * TILE, out + (i + 1) * TILE, constant);
    }
    if (terms) meet(c, z, terms * some, from_row(z, absorbed.rows, long(g) * terms * some), out, TILE, PANEL);
    for (int i = 0; terms > 1 && i < some; ++i)
      for (int t = 0; t < TILE; t += LANES) {
        Vec sum = load(out + i * TILE + t);
        const float* basis = p.basis + (long(b) * p.count + item.block) * p.terms * p.width + (token - p.start[item.block]) + t;
        for (int j = 1; j < terms; ++j) sum += load(basis + long(j) * p.width) * load(out + (j * some + i) * TILE + t);
        store(scores + i * TILE + t, sum);
      }
    if (p.made) score_made(c, z, p, b, k, g, token, w, scores);
  }
}

// A row's sums so far, as they are under a higher top.
void raise_top(const Call& c, const Sizes& z, int row, float top, Part part) {
  const float scale = std::exp(part.top[row] - top);
  for (int k = 0; k < c.kinds; ++k) {
    float* sums = part.sums + (long(k) * z.rows + row) * z.row;
    for (int at = 0; at < z.rank; at += LANES) store(sums + at, load(sums + at) * scale);
  }
  part.mass[row] *= scale, part.text[row] *= scale, part.top[row] = top;
}

float sum_of(Vec x) {
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

// Softmax weights of a tile in place of its scores; `visual` is 1 where tokens are visual.
void weigh(const Call& c, const Sizes& z, const float* visual, Part part) {
  Scratch& s = scratch;
  for (int i = 0; i < z.rows; ++i) {
    const float* seen = s.seen + i % c.new_tokens * TILE;
    float* row = s.scores + long(i) * TILE;
    Vec most = Vec{} + LOWEST;
    for (int t = 0; t < TILE; t += LANES) {
      const Vec value = load(seen + t) > 0.f ? load(row + t) : Vec{} + LOWEST;
      most = highest(most, value);
      store(row + t, value);
    }
    float top = part.top[i];
    for (int n = 0; n < LANES; ++n) top = std::max(top, most[n]);
    if (top > part.top[i]) raise_top(c, z, i, top, part);
    Vec mass = {}, text = {};
    for (int t = 0; t < TILE; t += LANES) {
      const Vec weight = exp_of(load(row + t) - top) * load(seen + t);
      mass += weight, text += weight * (1.f - load(visual + t));
      store(row + t, weight);
    }
    part.mass[i] += sum_of(mass), part.text[i] += sum_of(text);
  }
}

// Which tokens of a tile each new token sees, 1 or 0.
void look(const Call& c, int b, long token, int count) {
  for (int i = 0; i < c.new_tokens; ++i) {
    const uint8_t* mask = c.mask ? c.mask + b * c.mask_batch + i * c.mask_row + token : nullptr;
    for (int t = 0; t < TILE; ++t) scratch.seen[i * TILE + t] = t < count && (!mask || mask[t]) ? 1.f : 0.f;
  }
}

// Add some tokens of a block to the sums.
void attend(const Call& c, const Sizes& z, const Item& item, int b, Weights w, Part part) {
  Scratch& s = scratch;
  const int kind = c.kinds == 1 ? TEXT : item.blocks->kind, first = kind > MIXED, last = kind >= MIXED;
  Absorbed absorbed[2];
  for (int k = first; k <= last; ++k) {
    absorbed[k] = absorb(c, z, item, b, k, w);
    pair_rows(c, z, first == last ? 0 : k, absorbed[k]);
  }
  for (long token = item.start; token < item.stop; token += TILE) {
    const int count = int(std::min<long>(TILE, item.stop - token));
    load_tile(c, z, b, token, count);
    look(c, b, token, count);
    float visual[TILE];
    for (int t = 0; t < TILE; ++t)
      visual[t] = kind == MIXED ? t < count && c.visual[b * c.visual_batch + token + t] : first;
    for (int k = first; k <= last; ++k) score(c, z, item, b, k, token, absorbed[k], w, k == first ? s.scores : s.other);
    for (long i = 0; first != last && i < z.rows * long(TILE); i += LANES)
      store(s.scores + i, load(visual + i % TILE) > 0.f ? load(s.other + i) : load(s.scores + i));
    weigh(c, z, visual, part);
    for (int k = first; k <= last; ++k) {
      float* weights = s.scores;
      if (first != last) {
        weights = s.other;
        for (long i = 0; i < z.rows * long(TILE); i += LANES) {
          const Vec share = load(visual + i % TILE);
          store(weights + i, load(s.scores + i) * (k ? share : 1.f - share));
        }
      }
      product(Product{z.rows, weights, TILE, s.latent, long(TILE) * PANEL, count, z.rank / PANEL,
               part.sums + long(k) * z.rows * z.row, z.row});
    }
  }
}

// The parts of a row's tokens, put together as shares of 1.
void merge(const Call& c, const Sizes& z, int b, int row, const Part* parts, int count) {
  float top = LOWEST, mass = 0, text = 0;
  for (int p = 0; p < count; ++p) top = std::max(top, parts[p].top[row]);
  std::vector<float> shares(count);
  for (int p = 0; p < count; ++p) {
    shares[p] = std::exp(parts[p].top[row] - top);
    mass += parts[p].mass[row] * shares[p], text += parts[p].text[row] * shares[p];
  }
  const float whole = mass > 0 ? 1.f / mass : 0.f;
  for (int k = 0; k < c.kinds; ++k) {
    float* to = c.sums + ((long(k) * c.batch + b) * z.rows + row) * c.rank;
    std::fill(to, to + c.rank, 0.f);
    for (int p = 0; p < count; ++p) {
      const float *from = parts[p].sums + (long(k) * z.rows + row) * z.row, share = shares[p] * whole;
      for (int n = 0; n < c.rank; ++n) to[n] += share * from[n];
    }
  }
  c.text[long(b) * z.rows + row] = text * whole;
}

// Products for each token of a block, about, to share work by.
double cost(const Call& c, const Sizes& z, const Item& item) {
  const Blocks& p = *item.blocks;
  const double tokens = double(item.stop - item.start), terms = std::max(p.terms, c.q_latent[0] ? 1 : 0);
  const double each = 2. * c.groups * p.made + z.rows * (terms + 1.5) + 24;
  return tokens * each + double(p.terms) * z.rows * 2 * (z.half - p.made);
}

// The items of each part, in the order of tokens: part p has those from cuts[p] to cuts[p + 1].
std::vector<int> cut(const Call& c, const Sizes& z, const std::vector<Item>& items, int parts) {
  double all = 0, so_far = 0;
  for (const Item& item : items) all += cost(c, z, item);
  std::vector<int> cuts{0};
  for (size_t i = 0; i < items.size(); ++i) {
    so_far += cost(c, z, items[i]);
    while (int(cuts.size()) < parts && so_far >= all * double(cuts.size()) / parts) cuts.push_back(int(i) + 1);
  }
  while (int(cuts.size()) <= parts) cuts.push_back(int(items.size()));
  return cuts;
}

}  // namespace

extern "C" void mha2mla_decode_rotated(const Call* call) {
  const Call& c = *call;
  const Sizes z(c);
  std::vector<Item> items;
  for (int i = 0; i < c.plans; ++i)
    for (int n = 0; n < c.plan[i].count; ++n) {
      const long start = c.plan[i].start[n], stop = std::min<long>(c.plan[i].stop[n], c.total);
      if (start < stop) items.push_back({c.plan + i, n, start, stop});
    }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.start < b.start; });
  const int parts = std::max(1, std::min<int>(int(items.size()), (PARTS * c.threads + c.batch - 1) / c.batch));
  const std::vector<int> cuts = cut(c, z, items, parts);
  const long sums = long(c.kinds) * z.rows * z.row, lanes = up_to(z.rows, 16), part_size = sums + 3 * lanes;
  const long heads = long(c.kinds) * c.groups * c.rope, up_size = heads * (z.row + z.rank + z.rank / 2 + 1),
             wanted = up_to(up_size, 16) + c.batch * parts * part_size;
  thread_local static float* memory = nullptr;
  thread_local static long room = 0;
  if (wanted > room) {
    std::free(memory);
    memory = buffer<float>(wanted);
    room = wanted;
  }
  float* own = memory;
  float* panels = own + heads * z.row;
  int32_t* pairs = (int32_t*)(panels + heads * z.rank);
  const Weights w{own, panels, pairs, (float*)(pairs + heads * (z.rank / 2))};
  float* found = own + up_to(up_size, 16);
  std::vector<Part> all;
  for (long i = 0; i < long(c.batch) * parts; ++i) {
    float *at = found + i * part_size, *tail = at + sums;
    all.push_back({at, tail, tail + lanes, tail + 2 * lanes});
  }
#pragma omp parallel num_threads(c.threads)
  {
    scratch.fit(c, z);
#pragma omp for collapse(2)
    for (int k = 0; k < c.kinds; ++k)
      for (int g = 0; g < c.groups; ++g) lay_out_up(c, z, k, g, w);
#pragma omp for collapse(2) schedule(dynamic)
    for (int b = 0; b < c.batch; ++b)
      for (int p = 0; p < parts; ++p) {
        const Part& part = all[long(b) * parts + p];
        std::memset(part.sums, 0, part_size * 4);
        std::fill(part.top, part.top + z.rows, LOWEST);
        for (int i = cuts[p]; i < cuts[p + 1]; ++i) attend(c, z, items[i], b, w, part);
      }
#pragma omp for collapse(2)
    for (int b = 0; b < c.batch; ++b)
      for (int i = 0; i < z.rows; ++i) merge(c, z, b, i, all.data() + long(b) * parts, parts);
  }
}
