// What prefill.h does with one chunk of keys, in units of 32 bits: scores, weights and values of query rows in lanes.
#pragma once

#include "traits.h"

namespace {

template <class X>
inline vf unit_of_all_lanes(const uint32_t* p) {
  return (vf)(vu{} + *p);
}

template <class X>
inline vf multiply_add_units(vf a, vf b, vf sum) {
  return X::multiply_add((typename X::Operand)a, (typename X::Operand)b, sum);
}

// s[m][lanes] = k[m] . q[lanes] for M keys, NV vectors of query rows.
template <class X, int M, int NV>
inline void prefill_scores(const uint32_t* k, int64_t key_stride, const uint32_t* q, int64_t units, float* s) {
  vf sums[M * NV];
#pragma GCC unroll 16
  for (int i = 0; i < M * NV; ++i) sums[i] = vf{};
  for (int64_t u = 0; u < units; ++u) {
    vf query[NV];
#pragma GCC unroll 4
    for (int i = 0; i < NV; ++i) query[i] = load((const float*)q + u * NV * W + i * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf key = unit_of_all_lanes<X>(k + m * key_stride + u);
#pragma GCC unroll 4
      for (int i = 0; i < NV; ++i) sums[m * NV + i] = multiply_add_units<X>(key, query[i], sums[m * NV + i]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M * NV; ++i) store(s + i * W, sums[i]);
}

// acc[m][dims] = acc[m][dims] * shrink[m] + sum over units of keys of p[unit][m] v[unit][dims], C vectors of dims.
template <class X, int M, int C>
inline void prefill_values(const uint32_t* p, int64_t lanes, const uint32_t* v, int64_t unit_stride, int64_t units,
                        const float* shrink, float* acc, int64_t padded) {
  vf sums[M * C];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) sums[m * C + i] = load(acc + m * padded + i * W) * splat(shrink[m]);
  for (int64_t u = 0; u < units; ++u) {
    vf value[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) value[i] = load((const float*)v + u * unit_stride + i * W);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const vf weight = unit_of_all_lanes<X>(p + u * lanes + m);
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) sums[m * C + i] = multiply_add_units<X>(weight, value[i], sums[m * C + i]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) store(acc + m * padded + i * W, sums[m * C + i]);
}

// One unit of weights per lane.
template <class X>
inline void store_unit(uint32_t* to, const vf* p) {
#if defined(__AVX512BF16__)
  if constexpr (X::IS_PAIRS) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]);  // p[0] in the lower half
    const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    return;
  }
#endif
  store((float*)to, p[0]);
}

}  // namespace
