// Scores and weights of five and more bf16 query rows per KV head: eight rows to a vector, an "octet".
//
// Lanes 2r and 2r + 1 (32 bits each) hold 4 dims of query row r; 4 dims of a key go to all pairs of lanes. Loading does
// that by itself for 64 bits; for the 128 bits of quads.h it takes a shuffle, on a port that products need. Per key
// only two lanes are left to sum up, and weights come out in pairs of keys, as decode_values takes them.
#pragma once

#include "fetch.h"
#include "decode_tiles.h"
#include "traits.h"

namespace {

constexpr int64_t OCTET = 8;
constexpr int64_t OCTET_DIMS = 4;
constexpr int64_t OCTET_SCORES = OCTET * CHUNK_TOKENS;  // of a chunk, [pair of keys][row][2]

// Where dim d of row r stands in packed queries, [octet][step of 4 dims][row of the octet][4].
inline int64_t place_in_octets(int64_t r, int64_t d, int64_t head_dim) {
  return r / OCTET * OCTET * head_dim + d / OCTET_DIMS * 32 + r % OCTET * OCTET_DIMS + d % OCTET_DIMS;
}

// What the rows of an octet see of a chunk, each in two lanes.
struct OctetSeen {
  int32_t begin[2 * OCTET] = {}, end[2 * OCTET] = {};
  bool all = true;  // rows see all keys, which fill whole vectors

  OctetSeen(const Seen* seen, int64_t rows, int64_t num_keys) {
    for (int64_t r = 0; r < smaller(rows, OCTET); ++r) {
      begin[2 * r] = begin[2 * r + 1] = (int32_t)seen[r].begin;
      end[2 * r] = end[2 * r + 1] = (int32_t)seen[r].end;
      all &= seen[r].begin == 0 && seen[r].end == num_keys && num_keys % 2 == 0;
    }
  }
};

#if defined(__AVX512BF16__)
// Pairs, with an octet's weights as [pair of keys][row][2].
struct Octets : Pairs {
  static constexpr bool IS_OCTETS = true;
  static const Weight* weights_of(const Weight* p, int64_t r) { return p + r / OCTET * OCTET_SCORES + r % OCTET * 2; }
  static Operand weight(const Weight* p, int64_t r, int64_t t) { return two_weights(p + t * OCTET + r * 2); }
};

// Of two keys' sums: lanes 2r and 2r + 1 of the result are row r's scores.
inline vf sums_of_pairs(vf a, vf b) {
  const __m512 even = _mm512_mask_moveldup_ps((__m512)a, 0xaaaa, (__m512)b);
  const __m512 odd = _mm512_mask_movehdup_ps((__m512)b, 0x5555, (__m512)a);
  return (vf)_mm512_add_ps(even, odd);
}

// s[octet][pair][row][2] = q[row] . k[key] for Q octets; `ahead` leads to what to prefetch. D is the head size, or 0
// where it is none of the usual ones. Scores of the few keys after the last are garbage.
template <int Q, int D>
KEEP_REGISTERS void octet_scores_of(const uint16_t* q, const uint16_t* k, int64_t head_dim, int64_t num_keys,
                                    const Ahead& ahead, float* s) {
  constexpr int J = 8;  // keys at a time: with more, memory is read in more places at once
  const int64_t dims = D ? D : head_dim, steps = dims / OCTET_DIMS;
  for (int64_t t = 0; t < num_keys; t += J) {
    const uint16_t* keys = k + t * dims;
    const int64_t last = num_keys - 1 - t;
    vf sums[Q * J];
#pragma GCC unroll 16
    for (int i = 0; i < Q * J; ++i) sums[i] = vf{};
    const auto add = [&](auto key_at) __attribute__((always_inline)) {
#pragma GCC unroll 1
      for (int64_t u = 0; u < steps; ++u) {
        __m512bh queries[Q];
#pragma GCC unroll 2
        for (int i = 0; i < Q; ++i) queries[i] = (__m512bh)_mm512_loadu_si512(q + (i * steps + u) * 32);
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) {
          int64_t four;
          memcpy(&four, keys + key_at(j) * dims + u * OCTET_DIMS, sizeof four);
          const __m512bh key = (__m512bh)_mm512_set1_epi64(four);
#pragma GCC unroll 2
          for (int i = 0; i < Q; ++i) sums[i * J + j] = (vf)_mm512_dpbf16_ps((__m512)sums[i * J + j], queries[i], key);
        }
        // In the order of memory, evenly: bursts would fill the buffers that hold what is on its way.
#pragma GCC unroll 2
        for (int i = 0; i < J * 8; i += 64) ahead.prefetch_from<1>((const char*)keys + u * J * 8 + i);
      }
    };
    if (last >= J - 1) add([](int64_t j) { return j; });
    else add([last](int64_t j) { return smaller(j, last); });
#pragma GCC unroll 2
    for (int i = 0; i < Q; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < J; j += 2)
        store(s + i * OCTET_SCORES + (t + j) * OCTET, sums_of_pairs(sums[i * J + j], sums[i * J + j + 1]));
  }
}

template <int Q>
inline void octets_of(const uint16_t* q, const uint16_t* k, int64_t head_dim, int64_t num_keys, const Ahead& ahead,
                      float* s) {
  if (head_dim == 128) return octet_scores_of<Q, 128>(q, k, head_dim, num_keys, ahead, s);
  if (head_dim == 64) return octet_scores_of<Q, 64>(q, k, head_dim, num_keys, ahead, s);
  octet_scores_of<Q, 0>(q, k, head_dim, num_keys, ahead, s);
}

// decode_weights for an octet: tops and sums are one vector each, a row's top in both its lanes. Steps `again` once for
// eight keys.
template <bool ALL>
inline void octet_weights_of(const float* s, const OctetSeen& seen, int64_t num_keys, float scale, float* tops,
                             float* sums, float* shrinks, uint16_t* p, Fetch& again) {
  vi begin, end;
  memcpy(&begin, seen.begin, sizeof begin);
  memcpy(&end, seen.end, sizeof end);
  const vi second = lane_numbers() & 1;
  const auto if_seen = [&](int64_t t, vf x, vf otherwise) __attribute__((always_inline)) {
    const vi keys = second + (int32_t)t;
    return ALL ? x : ((keys >= begin) & (keys < end)) ? x : otherwise;
  };
  vf most = splat(NO_SCORE), top = load(tops), total = load(sums);
#pragma GCC unroll 4
  for (int64_t t = 0; t < num_keys; t += 2)
    most = vmax(most, if_seen(t, load(s + t * OCTET) * splat(scale), splat(NO_SCORE)));
  _mm256_storeu_ps(shrinks, _mm256_set1_ps(1));
  if (any_above(most, top + splat(HEADROOM))) {
    const vf old_top = top;
    top = vmax(top, vmax(most, (vf)_mm512_permute_ps((__m512)most, 0xb1)));
    const vf shrink = exp2_of(old_top - top);
    _mm256_storeu_ps(shrinks, _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, (__m512)shrink)));
    total = total * shrink;
    store(tops, top);
  }
  const vf base = (top == splat(NO_SCORE)) ? vf{} : top;
  const auto weigh = [&](int64_t t) __attribute__((always_inline)) {
    const vf weights = if_seen(t, exp2_of(load(s + t * OCTET) * splat(scale) - base), vf{});
    Octets::store_weights(p + t * OCTET, weights);
    total = total + weights;
  };
  int64_t t = 0;
  for (; t + 8 <= num_keys; t += 8) {
    again.step<1>();
#pragma GCC unroll 4
    for (int64_t i = 0; i < 8; i += 2) weigh(t + i);
  }
  for (; t < num_keys; t += 2) weigh(t);
  store(sums, total);
}

inline void octet_weights(const float* s, const OctetSeen& seen, int64_t num_keys, float scale, float* tops,
                          float* sums, float* shrinks, uint16_t* p, Fetch& again) {
  if (seen.all) return octet_weights_of<true>(s, seen, num_keys, scale, tops, sums, shrinks, p, again);
  octet_weights_of<false>(s, seen, num_keys, scale, tops, sums, shrinks, p, again);
}

inline void octet_scores(int64_t num_octets, const uint16_t* q, const uint16_t* k, int64_t head_dim,
                         int64_t num_keys, const Ahead& ahead, float* s) {
  if (num_octets == 1) return octets_of<1>(q, k, head_dim, num_keys, ahead, s);
  octets_of<2>(q, k, head_dim, num_keys, ahead, s);
}

#endif
}  // namespace
