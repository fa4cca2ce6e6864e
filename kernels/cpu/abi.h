// The plain C interface of the CPU kernels: what kernels/cpu/library.py loads with ctypes. No torch, no exceptions.
//
// Strides are in elements; the last dimension of every tensor is contiguous. Pools are [B, L, K, 2, N, D], contiguous;
// attention also takes them with gaps after each head's [2, N, D]: its rBlocks, layers and heads lie at even distances.
#pragma once

#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

enum DistkvDtype : int32_t { DISTKV_FP32 = 0, DISTKV_BF16 = 1, DISTKV_FP16 = 2, DISTKV_INT8 = 3 };

enum DistkvStatus : int32_t {
  DISTKV_OK = 0,
  DISTKV_OTHER_ABI = 1,     // the caller's struct is not this one
  DISTKV_BAD_INDEX = 2,     // an rBlock id, slot or offset points outside its tensor
  DISTKV_UNSUPPORTED = 3,   // a shape or dtype that the caller should have refused
  DISTKV_OUT_OF_MEMORY = 4,
};

// Contract: megatron_distkv/ops/micro_attention.py. Outputs are contiguous fp32.
struct DistkvAttention {
  uint32_t struct_size;
  int32_t num_threads;
  int32_t q_dtype, kv_dtype;
  int32_t num_heads, kv_heads, head_dim, rblock_size;
  int32_t layer, num_layers;
  int32_t causal;
  float scale;
  float soft_cap;  // 0: none
  int64_t window;  // 0: none
  int64_t num_tokens, num_sequences, num_listed, num_blocks;
  const void* q;
  int64_t q_token_stride, q_head_stride;
  const void* pool;
  int64_t head_stride;               // from one KV head of the pool to the next: 2 N D where there are no gaps
  const float *k_scales, *v_scales;  // of int8 pools: [B, L, K, D] and [B, L, K, N]
  int64_t k_scales_stride, v_scales_stride;  // from those of one KV head to the next
  const int64_t *block_ids, *block_starts, *cu_blocks, *cu_queries, *positions;
  float *out, *lse;
};

// Token t's K and V, [T, K, D] each, into slot slots[t] = rBlock id * N + offset of `layer`, cast to the pool's dtype.
// The first `rotated` dims of K (0: none) are turned on the way, as distkv_apply_rope does, and rounded only once.
struct DistkvStore {
  uint32_t struct_size;
  int32_t num_threads;
  int32_t source_dtype, pool_dtype;
  int32_t kv_heads, head_dim, rblock_size, layer, num_layers, rotated;
  int64_t num_tokens, num_blocks;
  const void *k, *v;
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  const float *cos, *sin;  // [T, rotated]
  void* pool;
  const int64_t* slots;
};

// Full rBlocks from_ids[i] of `from` [B, L, K, 2, N, D], as int8 with their scales, into rBlocks block_ids[i] of `pool`
// (packed as ops/int8_kv.py says; both contiguous, one layer of each).
struct DistkvPack {
  uint32_t struct_size;
  int32_t num_threads;
  int32_t from_dtype, kv_heads, head_dim, rblock_size;
  int32_t from_layer, from_layers, layer, num_layers;
  int64_t from_blocks, num_blocks, count;
  const void* from;
  void* pool;
  const int64_t *from_ids, *block_ids;
};

// Rotate-half RoPE of the first `rotated` dims of x [T, H, D] by cos and sin [T, rotated]; out is contiguous.
struct DistkvRope {
  uint32_t struct_size;
  int32_t num_threads;
  int32_t dtype, num_heads, head_dim, rotated;
  int64_t num_tokens, token_stride, head_stride;
  const void* x;
  const float *cos, *sin;
  void* out;
};

// Contract: megatron_distkv/ops/sampling.py. One token id of each row of logits; -1 where not all of the row are finite.
struct DistkvSample {
  uint32_t struct_size;
  int32_t num_threads;
  int32_t dtype;
  int64_t num_rows, vocabulary, row_stride;
  const void* logits;
  // Of each row.
  const float *temperatures, *top_ps, *min_ps;  // 0: the largest logit; 1: all; 0: all
  const int64_t* top_ks;                        // 0: all
  const double* uniforms;                       // in [0, 1)
  int64_t* token_ids;
};

// y = x w^T in bf16, summed in fp32: x [M, K], w [N, K], y [M, N], rows `stride` elements apart.
struct DistkvLinear {
  uint32_t struct_size;
  int32_t num_threads;
  int64_t num_rows, num_inputs, num_outputs;  // M, K, N
  int64_t x_stride, w_stride, y_stride;
  const void *x, *w;
  void* y;
};

int32_t distkv_micro_attention(const DistkvAttention* args);
int32_t distkv_store_kv(const DistkvStore* args);
int32_t distkv_pack_rblocks(const DistkvPack* args);
int32_t distkv_apply_rope(const DistkvRope* args);
int32_t distkv_sample(const DistkvSample* args);
int32_t distkv_linear(const DistkvLinear* args);

// One partial out of `parts`: outs [parts, rows, D], lses [parts, rows], all contiguous fp32.
int32_t distkv_merge(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t head_dim, float* out,
                     float* lse, int32_t num_threads);

// data[i] = pool[ids[i]] (gather) or the reverse (scatter), of `bytes` per rBlock.
int32_t distkv_gather(const void* pool, int64_t num_blocks, int64_t bytes, const int64_t* ids, int64_t count,
                      void* data, int32_t num_threads);
int32_t distkv_scatter(const void* data, void* pool, int64_t num_blocks, int64_t bytes, const int64_t* ids,
                       int64_t count, int32_t num_threads);

// The instruction set in use. distkv_use_isa takes one by name, returns 0 where this machine or build lacks it.
const char* distkv_isa();
int32_t distkv_use_isa(const char* name);

// Reads `count` chunks of `bytes` (a multiple of 4096) at base + offsets[i], in order, prefetching what comes `ahead`
// bytes later (a multiple of 4096, at most `bytes`): the ceiling that the bench measures decode against.
float distkv_read_probe(const void* base, const int64_t* offsets, int64_t count, int64_t bytes, int64_t ahead,
                        int32_t num_threads);

}  // extern "C"
#pragma GCC visibility pop
