// What each instruction set offers: one table of functions per translation unit isa_*.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace distkv {

// Work that one thread does at a time: some query rows of one sequence over some of its rBlocks and KV heads.
struct Item {
  int64_t block_begin, block_end;  // of the listed rBlocks
  int64_t first_token;             // of the sequence; row r is query head r % group of token first_token + r / group
  int64_t row_begin, row_end;
  int32_t head_begin, head_end;    // KV heads
  float *out, *lse;                // of the sequence's first token, query head 0: [tokens, H, D] and [tokens, H]
};

// Most query rows (tokens x group) of one KV head that the decode engine can take.
constexpr int64_t MAX_DECODE_ROWS = 16;
// Most query rows of one KV head in an item of the prefill engine.
constexpr int64_t ROW_TILE = 64;
// Keys whose scores are held at a time.
constexpr int64_t CHUNK_TOKENS = 64;

// One row of a DistkvSample; its logits begin at element `offset`.
struct SampledRow {
  const void* logits;
  int32_t dtype;
  int64_t offset, vocabulary;
  float temperature, top_p, min_p;
  int64_t top_k;
  double uniform;
};

// Of a product: rows of x and outputs that one thread computes at a time.
constexpr int64_t LINEAR_ROWS = 64;
constexpr int64_t LINEAR_OUTPUTS = 48;

struct Isa {
  const char* name;
  // `next` is the item that the same thread goes on with, or null.
  void (*decode)(const DistkvAttention&, const Item&, const Item* next, char* scratch);
  void (*prefill)(const DistkvAttention&, const Item&, char* scratch);
  int64_t (*max_decode_rows)(const DistkvAttention&);  // from here on the prefill engine is faster
  size_t (*scratch_bytes)(const DistkvAttention&);
  // Rows [begin, end) of the merge; part p's out and lse are p * stride rows further on.
  void (*merge)(const float* outs, const float* lses, int64_t parts, int64_t stride, int64_t begin, int64_t end,
                int64_t head_dim, float* out, float* lse);
  // One row [D]: its first `rotated` dims turned, rotate-half; from and to may be of any two float dtypes.
  void (*rotate)(const void* from, int32_t from_dtype, const float* cos, const float* sin, int64_t head_dim,
                 int64_t rotated, void* to, int32_t to_dtype);
  void (*cast)(const void* from, int32_t from_dtype, void* to, int32_t to_dtype, int64_t count);
  // One head [2, N, D] of a full rBlock, int8 with its scales behind (ops/int8_kv.py).
  void (*quantize)(const void* kv, int32_t dtype, int64_t tokens, int64_t head_dim, int8_t* to);
  int64_t (*sample)(const SampledRow&, char* scratch);
  size_t (*sampling_bytes)(int64_t vocabulary);
  void (*linear)(const DistkvLinear&, int64_t m, int64_t rows, int64_t n, int64_t outputs, char* scratch);
  size_t (*linear_bytes)();
  float (*read)(const char* from, const char* ahead, int64_t bytes);
};

const Isa& isa_baseline();
#if defined(__x86_64__)
const Isa& isa_avx2();
const Isa& isa_avx512();
const Isa& isa_avx512bf16();
#endif

}  // namespace distkv
