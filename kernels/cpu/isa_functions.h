// The table of this translation unit's functions, from attention to casts.
#pragma once

#include "decode.h"
#include "linear.h"
#include "prefill.h"
#include "quantize.h"
#include "rows.h"
#include "sampling.h"

namespace {

// bf16 queries and keys are multiplied as they are where the machine can. Not in heads of a few dims: the rounding of
// the weights then does not average out.
inline bool takes_pairs(const DistkvAttention& a) {
  return a.q_dtype == DISTKV_BF16 && a.kv_dtype == DISTKV_BF16 && a.head_dim % 2 == 0 && a.head_dim >= 32;
}

// The same for int8 keys in prefill.
inline bool takes_wide_pairs(const DistkvAttention& a) {
  return a.q_dtype == DISTKV_BF16 && a.kv_dtype == DISTKV_INT8 && a.head_dim % 2 == 0 && a.head_dim >= 32;
}

// Up to 256 dims: the sums of integer products must fit 32 bits.
inline bool takes_dots(const DistkvAttention& a) {
  return a.kv_dtype == DISTKV_INT8 && a.head_dim % 64 == 0 && a.head_dim <= 256;
}

// Two query rows and less are faster widened: a step of integer products is made for four.
constexpr int64_t MOST_WIDENED_ROWS = 2;

void decode(const DistkvAttention& a, const Item& item, const Item* next, char* scratch) {
#if defined(__AVX512BF16__)
  if (takes_pairs(a) && item.row_end - item.row_begin > 4 && a.head_dim % 8 == 0)
    return Decode<Octets>(a, item, next, scratch).run();
  if (takes_pairs(a)) return Decode<Pairs>(a, item, next, scratch).run();
#endif
#if defined(__AVX512VNNI__)
  if (takes_dots(a) && item.row_end - item.row_begin > MOST_WIDENED_ROWS)
    return Decode<Dots>(a, item, next, scratch).run();
#endif
  if (a.kv_dtype == DISTKV_INT8) return Decode<Widened<Int8>>(a, item, next, scratch).run();
  if (a.kv_dtype == DISTKV_FP32) return Decode<Widened<Fp32>>(a, item, next, scratch).run();
  if (a.kv_dtype == DISTKV_BF16) return Decode<Widened<Bf16>>(a, item, next, scratch).run();
  Decode<Widened<Fp16>>(a, item, next, scratch).run();
}

constexpr int MOST_VECTORS = W == 16 ? 4 : 2;  // of query rows that the registers take

template <class X, class E>
inline void prefill_of(const DistkvAttention& a, const Item& item, char* scratch) {
  const int64_t rows = item.row_end - item.row_begin;
  if (rows <= W) Prefill<X, E, 1>(a, item, scratch).run();
  else if (rows <= 2 * W) Prefill<X, E, 2>(a, item, scratch).run();
  else Prefill<X, E, MOST_VECTORS>(a, item, scratch).run();
}

void prefill(const DistkvAttention& a, const Item& item, char* scratch) {
  constexpr int64_t LANES = MOST_VECTORS * W;
  for (int64_t r = item.row_begin; r < item.row_end; r += LANES) {
    Item part = item;
    part.row_begin = r;
    part.row_end = smaller(r + LANES, item.row_end);
#if defined(__AVX512BF16__)
    if (takes_pairs(a)) {
      prefill_of<Pairs, Bf16>(a, part, scratch);
      continue;
    }
    if (takes_wide_pairs(a)) {
      prefill_of<WidePairs, Int8>(a, part, scratch);
      continue;
    }
#endif
    if (a.kv_dtype == DISTKV_FP32) prefill_of<Widened<Fp32>, Fp32>(a, part, scratch);
    else if (a.kv_dtype == DISTKV_INT8) prefill_of<Widened<Fp32>, Int8>(a, part, scratch);
    else if (a.kv_dtype == DISTKV_BF16) prefill_of<Widened<Fp32>, Bf16>(a, part, scratch);
    else prefill_of<Widened<Fp32>, Fp16>(a, part, scratch);
  }
}

int64_t max_decode_rows(const DistkvAttention& a) {
#if defined(__AVX512BF16__)
  if (takes_pairs(a) && a.head_dim % 8 == 0) return MAX_DECODE_ROWS;
#endif
#if defined(__AVX512VNNI__)
  if (takes_dots(a)) return MAX_DECODE_ROWS;
#endif
  (void)a;
  return 8;
}

// Enough for either engine at any kind.
size_t scratch_bytes(const DistkvAttention& a) {
  const int64_t padded = round_up(a.head_dim, 32), states = a.kv_heads * MAX_DECODE_ROWS;
  const int64_t int8 = MAX_DECODE_ROWS * (2 * padded + CHUNK_TOKENS + 8);
  const int64_t decode = states * (2 * padded + 2 + W) + 2 * MAX_DECODE_ROWS * CHUNK_TOKENS + MAX_DECODE_ROWS + int8;
  constexpr int64_t LANES = MOST_VECTORS * W;
  const int64_t prefill = 2 * LANES * padded + 3 * LANES + 2 * CHUNK_TOKENS * LANES + 2 * CHUNK_TOKENS * padded;
  return larger(decode, prefill) * sizeof(float);
}

}  // namespace

#define DISTKV_JOIN(a, b) a##b
#define DISTKV_TABLE(name) DISTKV_JOIN(isa_, name)
#define DISTKV_QUOTE(name) #name
#define DISTKV_STRING(name) DISTKV_QUOTE(name)

const distkv::Isa& distkv::DISTKV_TABLE(DISTKV_ISA)() {
  static constexpr Isa table = {
      DISTKV_STRING(DISTKV_ISA), decode, prefill, max_decode_rows, scratch_bytes, merge_rows, rotate, cast, quantize,
      sample_row, Row::scratch_bytes, linear, Linears::scratch_bytes, read_once,
  };
  return table;
}
