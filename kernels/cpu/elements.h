// Element types of tensors, W at a time as floats.
#pragma once

#include "vec.h"

namespace {

inline float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  uint32_t bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;  // infinity, NaN
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    const float tiny = (float)rest * 0x1p-24f;  // subnormal
    memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t half_from_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (rest < 0x38800000) {                       // subnormal: let the addition round
    float y;
    memcpy(&y, &rest, 4);
    y += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &y, 4);
    return sign | (rounded - 0x3f000000);
  }
  return sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

struct Fp32 {
  using Type = float;
  static vf load(const Type* p) { return ::load(p); }
  static void store(Type* p, vf x) { ::store(p, x); }
};

struct Bf16 {
  using Type = uint16_t;
  static vf load(const Type* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);  // GCC takes more steps for it, so it is spelled out above
#endif
  }
  static void store(Type* p, vf x) {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const vu nan = bits >> 16 | 0x40;
    const vh h = __builtin_convertvector((x == x) ? rounded : nan, vh);
    memcpy(p, &h, sizeof h);
  }
};

// Only ever read: what an element is worth, its scale says.
struct Int8 {
  using Type = int8_t;
  static vf load(const Type* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t vb __attribute__((vector_size(W)));
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vf);  // lane by lane: GCC knows no better, so it is spelled out above
#endif
  }
};

struct Fp16 {
  using Type = uint16_t;
  static vf load(const Type* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf x;
    for (int i = 0; i < W; ++i) x[i] = half_to_float(p[i]);
    return x;
#endif
  }
  static void store(Type* p, vf x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < W; ++i) p[i] = half_from_float(x[i]);
#endif
  }
};

// The first n < W elements; the other lanes are zero.
template <class E>
inline vf load_first(const typename E::Type* p, int64_t n) {
  typename E::Type few[W] = {};
  memcpy(few, p, n * sizeof *p);
  return E::load(few);
}

template <class E>
inline void store_first(typename E::Type* p, vf x, int64_t n) {
  typename E::Type few[W];
  E::store(few, x);
  memcpy(p, few, n * sizeof *p);
}

inline int64_t element_bytes(int32_t dtype) { return dtype == DISTKV_FP32 ? 4 : dtype == DISTKV_INT8 ? 1 : 2; }

// `n` elements as floats.
template <class E>
inline void widen(const typename E::Type* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, E::load(from + i));
  if (i < n) store_first<Fp32>(to + i, load_first<E>(from + i, n - i), n - i);
}

inline void widen(const void* from, int32_t dtype, int64_t offset, int64_t n, float* to) {
  if (dtype == DISTKV_FP32) return widen<Fp32>((const float*)from + offset, n, to);
  if (dtype == DISTKV_BF16) return widen<Bf16>((const uint16_t*)from + offset, n, to);
  return widen<Fp16>((const uint16_t*)from + offset, n, to);
}

}  // namespace
