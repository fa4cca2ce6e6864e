// The C function that makes full rBlocks int8.
#include "dispatch.h"
#include "isa.h"
#include "threads.h"

namespace {

// Fewer bytes than this are not worth another thread.
constexpr int64_t BYTES_WORTH_A_THREAD = 256 * 1024;

bool are_inside(const int64_t* ids, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= end) return false;
  return true;
}

}  // namespace

extern "C" int32_t distkv_pack_rblocks(const DistkvPack* args) {
  const DistkvPack& a = *args;
  if (a.struct_size != sizeof a) return DISTKV_OTHER_ABI;
  const int64_t numbers = 2 * static_cast<int64_t>(a.rblock_size) * a.head_dim;  // of one head
  if (numbers % 4 != 0) return DISTKV_UNSUPPORTED;                               // the scales would not be aligned
  if (a.from_layer < 0 || a.from_layer >= a.from_layers || a.layer < 0 || a.layer >= a.num_layers)
    return DISTKV_BAD_INDEX;
  if (!are_inside(a.from_ids, a.count, a.from_blocks) || !are_inside(a.block_ids, a.count, a.num_blocks))
    return DISTKV_BAD_INDEX;
  const int64_t bytes = numbers * (a.from_dtype == DISTKV_FP32 ? 4 : 2);
  const int64_t packed = numbers + 4 * (static_cast<int64_t>(a.head_dim) + a.rblock_size);
  const int64_t count = a.count * a.kv_heads;
  const int threads = count * bytes < BYTES_WORTH_A_THREAD ? 1 : a.num_threads;
  const auto& isa = distkv::isa_in_use();
  distkv::parallel_for(count, threads, [&](int64_t i, auto...) {
    const int64_t n = i / a.kv_heads, h = i % a.kv_heads;
    const int64_t from = (a.from_ids[n] * a.from_layers + a.from_layer) * a.kv_heads + h;
    const int64_t to = (a.block_ids[n] * a.num_layers + a.layer) * a.kv_heads + h;
    isa.quantize(static_cast<const char*>(a.from) + from * bytes, a.from_dtype, a.rblock_size, a.head_dim,
                 static_cast<int8_t*>(a.pool) + to * packed);
  });
  return DISTKV_OK;
}
