// int8 K and V met with integer products (AVX512_VNNI), for decode: four rows to a vector, as in quads.h.
//
// What is multiplied with K, a query times K's scales, becomes 15 bits, high * 128 + low, of each row's largest; what
// is multiplied with V, a weight times V's scale, becomes 16 bits, high * 256 + low, of each chunk's and row's largest.
// Their rounding is far below that of K and V. vpdpbusd wants one factor unsigned: K + 128, which `offset` takes back.
#pragma once

#include "fetch.h"
#include "traits.h"

#if defined(__AVX512VNNI__)
namespace {

constexpr int64_t INT8_QUAD_DIMS = 16;

// 128-bit lane r of the result: the sums of lane r of each of four vectors.
inline __m512i sums_in_lanes(const __m512i* a) {
  const __m512i x = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  const __m512i y = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
}

constexpr float MOST_QUERY = 16256;  // 127 * 128: high and low then fit a byte each

// Scales a query row so that its largest number is MOST_QUERY; returns what one is worth.
inline float scale_query(float* q, int64_t head_dim) {
  vf most = {};
  for (int64_t d = 0; d < head_dim; d += W) most = vmax(most, (vf)_mm512_abs_ps((__m512)load(q + d)));
  const float top = max_lane(most), factor = top > 0 ? MOST_QUERY / top : 0;
  for (int64_t d = 0; d < head_dim; d += W) store(q + d, load(q + d) * splat(factor));
  return top / MOST_QUERY;
}

inline float largest(const float* scales, int64_t count) {
  vf most = {};
  for (int64_t i = 0; i < count; i += W) most = vmax(most, load(scales + i));
  return max_lane(most);
}

// Query rows of one KV head, scaled by K's scales: [part][quad][step of 16 dims][row of the quad][16], as bytes.
struct Int8Queries {
  int8_t* parts;   // high then low, `rows` * head_dim each
  int32_t* offset;  // per row and lane of its quad: 128 * the sum of the row
  float* unit;      // the same: what one is worth

  // The four rows from row r on, [4][head_dim] of scale_query with their worths, all of them times K's scales.
  // What the largest number may become decides, not what it is: that costs a bit or two of 15, and saves a pass.
  KEEP_REGISTERS void pack(const float* q, const float* worth, const float* k_scales, int64_t r, int64_t rows,
                           int64_t head_dim) const {
    const float top = largest(k_scales, head_dim);
    const vf to_one = splat(top > 0 ? 1 / top : 0);
    const __m512i ones = _mm512_set1_epi16(1), half = _mm512_set1_epi16(64);
    const __m512i by_row = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i front_sums = _mm512_setzero_si512(), back_sums = front_sums;
    int8_t *high = parts + r * head_dim, *low = high + rows * head_dim;
    for (int64_t d = 0; d < head_dim; d += INT8_QUAD_DIMS, high += 64, low += 64) {
      const vf scale = load(k_scales + d) * to_one;
      __m512i x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = _mm512_cvtps_epi32((__m512)(load(q + i * head_dim + d) * scale));
      // Lane i of 128 bits: dims 4 i to + 3 of two rows, and then of all four.
      const __m512i front = _mm512_packs_epi32(x[0], x[1]), back = _mm512_packs_epi32(x[2], x[3]);
      const __m512i upper_front = _mm512_srai_epi16(_mm512_add_epi16(front, half), 7);
      const __m512i upper_back = _mm512_srai_epi16(_mm512_add_epi16(back, half), 7);
      const __m512i lower_front = _mm512_sub_epi16(front, _mm512_slli_epi16(upper_front, 7));
      const __m512i lower_back = _mm512_sub_epi16(back, _mm512_slli_epi16(upper_back, 7));
      const __m512i upper = _mm512_packs_epi16(upper_front, upper_back);
      _mm512_storeu_si512(high, _mm512_permutexvar_epi32(by_row, upper));
      _mm512_storeu_si512(low, _mm512_permutexvar_epi32(by_row, _mm512_packs_epi16(lower_front, lower_back)));
      front_sums = _mm512_dpwssd_epi32(front_sums, front, ones);
      back_sums = _mm512_dpwssd_epi32(back_sums, back, ones);
    }
    const __m512 a = _mm512_castsi512_ps(front_sums), b = _mm512_castsi512_ps(back_sums);
    __m512i sums = _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)),
                                    _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd)));  // rows 0 to 3 in each lane
    sums = _mm512_add_epi32(sums, _mm512_shuffle_i32x4(sums, sums, 0x4e));
    sums = _mm512_add_epi32(sums, _mm512_shuffle_i32x4(sums, sums, 0xb1));
    const __m512i to_lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    _mm512_storeu_si512(offset + r * 4, _mm512_slli_epi32(_mm512_permutexvar_epi32(to_lanes, sums), 7));
    const __m512 worths = _mm512_broadcast_f32x4(_mm_loadu_ps(worth));
    store(unit + r * 4, (vf)_mm512_permutexvar_ps(to_lanes, worths) * splat(top));
  }
};

// s[row][t] = q[row] . k[t] for Q quads of `rows` rows, from quad `first` on; garbage after the last key.
// D is the head size, or 0 where it is none of the usual ones.
template <int Q, int D>
KEEP_REGISTERS void int8_scores_of(const Int8Queries& q, int64_t first, int64_t rows, const int8_t* k, int64_t head_dim,
                                   int64_t num_keys, const Ahead& ahead, float* s) {
  constexpr int J = 8 / Q;
  const int64_t dims = D ? D : head_dim;
  const int8_t *high = q.parts + first * 4 * dims, *low = high + rows * dims;
  for (int64_t t = 0; t < num_keys; t += J) {
    const int8_t* keys = k + t * dims;
    const int64_t last = num_keys - 1 - t;
    __m512i highs[Q * J], lows[Q * J];
#pragma GCC unroll 8
    for (int i = 0; i < Q * J; ++i) highs[i] = lows[i] = _mm512_setzero_si512();
    const auto add = [&](auto key_at) __attribute__((always_inline)) {
#pragma GCC unroll 1
      for (int64_t d = 0; d < dims; d += INT8_QUAD_DIMS) {
        __m512i upper[Q], lower[Q];
#pragma GCC unroll 2
        for (int i = 0; i < Q; ++i) {
          upper[i] = _mm512_loadu_si512(high + i * 4 * dims + d * 4);
          lower[i] = _mm512_loadu_si512(low + i * 4 * dims + d * 4);
        }
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
          const __m128i* at = (const __m128i*)(keys + key_at(j) * dims + d);
          const __m512i key = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128(at)), _mm512_set1_epi8((char)0x80));
#pragma GCC unroll 2
          for (int i = 0; i < Q; ++i) {
            highs[i * J + j] = _mm512_dpbusd_epi32(highs[i * J + j], key, upper[i]);
            lows[i * J + j] = _mm512_dpbusd_epi32(lows[i * J + j], key, lower[i]);
          }
        }
#pragma GCC unroll 2
        for (int i = 0; i < J * 16; i += 64) ahead.prefetch_from<1>((const char*)keys + d * J + i);
      }
    };
    if (last >= J - 1) add([](int64_t j) { return j; });
    else add([last](int64_t j) { return smaller(j, last); });
#pragma GCC unroll 2
    for (int i = 0; i < Q; ++i) {
      const __m512i offset = _mm512_loadu_si512(q.offset + (first + i) * 16);
      const __m512 unit = _mm512_loadu_ps(q.unit + (first + i) * 16);
#pragma GCC unroll 2
      for (int j = 0; j < J; j += 4) {
        __m512i both[4];
#pragma GCC unroll 4
        for (int m = 0; m < 4; ++m)
          both[m] = _mm512_add_epi32(_mm512_slli_epi32(highs[i * J + j + m], 7), lows[i * J + j + m]);
        const __m512 four = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums_in_lanes(both), offset)), unit);
        float* to = s + (first + i) * 4 * CHUNK_TOKENS + t + j;
        _mm_storeu_ps(to, _mm512_castps512_ps128(four));
        _mm_storeu_ps(to + CHUNK_TOKENS, _mm512_extractf32x4_ps(four, 1));
        _mm_storeu_ps(to + 2 * CHUNK_TOKENS, _mm512_extractf32x4_ps(four, 2));
        _mm_storeu_ps(to + 3 * CHUNK_TOKENS, _mm512_extractf32x4_ps(four, 3));
      }
    }
  }
}

template <int Q>
inline void int8_scores_of(const Int8Queries& q, int64_t first, int64_t rows, const int8_t* k, int64_t head_dim,
                           int64_t num_keys, const Ahead& ahead, float* s) {
  if (head_dim == 128) return int8_scores_of<Q, 128>(q, first, rows, k, head_dim, num_keys, ahead, s);
  int8_scores_of<Q, 0>(q, first, rows, k, head_dim, num_keys, ahead, s);
}

inline void int8_scores(const Int8Queries& q, int64_t rows, const int8_t* k, int64_t head_dim, int64_t num_keys,
                        const Ahead& ahead, float* s) {
  int64_t quad = 0;
  for (; quad + 2 <= rows / 4; quad += 2)
    int8_scores_of<2>(q, quad, rows, k, head_dim, num_keys, quad == 0 ? ahead : Ahead{}, s);
  if (quad < rows / 4) int8_scores_of<1>(q, quad, rows, k, head_dim, num_keys, quad == 0 ? ahead : Ahead{}, s);
}

// Weights of one row, times the tokens' scales, as bytes, high then low part, each [CHUNK_TOKENS], with zeros after the
// last key; returns what one of them is worth.
inline float pack_weights(float* p, const float* v_scales, int64_t num_keys, uint8_t* high, uint8_t* low) {
  vf most = {};
  for (int64_t t = 0; t < CHUNK_TOKENS; t += W) {
    const int64_t here = num_keys - t;
    const __mmask16 keys = here >= W ? 0xffff : here > 0 ? (1u << here) - 1 : 0;
    const vf x = (vf)_mm512_maskz_mul_ps(keys, (__m512)load(p + t), _mm512_maskz_loadu_ps(keys, v_scales + t));
    most = vmax(most, x);
    store(p + t, x);
  }
  const float top = max_lane(most), factor = top > 0 ? 65280.f / top : 0;
  for (int64_t t = 0; t < CHUNK_TOKENS; t += W) {
    const __m512i x = _mm512_cvtps_epi32((__m512)(load(p + t) * splat(factor)));
    _mm_storeu_si128((__m128i*)(high + t), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
    _mm_storeu_si128((__m128i*)(low + t), _mm512_cvtepi32_epi8(x));
  }
  return top / 65280.f;
}

// acc[r][dims] = acc[r][dims] * shrink[r] + sum over tokens of p[r][t] v[t][dims], four rows, half of the 64 dims from
// `v` on. Of 64 dims, vector i holds dims 16 * lane + 4 * i to + 3.
template <int HALF>
KEEP_REGISTERS void int8_values_of(const uint8_t* high, const uint8_t* low, const float* unit, const int8_t* v,
                                   int64_t head_dim, int64_t num_keys, Fetch& fetch, const float* shrink, float* acc,
                                   int64_t padded) {
  __m512i highs[8], lows[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) highs[i] = lows[i] = _mm512_setzero_si512();
  const auto add = [&](int64_t t, const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d)
                       __attribute__((always_inline)) {
    const auto mix = [](const int8_t* x, const int8_t* y) __attribute__((always_inline)) {
      const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(y);
      return HALF == 0 ? _mm512_unpacklo_epi8(first, second) : _mm512_unpackhi_epi8(first, second);
    };
    const __m512i front = mix(a, b), back = mix(c, d);
    const __m512i four[2] = {_mm512_unpacklo_epi16(front, back), _mm512_unpackhi_epi16(front, back)};
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      int32_t upper, lower;
      memcpy(&upper, high + r * CHUNK_TOKENS + t, 4);
      memcpy(&lower, low + r * CHUNK_TOKENS + t, 4);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        highs[r * 2 + i] = _mm512_dpbusd_epi32(highs[r * 2 + i], _mm512_set1_epi32(upper), four[i]);
        lows[r * 2 + i] = _mm512_dpbusd_epi32(lows[r * 2 + i], _mm512_set1_epi32(lower), four[i]);
      }
    }
  };
  int64_t t = 0;
  const int8_t* at = v;
#pragma GCC unroll 1
  for (; t + 4 <= num_keys; t += 4, at += 4 * head_dim) {
    add(t, at, at + head_dim, at + 2 * head_dim, at + 3 * head_dim);
    fetch.step<1>();
  }
  if (t < num_keys) {  // the missing ones have no weight
    const int64_t last = num_keys - 1 - t;
    add(t, at, at + smaller(1, last) * head_dim, at + smaller(2, last) * head_dim, at + last * head_dim);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      float* to = acc + r * padded + (HALF * 2 + i) * W;
      const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(highs[r * 2 + i], 8), lows[r * 2 + i]);
      store(to, load(to) * splat(shrink[r]) + (vf)_mm512_cvtepi32_ps(both) * splat(unit[r]));
    }
}

inline void int8_values(const uint8_t* high, const uint8_t* low, const float* unit, const int8_t* v, int64_t head_dim,
                        int64_t num_keys, Fetch& fetch, const float* shrink, float* acc, int64_t padded) {
  for (int64_t d = 0; d < head_dim; d += 64) {
    int8_values_of<0>(high, low, unit, v + d, head_dim, num_keys, fetch, shrink, acc + d, padded);
    int8_values_of<1>(high, low, unit, v + d, head_dim, num_keys, fetch, shrink, acc + d, padded);
  }
}

}  // namespace
#endif
