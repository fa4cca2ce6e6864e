// The table of this translation unit's functions, from attention to casts.
#pragma once

#include "few_rows.h"
#include "many_rows.h"
#include "quantize.h"
#include "rows.h"

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

void few_rows(const DistkvAttention& a, const Item& item, const Item* next, char* scratch) {
#if defined(__AVX512BF16__)
  if (takes_pairs(a) && item.row_end - item.row_begin > 4 && a.head_dim % 8 == 0)
    return FewRows<Octets>(a, item, next, scratch).run();
  if (takes_pairs(a)) return FewRows<Pairs>(a, item, next, scratch).run();
#endif
#if defined(__AVX512VNNI__)
  if (takes_dots(a) && item.row_end - item.row_begin > MOST_WIDENED_ROWS)
    return FewRows<Dots>(a, item, next, scratch).run();
#endif
  if (a.kv_dtype == DISTKV_INT8) return FewRows<Widened<Int8>>(a, item, next, scratch).run();
  if (a.kv_dtype == DISTKV_FP32) return FewRows<Widened<Fp32>>(a, item, next, scratch).run();
  if (a.kv_dtype == DISTKV_BF16) return FewRows<Widened<Bf16>>(a, item, next, scratch).run();
  FewRows<Widened<Fp16>>(a, item, next, scratch).run();
}

constexpr int MOST_VECTORS = W == 16 ? 4 : 2;  // of query rows that the registers take

template <class X, class E>
inline void many_rows_of(const DistkvAttention& a, const Item& item, char* scratch) {
  const int64_t rows = item.row_end - item.row_begin;
  if (rows <= W) ManyRows<X, E, 1>(a, item, scratch).run();
  else if (rows <= 2 * W) ManyRows<X, E, 2>(a, item, scratch).run();
  else ManyRows<X, E, MOST_VECTORS>(a, item, scratch).run();
}

void many_rows(const DistkvAttention& a, const Item& item, char* scratch) {
  constexpr int64_t LANES = MOST_VECTORS * W;
  for (int64_t r = item.row_begin; r < item.row_end; r += LANES) {
    Item part = item;
    part.row_begin = r;
    part.row_end = smaller(r + LANES, item.row_end);
#if defined(__AVX512BF16__)
    if (takes_pairs(a)) {
      many_rows_of<Pairs, Bf16>(a, part, scratch);
      continue;
    }
    if (takes_wide_pairs(a)) {
      many_rows_of<WidePairs, Int8>(a, part, scratch);
      continue;
    }
#endif
    if (a.kv_dtype == DISTKV_FP32) many_rows_of<Widened<Fp32>, Fp32>(a, part, scratch);
    else if (a.kv_dtype == DISTKV_INT8) many_rows_of<Widened<Fp32>, Int8>(a, part, scratch);
    else if (a.kv_dtype == DISTKV_BF16) many_rows_of<Widened<Fp32>, Bf16>(a, part, scratch);
    else many_rows_of<Widened<Fp32>, Fp16>(a, part, scratch);
  }
}

int64_t most_few_rows(const DistkvAttention& a) {
#if defined(__AVX512BF16__)
  if (takes_pairs(a) && a.head_dim % 8 == 0) return FEW_ROWS;
#endif
#if defined(__AVX512VNNI__)
  if (takes_dots(a)) return FEW_ROWS;
#endif
  (void)a;
  return 8;
}

// Enough for either engine at any kind.
size_t scratch_bytes(const DistkvAttention& a) {
  const int64_t padded = round_up(a.head_dim, 32), states = a.kv_heads * FEW_ROWS;
  const int64_t int8 = FEW_ROWS * (2 * padded + CHUNK_TOKENS + 8);
  const int64_t few = states * (2 * padded + 2 + W) + 2 * FEW_ROWS * CHUNK_TOKENS + FEW_ROWS + int8;
  constexpr int64_t LANES = MOST_VECTORS * W;
  const int64_t many = 2 * LANES * padded + 3 * LANES + 2 * CHUNK_TOKENS * LANES + 2 * CHUNK_TOKENS * padded;
  return larger(few, many) * sizeof(float);
}

}  // namespace

#define DISTKV_JOIN(a, b) a##b
#define DISTKV_TABLE(name) DISTKV_JOIN(isa_, name)
#define DISTKV_QUOTE(name) #name
#define DISTKV_STRING(name) DISTKV_QUOTE(name)

const distkv::Isa& distkv::DISTKV_TABLE(DISTKV_ISA)() {
  static constexpr Isa table = {
      DISTKV_STRING(DISTKV_ISA), few_rows, many_rows, most_few_rows, scratch_bytes, merge_rows, rotate, cast, quantize, read_once,
  };
  return table;
}
