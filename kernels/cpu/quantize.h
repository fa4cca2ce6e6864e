// One head's K and V of a full rBlock as int8, to the bit what ops/int8_kv.py's quantize_rblocks makes of them.
#pragma once

#include <cfloat>

#include "elements.h"

namespace {

constexpr float LARGEST = 127.f;

template <class E>
inline vf load_upto(const typename E::Type* p, int64_t n) {
  return n >= W ? E::load(p) : load_first<E>(p, n);
}

// The largest magnitude so far. What is not a number, or none that is finite, stays: a maximum alone would drop it.
struct Most {
  vf top{}, poison{};

  void add(vf x) {
    top = vmax(top, (vf)((vi)x & 0x7fffffff));
    poison = poison + x * 0.f;
  }
};

// The first n of x / scale, to the nearest integer, ties to even.
inline void store_bytes(int8_t* to, vf x, vf scale, int64_t n) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const vi numbers = (vi)(x / vmax(splat(FLT_MIN), scale) + magic);
#if defined(__AVX512F__)
  if (n >= W) return _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)numbers));
#endif
  for (int64_t i = 0; i < smaller(n, W); ++i) to[i] = (int8_t)numbers[i];
}

// K [N, D] with a scale per channel.
template <class E>
inline void quantize_keys(const typename E::Type* k, int64_t tokens, int64_t head_dim, int8_t* to, float* scales) {
  for (int64_t d = 0; d < head_dim; d += W) {
    const int64_t n = smaller(W, head_dim - d);
    Most most;
    for (int64_t t = 0; t < tokens; ++t) most.add(load_upto<E>(k + t * head_dim + d, n));
    const vf scale = most.top / splat(LARGEST) + most.poison;
    store_first<Fp32>(scales + d, scale, n);
    for (int64_t t = 0; t < tokens; ++t)
      store_bytes(to + t * head_dim + d, load_upto<E>(k + t * head_dim + d, n), scale, n);
  }
}

// V [N, D] with a scale per token.
template <class E>
inline void quantize_values(const typename E::Type* v, int64_t tokens, int64_t head_dim, int8_t* to, float* scales) {
  for (int64_t t = 0; t < tokens; ++t, v += head_dim, to += head_dim) {
    Most most;
    for (int64_t d = 0; d < head_dim; d += W) most.add(load_upto<E>(v + d, head_dim - d));
    scales[t] = max_lane(most.top) / LARGEST + sum_lane(most.poison);
    for (int64_t d = 0; d < head_dim; d += W)
      store_bytes(to + d, load_upto<E>(v + d, head_dim - d), splat(scales[t]), head_dim - d);
  }
}

template <class E>
inline void quantize_of(const void* kv, int64_t tokens, int64_t head_dim, int8_t* to) {
  const typename E::Type* k = (const typename E::Type*)kv;
  const int64_t slab = tokens * head_dim;
  float* scales = (float*)(to + 2 * slab);
  quantize_keys<E>(k, tokens, head_dim, to, scales);
  quantize_values<E>(k + slab, tokens, head_dim, to + slab, scales + head_dim);
}

// [2, N, D] into a packed head: int8 [2, N, D], scales of K [D], scales of V [N].
void quantize(const void* kv, int32_t dtype, int64_t tokens, int64_t head_dim, int8_t* to) {
  if (dtype == DISTKV_FP32) quantize_of<Fp32>(kv, tokens, head_dim, to);
  else if (dtype == DISTKV_BF16) quantize_of<Bf16>(kv, tokens, head_dim, to);
  else quantize_of<Fp16>(kv, tokens, head_dim, to);
}

}  // namespace
