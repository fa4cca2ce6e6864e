// MicroAttention for many query rows per KV head (prefill, large groups): bound by multiplications.
//
// Scores are formed transposed, S[key][row] = K Q^T, with query rows in the lanes: K is read as it lies (one 32-bit
// unit at a time for all lanes), the queries are packed once per item, and the softmax over keys needs no sum across
// lanes. Then O[row][dim] += P[key][row] V[key][dim], where P is already in the shape that it is read in.
// A unit is 32 bits: one fp32 number or two bf16 numbers (of neighbouring dims in K, of neighbouring keys in V).
#pragma once

#include "isa.h"
#include "prefill_tiles.h"
#include "prefill_units.h"

namespace {

using distkv::ROW_TILE;

template <class X, class E, int NV>
struct Prefill {
  using Element = typename E::Type;
  static constexpr bool IS_INT8 = sizeof(Element) == 1;
  static constexpr int LANES = NV * W;
  static constexpr int KEYS = (W == 16 ? 16 : 8) / NV;  // at a time: their sums fit the registers

  const DistkvAttention& a;
  const Item& item;
  const int64_t rows = item.row_end - item.row_begin;
  const int64_t padded = round_up(a.head_dim, X::CHUNK);
  const int64_t slab = (int64_t)a.rblock_size * a.head_dim;
  const int64_t units = X::IS_PAIRS ? a.head_dim / 2 : a.head_dim;
  uint32_t *queries, *weights, *wide_keys, *packed_values;
  float *scores, *acc, *tops, *sums, *shrinks;
  int64_t positions[LANES];
  int32_t seen_begin[LANES], seen_end[LANES];  // of the chunk, by row
  bool is_masked = false;
  // Only for int8: of the rBlock and KV head at hand, and of the chunk's first key.
  const float *k_scales = nullptr, *rblock_v_scales = nullptr, *v_scales = nullptr;

  Prefill(const DistkvAttention& attention, const Item& work, char* scratch) : a(attention), item(work) {
    acc = (float*)scratch;
    tops = acc + LANES * padded;
    sums = tops + LANES;
    shrinks = sums + LANES;
    scores = shrinks + LANES;
    weights = (uint32_t*)(scores + CHUNK_TOKENS * LANES);
    queries = weights + CHUNK_TOKENS * LANES;
    packed_values = queries + padded * LANES;
    wide_keys = packed_values + CHUNK_TOKENS * padded;
    memset(packed_values, 0, CHUNK_TOKENS * padded * sizeof(uint32_t));
    for (int64_t r = 0; r < rows; ++r) positions[r] = position_of(a, item, item.row_begin + r);
  }

  void run() {
    for (int64_t h = item.head_begin; h < item.head_end; ++h) over_head(h);
  }

  void over_head(int64_t h) {
    memset(acc, 0, LANES * padded * sizeof(float));
    memset(sums, 0, LANES * sizeof(float));
    for (int i = 0; i < LANES; ++i) tops[i] = NO_SCORE;
    pack_queries(h);
    for (int64_t b = item.block_begin; b < item.block_end; ++b) over_block(h, b);
    for (int64_t r = 0; r < rows; ++r)
      emit_row<X>(a, item, h, item.row_begin + r, acc + r * padded, tops[r], sums[r]);
  }

  void pack_queries(int64_t h) {
    memset(queries, 0, units * LANES * sizeof(uint32_t));
    uint32_t* row = wide_keys;  // free until the first chunk
    for (int64_t r = 0; r < rows; ++r) {
      X::load_queries(a.q, a.q_dtype, query_offset(a, item, h, item.row_begin + r), a.head_dim,
                      (typename X::Query*)row);
      for (int64_t u = 0; u < units; ++u) queries[u * LANES + r] = row[u];
    }
  }

  void over_block(int64_t h, int64_t b) {
    const Element* k = (const Element*)a.pool + slab_offset(a, a.block_ids[b], h);
    if (IS_INT8) {
      k_scales = scales_of(a, a.k_scales, a.block_ids[b], h, a.k_scales_stride);
      rblock_v_scales = scales_of(a, a.v_scales, a.block_ids[b], h, a.v_scales_stride);
    }
    for (int64_t from = 0; from < a.rblock_size; from += CHUNK_TOKENS) {
      const int64_t n = smaller(CHUNK_TOKENS, a.rblock_size - from);
      const Seen any = look(a.block_starts[b], from, n);
      if (IS_INT8) v_scales = rblock_v_scales + from + any.begin;
      if (any.begin < any.end) over_chunk(k + (from + any.begin) * a.head_dim, any.end - any.begin);
    }
  }

  // Which of the `n` keys from key `from` of the rBlock on anyone sees; `seen_*` then count from the first of these.
  Seen look(int64_t start, int64_t from, int64_t n) {
    Seen any{n, 0}, every{0, n};
    for (int64_t r = 0; r < rows; ++r) {
      const Seen seen = seen_of_rblock(a, positions[r], start).within(from, n);
      seen_begin[r] = (int32_t)seen.begin;
      seen_end[r] = (int32_t)seen.end;
      every = {larger(every.begin, seen.begin), smaller(every.end, seen.end)};
      if (seen.begin < seen.end) any = {smaller(any.begin, seen.begin), larger(any.end, seen.end)};
    }
    for (int64_t r = rows; r < LANES; ++r) {
      seen_begin[r] = 0;
      seen_end[r] = (int32_t)n;
    }
    is_masked = every.begin > any.begin || every.end < any.end;
    for (int64_t r = 0; is_masked && r < LANES; ++r) {
      seen_begin[r] -= (int32_t)any.begin;
      seen_end[r] -= (int32_t)any.begin;
    }
    return any;
  }

  void over_chunk(const Element* k, int64_t n) {
    score_keys(k, n);
    bend_scores(a, scores, n * LANES);
    if (is_masked) weigh<true>(n);
    else weigh<false>(n);
    add_values(k + slab, n);
  }

  void score_keys(const Element* k, int64_t n) {
    const uint32_t* keys = key_units<X, E>(k, n, a.head_dim, k_scales, wide_keys);
    int64_t t = 0;
    for (; t + KEYS <= n; t += KEYS)
      prefill_scores<X, KEYS, NV>(keys + t * units, units, queries, units, scores + t * LANES);
    for (; t < n; ++t) prefill_scores<X, 1, NV>(keys + t * units, units, queries, units, scores + t * LANES);
  }

  // scores -> weights 2^(score - top), row by row of lanes; keeps tops and sums, leaves what to shrink acc by.
  template <bool MASKED>
  void weigh(int64_t n) {
    const vf scale = splat(score_scale(a));
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) {
      float* s = scores + i * W;
      vi begin, end;
      memcpy(&begin, seen_begin + i * W, sizeof begin);
      memcpy(&end, seen_end + i * W, sizeof end);
      vf top = load(tops + i * W);
      const vf old_top = top;
      for (int64_t t = 0; t < n; ++t) {
        vf x = load(s + t * LANES) * scale;
        if (MASKED) x = ((vi{} + (int32_t)t >= begin) & (vi{} + (int32_t)t < end)) ? x : splat(NO_SCORE);
        store(s + t * LANES, x);
        top = vmax(x, top);
      }
      const vf base = (top == splat(NO_SCORE)) ? vf{} : top;
      const vf shrink = exp2_of(old_top - base);
      vf total = load(sums + i * W) * shrink;
      for (int64_t t = 0; t < n; t += X::STEP) {
        vf p[2];
        for (int j = 0; j < X::STEP; ++j) {
          if (t + j >= n) {
            p[j] = vf{};
            continue;
          }
          const vf x = load(s + (t + j) * LANES);
          p[j] = exp2_of(x - base);
          if (MASKED) p[j] = (x == splat(NO_SCORE)) ? vf{} : p[j];
        }
        total = total + (X::STEP == 2 ? p[0] + p[1] : p[0]);
        for (int j = 0; IS_INT8 && j < X::STEP && t + j < n; ++j) p[j] = p[j] * splat(v_scales[t + j]);
        store_unit<X>(weights + t / X::STEP * LANES + i * W, p);
      }
      store(tops + i * W, top);
      store(sums + i * W, total);
      store(shrinks + i * W, shrink);
    }
  }

  void add_values(const Element* v, int64_t n) {
    const uint32_t* values = value_units<X, E>(v, n, a.head_dim, padded, packed_values);
    const int64_t num_units = (n + X::STEP - 1) / X::STEP;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_rows<4>(r, values, num_units);
    for (; r < rows; ++r) add_rows<1>(r, values, num_units);
  }

  template <int M>
  void add_rows(int64_t r, const uint32_t* values, int64_t num_units) {
    constexpr int C = W == 16 ? 4 : 2;
    int64_t d = 0;
    for (; d + C * W <= padded; d += C * W)
      prefill_values<X, M, C>(weights + r, LANES, values + d, padded, num_units, shrinks + r, acc + r * padded + d,
                              padded);
    for (; d < padded; d += W)
      prefill_values<X, M, 1>(weights + r, LANES, values + d, padded, num_units, shrinks + r, acc + r * padded + d,
                              padded);
  }
};

}  // namespace
