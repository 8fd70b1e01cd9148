// Decoding over latents whose keys are rotated at read, on any CPU; model/interpolated.py is its specification.
//
// Threads share the tokens. For each block of the plan (model/blocks.py) the query, turned to the nodes of the
// block, is absorbed once. Then tile by tile, while a tile's latents are in the L2 cache: scores of the absorbed
// terms, keys of the pairs that are made, rotated, and their scores, softmax, and sums of latents.
//
// Shapes: B batch, T new tokens, S all tokens, G KV heads, R rope dims, C = R / 2 pairs, r latent dims, K
// modalities, n blocks of W tokens, N nodes, J terms; Q = G * M * T rows, ordered by KV head, head, token.

#include "cpu_blocks.h"

#include <vector>

namespace {

// LANES tokens of a panel as lanes, from rows of as many numbers of 32 bits; what they are is not looked at.
void turn_rows(const float* rows, int width, float* panel) {
  for (int at = 0; at < width; at += LANES) turn_square(rows + at, width, panel + long(at) * PANEL, PANEL);
}

// A tile's latents as panels of latent dims `[panels of r][TILE]` and of tokens `[panels of TILE][r]`.
void load_tile(const Call& c, const Sizes& z, int b, long token, int count) {
  Scratch& s = scratch;
  const int width = in_pairs(c) ? z.rank / 2 : z.rank;  // of a row, or of what is in the place of floats
  float* panels = in_pairs(c) ? (float*)s.pairs : s.tokens;
  std::memset(s.token, 0, z.rank * 4);
  for (int t = 0; t < TILE; ++t) {
    if (t < count)
      unpack(c, place_of(c, b, token + t), s.token);
    else if (t == count)
      std::memset(s.token, 0, z.rank * 4);
    float* row = s.lanes + long(t % LANES) * width;
    if (in_pairs(c)) {
      s.worth[t] = pair_row(s.token, z.rank, (int32_t*)row);
      if (t % 2)
        pair_lanes((int16_t*)(row - width), (int16_t*)row, z.rank, s.latent_pairs + t / 2 * PANEL, TILE / 2 * PANEL);
    } else {
      std::memcpy(row, s.token, width * 4L);
      for (int at = 0; at < z.rank; at += PANEL)
        std::memcpy(s.latent + (long(at) * TILE + long(t) * PANEL), s.token + at, PANEL * 4);
    }
    if (t % LANES == LANES - 1)
      turn_rows(s.lanes, width, panels + long(t / PANEL) * width * PANEL + t / LANES * LANES % PANEL);
  }
}

// Add to out[row][token] what some rows give with the tile's tokens.
void meet(const Call& c, const Sizes& z, int rows, Rows a, float* out, long out_row, long out_panel) {
  const Scratch& s = scratch;
  if (a.pairs)
    product(PairProduct{rows, a.pairs, a.worth, z.rank / 2, s.pairs, s.worth, long(z.rank / 2) * PANEL, z.rank / 2,
                        PANELS, out, out_row, out_panel});
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
  const float* bias = c.up[k].bias ? c.up[k].bias + g * c.up[k].bias_group : nullptr;
  for (int q = 0; q < PANELS; ++q)
    for (int n = 0; n < 2 * made; ++n) {
      float* at = s.keys + q * panel + long(n) * PANEL;
      std::fill(at, at + PANEL, bias ? bias[n < made ? n : z.half + n - made] : 0.f);
    }
  const Rows up{w.rows, z.row, in_pairs(c) ? w.pairs : nullptr, w.worth};
  const int parts = made == z.half ? 1 : 2, rows = 2 * made / parts;  // all rows lie side by side
  for (int side = 0; side < parts; ++side)
    meet(c, z, rows, from_row(z, up, head + side * z.half), s.keys + side * long(made) * PANEL, PANEL, panel);
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
    product(Product{c.row_group, query + side * z.half, c.rope, s.keys + side * long(made) * PANEL, panel, made,
                    PANELS, to, TILE});
}

// Fetch a KV head's share of the tile that comes next into the cache.
void fetch(const Call& c, const Item& item, int b, long token, int g) {
  const long size = c.packed ? 1 : c.half ? 2 : 4, bytes = c.latent_token * size, next = token + TILE;
  const long count = std::min<long>(TILE, item.stop - next);
  for (long t = count * g / c.groups; t < count * (g + 1) / c.groups; ++t) {
    const char* row = (const char*)c.latent + place_of(c, b, next + t) * size;
    for (long at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);  // into L2: products fill L1
  }
}

// Scores of a tile of tokens of one modality, to[row][token].
void score(const Call& c, const Sizes& z, const Item& item, int b, int k, long token, Absorbed absorbed, Weights w,
           float* to) {
  const Blocks& p = *item.blocks;
  Scratch& s = scratch;
  const int some = c.row_group, terms = absorbed.terms;
  const auto begin = [&](long first, int rows, float* out) {  // with what rows of terms give
    for (int i = 0; i < rows; ++i)
      std::fill(out + i * TILE, out + (i + 1) * TILE, absorbed.constants ? absorbed.constants[first + i] : 0.f);
    if (terms) meet(c, z, rows, from_row(z, absorbed.rows, first), out, TILE, PANEL);
  };
  if (terms <= 1) begin(0, z.rows, to);
  for (int g = 0; g < c.groups; ++g) {
    fetch(c, item, b, token, g);
    float* scores = to + long(g) * some * TILE;
    if (terms > 1) begin(long(g) * terms * some, terms * some, s.terms);
    for (int i = 0; terms > 1 && i < some; ++i)
      for (int t = 0; t < TILE; t += LANES) {
        Vec sum = load(s.terms + i * TILE + t);
        const long place = (long(b) * p.count + item.block) * p.terms * p.width;
        const float* basis = p.basis + place + (token - p.start[item.block]) + t;
        for (int j = 1; j < terms; ++j) sum += load(basis + long(j) * p.width) * load(s.terms + (j * some + i) * TILE + t);
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
    const float top = std::max(part.top[i], top_of(most));
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

// Which of `count` tokens are visual, 1 or 0, and how many.
int visual_of(const Call& c, int b, long token, int count, float* visual) {
  int found = 0;
  for (int t = 0; t < count; ++t) {
    const bool is = c.visual[b * c.visual_batch + token + t];
    visual[t] = is, found += is;
  }
  std::fill(visual + count, visual + TILE, 0.f);
  return found;
}

// Add the tile's latents, by the weights of rows, to their sums.
void add_latents(const Call& c, const Sizes& z, float* weights, int count, float* sums) {
  Scratch& s = scratch;
  const int panels = z.rank / PANEL;
  if (!in_pairs(c))
    return product(Product{z.rows, weights, TILE, s.latent, long(TILE) * PANEL, count, panels, sums, z.row});
  for (int i = 0; i < z.rows; ++i) {
    float* row = weights + long(i) * TILE;
    for (int t = 0; t < TILE; t += LANES) store(row + t, load(row + t) * load(s.worth + t));
    s.weight_worth[i] = pair_row(row, TILE, s.weight_pairs + long(i) * TILE / 2, OF_A_TILE);
  }
  product(PairProduct{z.rows, s.weight_pairs, s.weight_worth, TILE / 2, s.latent_pairs, s.ones, TILE / 2 * PANEL,
                      TILE / 2, panels, sums, z.row});
}

// Add some tokens of a block to the sums.
void attend(const Call& c, const Sizes& z, Item item, int b, Weights w, Part part) {
  Scratch& s = scratch;
  if (c.lengths) item.stop = std::min<long>(item.stop, c.lengths[b]);
  if (item.start >= item.stop) return;
  const int kind = c.kinds == 1 ? TEXT : item.blocks->kind;
  int first = kind > MIXED, last = kind >= MIXED;
  Absorbed absorbed[2];
  for (int k = first; k <= last; ++k) {
    const int slot = first == last ? 0 : k;
    absorbed[k] = absorb(c, z, item, b, k, slot, w);
    pair_rows(c, z, slot, absorbed[k]);
  }
  for (long token = item.start; token < item.stop; token += TILE) {
    const int count = int(std::min<long>(TILE, item.stop - token));
    load_tile(c, z, b, token, count);
    look(c, b, token, count);
    float visual[TILE];
    if (kind == MIXED) {  // most tiles are of one modality
      const int found = visual_of(c, b, token, count, visual);
      first = found == count, last = found > 0;
    } else {
      std::fill(visual, visual + TILE, float(first));
    }
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
      add_latents(c, z, weights, count, part.sums + long(k) * z.rows * z.row);
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

// The plan's blocks in the order of their tokens, as far as there are tokens.
std::vector<Item> items_of(const Call& c) {
  std::vector<Item> items;
  for (int i = 0; i < c.plans; ++i)
    for (int n = 0; n < c.plan[i].count; ++n) {
      const long start = c.plan[i].start[n], stop = std::min<long>(c.plan[i].stop[n], c.total);
      if (start < stop) items.push_back({c.plan + i, n, start, stop});
    }
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.start < b.start; });
  return items;
}

// Room that threads share, kept from call to call.
float* memory(long wanted) {
  thread_local float* kept = nullptr;
  thread_local long room = 0;
  if (wanted > room) {
    std::free(kept);
    kept = buffer<float>(wanted);
    room = wanted;
  }
  return kept;
}

}  // namespace

extern "C" void mha2mla_decode_rotated(const Call* call) {
  const Call& c = *call;
  const Sizes z(c);
  const std::vector<Item> items = items_of(c);
  const int parts = std::max(1, std::min<int>(int(items.size()), (PARTS * c.threads + c.batch - 1) / c.batch));
  const std::vector<int> cuts = cut(c, z, items, parts);
  const long sums = long(c.kinds) * z.rows * z.row, lanes = up_to(z.rows, 16), part_size = sums + 3 * lanes;
  const long heads = long(c.kinds) * c.groups * c.rope, up_size = heads * (z.row + z.rank + z.rank / 2 + 1);
  float* own = memory(up_to(up_size, 16) + c.batch * parts * part_size);
  float* panels = own + heads * z.row;
  int32_t* pairs = (int32_t*)(panels + heads * z.rank);
  const Weights w{own, panels, pairs, (float*)(pairs + heads * (z.rank / 2))};
  std::vector<Part> all;
  for (long i = 0; i < long(c.batch) * parts; ++i) {
    float *at = own + up_to(up_size, 16) + i * part_size, *tail = at + sums;
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
