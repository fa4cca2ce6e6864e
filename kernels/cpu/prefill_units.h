// K and V of one chunk of keys in units of 32 bits, as prefill_tiles.h multiplies them.
//
// bf16 keys lie in units in the pool already. Of int8, K is multiplied by its scales and then rounded, V is exact: its
// scales go into the weights.
#pragma once

#include "traits.h"

namespace {

// K of `n` keys: where it lies, or in `room`, [key][dims in units]. `scales`, of int8 only, are those of K's channels.
template <class X, class E>
inline const uint32_t* key_units(const typename E::Type* k, int64_t n, int64_t head_dim, const float* scales,
                                 uint32_t* room) {
  constexpr bool IS_INT8 = sizeof(*k) == 1;
#if defined(__AVX512BF16__)
  if constexpr (X::IS_PAIRS && IS_INT8) {
    X::round_keys(k, n, head_dim, scales, (uint16_t*)room);
    return room;
  }
#endif
  if (X::IS_PAIRS || sizeof(*k) == 4) return (const uint32_t*)k;
  float* wide = (float*)room;
  widen<E>(k, n * head_dim, wide);
  for (int64_t t = 0; IS_INT8 && t < n; ++t)
    for (int64_t d = 0; d < head_dim; ++d) wide[t * head_dim + d] *= scales[d];
  return room;
}

// One unit of V of every dim; `next` is the value of the token after, null where there is none.
template <class X, class E>
inline void pack_value(const typename E::Type* value, const typename E::Type* next, int64_t head_dim, uint32_t* unit) {
  if constexpr (!X::IS_PAIRS) return widen<E>(value, head_dim, (float*)unit);
  else {
    const int64_t whole = head_dim / X::CHUNK * X::CHUNK;
    typename X::Operand parts[X::PARTS];
    int64_t d = 0;
    for (; d < whole; d += X::CHUNK) {
      X::load_values(value + d, next ? next + d : nullptr, parts);
      memcpy(unit + d, parts, sizeof parts);
    }
    if (d < head_dim) {
      X::load_first_values(value + d, next ? next + d : nullptr, head_dim - d, parts);
      memcpy(unit + d, parts, sizeof parts);
    }
  }
}

// V of `n` tokens as [unit][padded]; beyond head_dim `room` stays as it is: zero.
template <class X, class E>
inline const uint32_t* value_units(const typename E::Type* v, int64_t n, int64_t head_dim, int64_t padded,
                                   uint32_t* room) {
  if (sizeof(*v) == 4 && head_dim == padded) return (const uint32_t*)v;  // fp32 in whole vectors
  for (int64_t t = 0; t < n; t += X::STEP) {
    const typename E::Type* value = v + t * head_dim;
    pack_value<X, E>(value, X::STEP == 2 && t + 1 < n ? value + head_dim : nullptr, head_dim,
                     room + t / X::STEP * padded);
  }
  return room;
}

}  // namespace
