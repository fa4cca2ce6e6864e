// Scores of three or four bf16 query rows per KV head, a vector for all of them, a "quad"; of more: octets.h.
//
// Lane r of a quad's vector (128 bits) holds 8 dims of query row r; 8 dims of a key are loaded into all four lanes. So a
// load serves four rows, and what is left to sum up per key is within a lane. Needs heads of a multiple of 8 dims.
#pragma once

#include "fetch.h"
#include "traits.h"

namespace {

constexpr int64_t QUAD_DIMS = 8;

// Where dim d of row r stands in packed queries, [step of 8 dims][row][8].
inline int64_t place_in_quad(int64_t r, int64_t d) { return d / QUAD_DIMS * 32 + r * QUAD_DIMS + d % QUAD_DIMS; }

#if defined(__AVX512BF16__)
// Lane r of the result: the sums of lane r of each of four vectors.
inline vf sums_in_lanes(const vf* a) {
  const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[0], (__m512)a[1]),
                                     _mm512_unpackhi_ps((__m512)a[0], (__m512)a[1]));
  const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2], (__m512)a[3]),
                                      _mm512_unpackhi_ps((__m512)a[2], (__m512)a[3]));
  const __m512d x = _mm512_castps_pd(first), y = _mm512_castps_pd(second);
  return (vf)_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// s[row][t] = q[row] . k[t]; `ahead` leads to what to prefetch. D is the head size, or 0 where it is none of the usual
// ones. Scores of the few keys after the last are garbage.
template <int D>
inline void quad_scores_of(const uint16_t* q, const uint16_t* k, int64_t head_dim, int64_t num_keys, const Ahead& ahead,
                           float* s) {
  constexpr int J = 8;  // keys at a time
  const int64_t dims = D ? D : head_dim, steps = dims / QUAD_DIMS;
  for (int64_t t = 0; t < num_keys; t += J) {
    const uint16_t* keys = k + t * dims;
    const int64_t last = num_keys - 1 - t;
    vf sums[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums[j] = vf{};
    const auto add = [&](auto key_at) __attribute__((always_inline)) {
#pragma GCC unroll 1
      for (int64_t u = 0; u < steps; ++u) {
        const __m512bh queries = (__m512bh)_mm512_loadu_si512(q + u * 32);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
          const uint16_t* at = keys + key_at(j) * dims + u * QUAD_DIMS;
          const __m512bh key = (__m512bh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)at));
          sums[j] = (vf)_mm512_dpbf16_ps((__m512)sums[j], queries, key);
        }
        // In the order of memory, evenly: bursts would fill the buffers that hold what is on its way.
#pragma GCC unroll 2
        for (int i = 0; i < J * 16; i += 64) ahead.prefetch_from<3>((const char*)keys + u * J * 16 + i);
      }
    };
    if (last >= J - 1) add([](int64_t j) { return j; });
    else add([last](int64_t j) { return smaller(j, last); });
#pragma GCC unroll 2
    for (int j = 0; j < J; j += 4) {
      const __m512 four = (__m512)sums_in_lanes(sums + j);
      float* to = s + t + j;
      _mm_storeu_ps(to, _mm512_castps512_ps128(four));
      _mm_storeu_ps(to + CHUNK_TOKENS, _mm512_extractf32x4_ps(four, 1));
      _mm_storeu_ps(to + 2 * CHUNK_TOKENS, _mm512_extractf32x4_ps(four, 2));
      _mm_storeu_ps(to + 3 * CHUNK_TOKENS, _mm512_extractf32x4_ps(four, 3));
    }
  }
}

inline void quad_scores(const uint16_t* q, const uint16_t* k, int64_t head_dim, int64_t num_keys, const Ahead& ahead,
                        float* s) {
  if (head_dim == 128) return quad_scores_of<128>(q, k, head_dim, num_keys, ahead, s);
  if (head_dim == 64) return quad_scores_of<64>(q, k, head_dim, num_keys, ahead, s);
  quad_scores_of<0>(q, k, head_dim, num_keys, ahead, s);
}

#endif
}  // namespace
