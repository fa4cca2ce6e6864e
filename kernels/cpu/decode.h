// MicroAttention for few query rows per KV head (decode): bound by reading K and V once.
//
// rBlock by rBlock, head by head, K then V: the order in which they lie in memory. Four query rows share each load of K
// and of V (octets.h: up to sixteen); what lies further on this walk is prefetched meanwhile (walk.h, fetch.h).
#pragma once

#include "decode_tiles.h"
#include "int8_quads.h"
#include "isa.h"
#include "traits.h"
#include "octets.h"
#include "quads.h"
#include "walk.h"

namespace {

using distkv::MAX_DECODE_ROWS;
using distkv::Item;

template <class X>
struct Decode {
  using Element = typename X::Element;

  const DistkvAttention& a;
  const Item& item;
  const Walk<X> walk;
  const int64_t rows = item.row_end - item.row_begin;
  const bool is_quads = X::IS_DOTS || (X::IS_PAIRS && !X::IS_OCTETS && rows >= 3 && a.head_dim % 8 == 0);
  // With the empty rows that fill a tile:
  const int64_t held = X::IS_OCTETS ? round_up(rows, 8) : is_quads ? round_up(rows, 4) : rows + (rows % 4 == 3);
  const int64_t padded = round_up(a.head_dim, X::CHUNK);
  const int64_t slab = (int64_t)a.rblock_size * a.head_dim;           // elements of one head's K, or V
  float *acc, *tops, *sums, *scores, *shrinks;
  typename X::Query* queries;
  typename X::Weight* weights;
  // Only for int8:
  float* scaled;                        // one KV head's queries times K's scales
  const float* v_scales = nullptr;      // of the rBlock and KV head at hand
  const float* token_scales = nullptr;  // of the chunk at hand
  int32_t* offsets;                     // what int8_quads.h keeps
  float* units;
  float* worths;                        // of all query rows
  int8_t* query_bytes;
  uint8_t* weight_bytes;                // high, then low

  Decode(const DistkvAttention& attention, const Item& work, const Item* next, char* scratch)
      : a(attention), item(work), walk{attention, work, next} {
    const int64_t heads = item.head_end - item.head_begin, all = heads * held;
    acc = (float*)scratch;
    tops = acc + all * padded;
    worths = tops + all;
    sums = tops + all * (X::IS_OCTETS || X::IS_DOTS ? 2 : 1);
    scores = sums + all * W;
    shrinks = scores + MAX_DECODE_ROWS * CHUNK_TOKENS;
    weights = (typename X::Weight*)(shrinks + MAX_DECODE_ROWS);
    queries = (typename X::Query*)((float*)weights + MAX_DECODE_ROWS * CHUNK_TOKENS);
    scaled = (float*)queries + all * padded;
    units = scaled + MAX_DECODE_ROWS * padded;
    offsets = (int32_t*)(units + 4 * MAX_DECODE_ROWS);
    query_bytes = (int8_t*)(offsets + 4 * MAX_DECODE_ROWS);
    weight_bytes = (uint8_t*)(query_bytes + 2 * MAX_DECODE_ROWS * padded);
    if (X::IS_INT8) memset(scaled, 0, MAX_DECODE_ROWS * padded * sizeof(float));
    memset(acc, 0, all * padded * sizeof(float));
    memset(sums, 0, all * W * sizeof(float));
    memset((void*)queries, 0, all * padded * sizeof(typename X::Query));
    for (float* top = tops; top < sums; ++top) *top = NO_SCORE;
    if (X::IS_DOTS) memset(worths, 0, all * sizeof(float));
  }

  void run() {
    for (int64_t h = item.head_begin; h < item.head_end; ++h)
      for (int64_t r = 0; r < rows; ++r) load_row(h, r);
    for (int64_t b = item.block_begin; b < item.block_end; ++b) over_block(b);
    for (int64_t h = item.head_begin; h < item.head_end; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t state = (h - item.head_begin) * held + r;
        const float top = tops[X::IS_OCTETS ? 2 * state : state];
        const float sum = X::IS_OCTETS ? sums[2 * state] + sums[2 * state + 1] : sum_lane(load(sums + state * W));
        emit_row<X>(a, item, h, item.row_begin + r, acc + state * padded, top, sum);
      }
  }

  void load_row(int64_t h, int64_t r) {
    const int64_t offset = query_offset(a, item, h, item.row_begin + r);
    typename X::Query* to = queries + (h - item.head_begin) * held * padded;
    const uint16_t* q = (const uint16_t*)a.q + offset;
    if constexpr (X::IS_OCTETS) {
      for (int64_t d = 0; d < a.head_dim; d += 4) memcpy(to + place_in_octets(r, d, a.head_dim), q + d, 8);
      return;
    } else if (X::IS_PAIRS && is_quads) {
      for (int64_t d = 0; d < a.head_dim; d += 8) memcpy(to + place_in_quad(r, d), q + d, 16);
      return;
    }
    X::load_queries(a.q, a.q_dtype, offset, a.head_dim, to + r * padded);
#if defined(__AVX512VNNI__)
    if constexpr (X::IS_DOTS)
      worths[(h - item.head_begin) * held + r] = scale_query((float*)to + r * padded, a.head_dim);
#endif
  }

  void over_block(int64_t b) {
    Seen seen[MAX_DECODE_ROWS];
    int64_t first = a.rblock_size, most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      seen[r] = seen_of_rblock(a, position_of(a, item, item.row_begin + r), a.block_starts[b]);
      if (seen[r].begin == seen[r].end) continue;
      first = smaller(first, seen[r].begin);
      most = larger(most, seen[r].end);
    }
    const Element* base = (const Element*)a.pool + slab_offset(a, a.block_ids[b], item.head_begin);
    for (int64_t h = 0; first < most && h < item.head_end - item.head_begin; ++h) {
      if constexpr (X::IS_INT8) take_scales(b, h);
      for (int64_t from = first; from < most; from += CHUNK_TOKENS) {
        const int64_t n = smaller(CHUNK_TOKENS, most - from), place = h * a.head_stride + from * a.head_dim;
        over_chunk(h, base + place, n, from, seen, walk.ahead_of(b, base, place), walk.ahead_of(b, base, place + slab));
      }
    }
  }

  // The rBlock's scales of K into a copy of the queries of KV head h; those of V into reach. Both of the next rBlock
  // are prefetched: they lie elsewhere than what they scale.
  void take_scales(int64_t b, int64_t h) {
    const int64_t head = item.head_begin + h, next = a.block_ids[b + 1 < item.block_end ? b + 1 : b];
    fetch_all(scales_of(a, a.k_scales, next, head, a.k_scales_stride), a.head_dim);
    fetch_all(scales_of(a, a.v_scales, next, head, a.v_scales_stride), a.rblock_size);
    const float* k_scales = scales_of(a, a.k_scales, a.block_ids[b], head, a.k_scales_stride);
    v_scales = scales_of(a, a.v_scales, a.block_ids[b], head, a.v_scales_stride);
    const float* q = (const float*)queries + h * held * padded;
#if defined(__AVX512VNNI__)
    if constexpr (X::IS_DOTS) return pack_queries(q, worths + h * held, k_scales);
#endif
    for (int64_t r = 0; r < held; ++r)
      for (int64_t d = 0; d < a.head_dim; ++d) scaled[r * padded + d] = q[r * padded + d] * k_scales[d];
  }

  void over_chunk(int64_t h, const Element* k, int64_t n, int64_t from, const Seen* seen, const Ahead& k_ahead,
                  const Ahead& v_ahead) {
    const int64_t state = h * held;
    if (X::IS_INT8) token_scales = v_scales + from;
    score(state, k, n, k_ahead);
    bend_scores(a, scores, held * CHUNK_TOKENS);
    const char* v = (const char*)(k + slab);
    Fetch fetch{v, v + n * a.head_dim * (int64_t)sizeof(Element), v_ahead};
    weigh(state, n, from, seen, fetch);
    if constexpr (X::IS_INT8 && !X::IS_DOTS)
      for (int64_t r = 0; r < held; ++r)
        for (int64_t t = 0; t < n; ++t) ((float*)weights)[r * CHUNK_TOKENS + t] *= token_scales[t];
    add_values(state, k + slab, n, fetch);
  }

  void weigh(int64_t state, int64_t n, int64_t from, const Seen* seen, Fetch& fetch) {
    Seen here[MAX_DECODE_ROWS] = {};
    for (int64_t r = 0; r < rows; ++r) here[r] = seen[r].within(from, n);
    // Asks once more for the chunk's values, while nothing else is loaded: whatever was dropped is then on its
    // way before it is waited for.
    Fetch again{fetch.next, fetch.end, Ahead{}};
    if constexpr (X::IS_OCTETS) {
      again.spread_over(held / OCTET * (n / 8));
      for (int64_t r = 0; r < held; r += OCTET)
        octet_weights(scores + r * CHUNK_TOKENS, OctetSeen(here + r, rows - r, n), n, score_scale(a),
                      tops + (state + r) * 2, sums + (state + r) * 2, shrinks + r, weights + r * CHUNK_TOKENS, again);
      return;
    }
    again.spread_over(held);
    for (int64_t r = 0; r < held; ++r) {
      if (times_to_ask<X>(rows) == 3) fetch.template lines<3>(smaller(16, 64 / held));
      else again.template step<1>();
      decode_weights<X>(scores + r * CHUNK_TOKENS, here[r], n, score_scale(a), tops + state + r, sums + (state + r) * W,
                     shrinks + r, weights + r * CHUNK_TOKENS);
    }
  }

  void add_values(int64_t state, const Element* v, int64_t n, Fetch& fetch) {
#if defined(__AVX512VNNI__)
    if constexpr (X::IS_DOTS) return add_int8_values(state, v, n, fetch);
#endif
    for_value_tiles([&](auto tile, int64_t r) {
      constexpr int R = decltype(tile)::ROWS;
      const typename X::Weight* p = X::weights_of(weights, r);
      float* out = acc + (state + r) * padded;
      decode_all_values<X, R>(p, v, a.head_dim, n, larger(R, rows - r), fetch, shrinks + r, out, padded);
    });
  }

#if defined(__AVX512VNNI__)
  void pack_queries(const float* q, const float* worth, const float* k_scales) {
    for (int64_t r = 0; r < held; r += 4) bytes().pack(q + r * padded, worth + r, k_scales, r, held, a.head_dim);
  }

  Int8Queries bytes() const { return {query_bytes, offsets, units}; }

  void add_int8_values(int64_t state, const int8_t* v, int64_t n, Fetch& fetch) {
    uint8_t *high = weight_bytes, *low = high + MAX_DECODE_ROWS * CHUNK_TOKENS;
    float worth[MAX_DECODE_ROWS];
    for (int64_t r = 0; r < held; ++r)
      worth[r] = pack_weights((float*)weights + r * CHUNK_TOKENS, token_scales, n, high + r * CHUNK_TOKENS,
                              low + r * CHUNK_TOKENS);
    fetch.spread_over(held / 4 * (a.head_dim / 32) * (n / 4));
    for (int64_t r = 0; r < held; r += 4)
      int8_values(high + r * CHUNK_TOKENS, low + r * CHUNK_TOKENS, worth + r, v, a.head_dim, n, fetch, shrinks + r,
                  acc + (state + r) * padded, padded);
  }
#endif

  void score(int64_t state, const Element* k, int64_t n, const Ahead& ahead) {
    const typename X::Query* q = X::IS_INT8 ? (const typename X::Query*)scaled : queries + state * padded;
#if defined(__AVX512VNNI__)
    if constexpr (X::IS_DOTS) return int8_scores(bytes(), held, k, a.head_dim, n, ahead, scores);
#endif
    if constexpr (X::IS_OCTETS) return octet_scores(held / OCTET, q, k, a.head_dim, n, ahead, scores);
    if constexpr (X::IS_PAIRS)
      if (is_quads) return quad_scores(q, k, a.head_dim, n, ahead, scores);
    for_tiles([&](auto tile, int64_t r) {
      constexpr int R = decltype(tile)::ROWS;
      float* s = scores + r * CHUNK_TOKENS;
      if (r == 0) decode_scores<X, R, true>(q, padded, k, a.head_dim, n, ahead, s);
      else decode_scores<X, R, false>(q + r * padded, padded, k, a.head_dim, n, ahead, s);
    });
  }

  template <int R>
  struct Tile {
    static constexpr int ROWS = R;
  };

  // Pairs of V are made by shuffling: eight rows at a time share them.
  template <class F>
  void for_value_tiles(F work) const {
    int64_t r = 0;
    if constexpr (X::IS_PAIRS)
      for (; X::IS_OCTETS && rows - r >= 7; r += 8) work(Tile<8>{}, r);
    for_tiles(work, r);
  }

  // Tiles of four rows, then two or one; three are a tile of four with an empty row.
  template <class F>
  void for_tiles(F work, int64_t r = 0) const {
    for (; rows - r >= 3; r += 4) work(Tile<4>{}, r);
    if (rows - r == 2) work(Tile<2>{}, r);
    if (rows - r == 1) work(Tile<1>{}, r);
  }
};

}  // namespace
