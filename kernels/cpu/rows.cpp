// The C functions that are bound by memory: store_kv, RoPE, merge, moves of rBlocks, and the read probe.
#include <cstring>

#include "dispatch.h"
#include "isa.h"
#include "threads.h"

namespace {

using distkv::isa_in_use;
using distkv::parallel_for;

// What a thread moves at a time; less than two of these are not shared out.
constexpr int64_t BYTES_PER_PIECE = 256 * 1024;

int64_t element_bytes(int32_t dtype) { return dtype == DISTKV_FP32 ? 4 : 2; }

// Calls work(begin, end) for pieces of [0, count) of about BYTES_PER_PIECE each.
template <class F>
void in_pieces(int64_t count, int64_t bytes_each, int num_threads, F work) {
  const int64_t step = bytes_each < BYTES_PER_PIECE ? BYTES_PER_PIECE / (bytes_each > 0 ? bytes_each : 1) : 1;
  parallel_for((count + step - 1) / step, num_threads, [&](int64_t i, int64_t) {
    const int64_t begin = i * step;
    work(begin, begin + step < count ? begin + step : count);
  });
}

bool are_inside(const int64_t* ids, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= end) return false;
  return true;
}

bool can_rotate(int32_t rotated, int32_t head_dim) {
  return rotated >= 0 && rotated <= head_dim && rotated % 2 == 0;
}

}  // namespace

extern "C" int32_t distkv_store_kv(const DistkvStore* args) {
  const DistkvStore& a = *args;
  if (a.struct_size != sizeof a) return DISTKV_OTHER_ABI;
  if (!can_rotate(a.rotated, a.head_dim)) return DISTKV_UNSUPPORTED;
  if (a.layer < 0 || a.layer >= a.num_layers) return DISTKV_BAD_INDEX;
  if (!are_inside(a.slots, a.num_tokens, a.num_blocks * a.rblock_size)) return DISTKV_BAD_INDEX;
  const int64_t from = element_bytes(a.source_dtype), to = element_bytes(a.pool_dtype);
  const auto& isa = isa_in_use();
  in_pieces(a.num_tokens, 2 * a.kv_heads * a.head_dim * to, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t block = a.slots[t] / a.rblock_size, offset = a.slots[t] % a.rblock_size;
      for (int64_t h = 0; h < a.kv_heads; ++h) {
        const int64_t slab = ((block * a.num_layers + a.layer) * a.kv_heads + h) * 2;
        char* k = static_cast<char*>(a.pool) + (slab * a.rblock_size + offset) * a.head_dim * to;
        char* v = k + static_cast<int64_t>(a.rblock_size) * a.head_dim * to;
        const char* new_k = static_cast<const char*>(a.k) + (t * a.k_token_stride + h * a.k_head_stride) * from;
        const char* new_v = static_cast<const char*>(a.v) + (t * a.v_token_stride + h * a.v_head_stride) * from;
        if (a.rotated == 0) isa.cast(new_k, a.source_dtype, k, a.pool_dtype, a.head_dim);
        else isa.rotate(new_k, a.source_dtype, a.cos + t * a.rotated, a.sin + t * a.rotated, a.head_dim, a.rotated, k,
                        a.pool_dtype);
        isa.cast(new_v, a.source_dtype, v, a.pool_dtype, a.head_dim);
      }
    }
  });
  return DISTKV_OK;
}

extern "C" int32_t distkv_apply_rope(const DistkvRope* args) {
  const DistkvRope& a = *args;
  if (a.struct_size != sizeof a) return DISTKV_OTHER_ABI;
  if (!can_rotate(a.rotated, a.head_dim)) return DISTKV_UNSUPPORTED;
  const int64_t bytes = element_bytes(a.dtype);
  const auto& isa = isa_in_use();
  in_pieces(a.num_tokens, bytes * a.num_heads * a.head_dim, a.num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < a.num_heads; ++h) {
        const char* x = static_cast<const char*>(a.x) + (t * a.token_stride + h * a.head_stride) * bytes;
        char* out = static_cast<char*>(a.out) + (t * a.num_heads + h) * a.head_dim * bytes;
        isa.rotate(x, a.dtype, a.cos + t * a.rotated, a.sin + t * a.rotated, a.head_dim, a.rotated, out, a.dtype);
      }
  });
  return DISTKV_OK;
}

extern "C" int32_t distkv_merge(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t head_dim,
                                float* out, float* lse, int32_t num_threads) {
  const auto& isa = isa_in_use();
  in_pieces(rows, parts * head_dim * 4, num_threads, [&](int64_t begin, int64_t end) {
    isa.merge(outs, lses, parts, rows, begin, end, head_dim, out, lse);
  });
  return DISTKV_OK;
}

extern "C" int32_t distkv_gather(const void* pool, int64_t num_blocks, int64_t bytes, const int64_t* ids,
                                 int64_t count, void* data, int32_t num_threads) {
  if (!are_inside(ids, count, num_blocks)) return DISTKV_BAD_INDEX;
  in_pieces(count, bytes, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      memcpy(static_cast<char*>(data) + i * bytes, static_cast<const char*>(pool) + ids[i] * bytes, bytes);
  });
  return DISTKV_OK;
}

extern "C" int32_t distkv_scatter(const void* data, void* pool, int64_t num_blocks, int64_t bytes, const int64_t* ids,
                                  int64_t count, int32_t num_threads) {
  if (!are_inside(ids, count, num_blocks)) return DISTKV_BAD_INDEX;
  in_pieces(count, bytes, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      memcpy(static_cast<char*>(pool) + ids[i] * bytes, static_cast<const char*>(data) + i * bytes, bytes);
  });
  return DISTKV_OK;
}

extern "C" float distkv_read_probe(const void* base, const int64_t* offsets, int64_t count, int64_t bytes,
                                   int64_t ahead, int32_t num_threads) {
  const auto& isa = isa_in_use();
  const char* start = static_cast<const char*>(base);
  std::atomic<float> total{0};
  in_pieces(count, bytes, num_threads, [&](int64_t begin, int64_t end) {
    float sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const char *chunk = start + offsets[i], *next = start + offsets[i + 1 < count ? i + 1 : 0];
      sum += isa.read(chunk, chunk + ahead, bytes - ahead);
      sum += isa.read(chunk + bytes - ahead, next, ahead);
    }
    total.store(sum);
  });
  return total;
}
