// Vectors of W floats for the instruction set that this translation unit is compiled for.
//
// Included only by isa_*.cpp. Nothing here may come from the C++ standard library: an inline function of it, compiled
// here with AVX-512, could be the copy that the linker keeps for a machine without.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "abi.h"

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

constexpr float NO_SCORE = -INFINITY;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline vf splat(float x) { return vf{} + x; }

inline vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

inline vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// For loops that need all registers: inlined, they would share them with what is around.
#define KEEP_REGISTERS __attribute__((noinline))

// To L2: L1 has no room for what comes later. GCC drops its own builtin with a loop that does nothing else.
inline void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*(const char*)p));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

inline vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

// Largest and sum of the lanes.
inline float max_lane(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < W; ++i) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

inline float sum_lane(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
#endif
}

inline bool any_above(vf x, vf limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)limit, _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int i = 0; i < W; ++i) any |= x[i] > limit[i];
  return any;
#endif
}

// Lane i of the result is the sum of the lanes of a[i].
inline vf sums_of_lanes(const vf* a) {
#if defined(__AVX512F__)
  __m512 pairs[8], fours[4], halves[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 x = (__m512)a[2 * i], y = (__m512)a[2 * i + 1];
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // Each of the four 128-bit lanes of fours[i] holds a part of the sums of a[4i .. 4i + 3].
  for (int i = 0; i < 2; ++i) {
    const __m512 x = fours[2 * i], y = fours[2 * i + 1];
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                           _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
#elif defined(__AVX2__)
  __m256 fours[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 x = _mm256_hadd_ps((__m256)a[4 * i], (__m256)a[4 * i + 1]);
    const __m256 y = _mm256_hadd_ps((__m256)a[4 * i + 2], (__m256)a[4 * i + 3]);
    fours[i] = _mm256_hadd_ps(x, y);
  }
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                           _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
  vf sums;
  for (int i = 0; i < W; ++i) sums[i] = sum_lane(a[i]);
  return sums;
#endif
}

// 2^x for x < 127, relative error 8e-8; everything below 2^-125 gives 2^-125.
inline vf exp2_of(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  x = vmax(x, splat(-125.f));
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);
  vf p = splat(1.327646697e-3f);  // minimax on [-1/2, 1/2]
  p = p * f + splat(9.675541294e-3f);
  p = p * f + splat(5.550713289e-2f);
  p = p * f + splat(2.402211972e-1f);
  p = p * f + splat(6.931469671e-1f);
  p = p * f + splat(1.000000072f);
  return (vf)((vi)p + ((vi)shifted << 23));  // the magic's own bits leave at the top
}

inline float exp2_of(float x) { return exp2_of(splat(x))[0]; }

// tanh(x), relative error 3e-7: Pade's approximant of order 7/6 in the middle, exponentials outside.
inline vf tanh_of(vf x) {
  const vf magnitude = x < 0 ? -x : x, square = x * x;
  const vf over = ((square + 378.f) * square + 17325.f) * square + 135135.f;
  const vf under = ((square * 28.f + 3150.f) * square + 62370.f) * square + 135135.f;
  const vf middle = x * over / under;
  const vf decay = exp2_of(magnitude * splat(-2.88539008178f));  // e^(-2|x|)
  const vf outside = (1.f - decay) / (1.f + decay);
  return magnitude < 1.f ? middle : (x < 0 ? -outside : outside);
}

}  // namespace
