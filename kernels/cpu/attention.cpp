// distkv_micro_attention: checks, cuts the work into items for threads, merges what was cut along the keys.
//
// Where a sequence's keys are cut depends on its own shape only, so neither the batch around it nor the number of
// threads changes a bit of its result.
#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "isa.h"
#include "threads.h"

namespace distkv {
namespace {

// K and V that one item of decode reads: a PARTS-th of the sequence within these bounds, small enough to share out,
// large enough that what each item costs and merging does not show.
constexpr int64_t LEAST_BYTES_PER_ITEM = 2 << 20, MOST_BYTES_PER_ITEM = 8 << 20;
constexpr int64_t PARTS = 16;
// Keys that one item of prefill reads where a sequence has only one tile of rows.
constexpr int64_t KEYS_PER_ITEM = 4096;
// Below this much K and V in the whole call, waking another thread takes longer than the work.
constexpr int64_t BYTES_WORTH_A_THREAD = 256 * 1024;

struct Parts {
  int64_t seq, count;
  float *outs, *lses;  // [count, tokens, H, D] and [count, tokens, H]
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_sound(const DistkvAttention& a) {
  const int64_t *blocks = a.cu_blocks, *queries = a.cu_queries;
  for (int64_t s = 0; s < a.num_sequences; ++s)
    if (blocks[s] > blocks[s + 1] || queries[s] > queries[s + 1]) return false;
  if (blocks[0] != 0 || queries[0] != 0) return false;
  if (blocks[a.num_sequences] > a.num_listed || queries[a.num_sequences] > a.num_tokens) return false;
  for (int64_t i = 0; i < a.num_listed; ++i)
    if (a.block_ids[i] < 0 || a.block_ids[i] >= a.num_blocks) return false;
  return true;
}

class Plan {
 public:
  explicit Plan(const DistkvAttention& a) : a_(a), group_(a.num_heads / a.kv_heads) {
    const int64_t element_bytes = a.kv_dtype == DISTKV_FP32 ? 4 : a.kv_dtype == DISTKV_INT8 ? 1 : 2;
    kv_bytes_ = 2 * a.kv_heads * a.rblock_size * a.head_dim * element_bytes;
    prefill_blocks_ = KEYS_PER_ITEM / a.rblock_size > 0 ? KEYS_PER_ITEM / a.rblock_size : 1;
    call_bytes_ = a.num_listed * kv_bytes_;
  }

  int32_t run() {
    const Isa& isa = isa_in_use();
    max_decode_rows_ = isa.max_decode_rows(a_);
    for (int64_t s = 0; s < a_.num_sequences; ++s) add(s);
    if (!place_parts()) return DISTKV_OUT_OF_MEMORY;
    const int64_t scratch = static_cast<int64_t>(isa.scratch_bytes(a_));
    std::atomic<bool> has_memory{true};
    const int threads = call_bytes_ < BYTES_WORTH_A_THREAD && prefill_.empty() ? 1 : a_.num_threads;
    const int64_t num_prefill = static_cast<int64_t>(prefill_.size()), count = num_prefill + static_cast<int64_t>(decode_.size());
    // The longest items first, so that none is left over at the end: those of prefill, later rows before earlier.
    parallel_for(count, threads, [&](int64_t i, int64_t next) {
      char* memory = thread_memory(0, scratch);
      if (memory == nullptr) return has_memory.store(false);
      if (i < num_prefill) isa.prefill(a_, prefill_[num_prefill - 1 - i], memory);
      else isa.decode(a_, decode_[i - num_prefill], next == NO_ITEM ? nullptr : &decode_[next - num_prefill], memory);
    });
    for (const Parts& parts : parts_) merge(isa, parts);
    return has_memory ? DISTKV_OK : DISTKV_OUT_OF_MEMORY;
  }

 private:
  int64_t tokens_of(int64_t s) const { return a_.cu_queries[s + 1] - a_.cu_queries[s]; }

  void add(int64_t s) {
    const int64_t rows = tokens_of(s) * group_, blocks = a_.cu_blocks[s + 1] - a_.cu_blocks[s];
    if (rows == 0) return;
    if (blocks == 0) return clear(s);
    if (rows <= max_decode_rows_) return cut(decode_, s, rows, decode_blocks(blocks), a_.kv_heads);
    if (rows <= ROW_TILE) return cut(prefill_, s, rows, prefill_blocks_, 1);
    for (int32_t h = 0; h < a_.kv_heads; ++h)
      for (int64_t r = 0; r < rows; r += ROW_TILE) {
        const int64_t end = r + ROW_TILE < rows ? r + ROW_TILE : rows;
        prefill_.push_back(item(s, a_.cu_blocks[s], a_.cu_blocks[s + 1], r, end, h, h + 1));
      }
  }

  int64_t decode_blocks(int64_t blocks) const {
    const int64_t bytes = std::clamp(blocks * kv_bytes_ / PARTS, LEAST_BYTES_PER_ITEM, MOST_BYTES_PER_ITEM);
    return std::max<int64_t>(bytes / kv_bytes_, 1);
  }

  Item item(int64_t s, int64_t block_begin, int64_t block_end, int64_t row_begin, int64_t row_end, int32_t head_begin,
            int32_t head_end) const {
    const int64_t first = a_.cu_queries[s], row = first * a_.num_heads;
    return {block_begin, block_end, first, row_begin, row_end, head_begin, head_end, a_.out + row * a_.head_dim,
            a_.lse + row};
  }

  // All rows, `heads` KV heads at a time, in parts of `step` rBlocks.
  void cut(std::vector<Item>& items, int64_t s, int64_t rows, int64_t step, int32_t heads) {
    const int64_t begin = a_.cu_blocks[s], end = a_.cu_blocks[s + 1], count = ceil_div(end - begin, step);
    if (count > 1) parts_.push_back({s, count, nullptr, nullptr});
    for (int64_t b = begin; b < end; b += step)
      for (int32_t h = 0; h < a_.kv_heads; h += heads) {
        items.push_back(item(s, b, std::min(b + step, end), 0, rows, h, h + heads));
        if (count > 1) parted_.push_back({&items == &decode_, items.size() - 1, parts_.size() - 1, (b - begin) / step});
      }
  }

  bool place_parts() {
    const int64_t width = a_.num_heads * (a_.head_dim + 1);
    int64_t floats = 0;
    for (const Parts& parts : parts_) floats += parts.count * tokens_of(parts.seq) * width;
    if (floats == 0) return true;
    float* memory = reinterpret_cast<float*>(thread_memory(1, floats * static_cast<int64_t>(sizeof(float))));
    if (memory == nullptr) return false;
    for (Parts& parts : parts_) {
      const int64_t rows = parts.count * tokens_of(parts.seq) * a_.num_heads;
      parts.outs = memory;
      parts.lses = memory + rows * a_.head_dim;
      memory = parts.lses + rows;
    }
    for (const Parted& piece : parted_) {
      Item& item = piece.is_decode ? decode_[piece.item] : prefill_[piece.item];
      const Parts& parts = parts_[piece.parts];
      const int64_t rows = piece.part * tokens_of(parts.seq) * a_.num_heads;
      item.out = parts.outs + rows * a_.head_dim;
      item.lse = parts.lses + rows;
    }
    return true;
  }

  void merge(const Isa& isa, const Parts& parts) const {
    const int64_t rows = tokens_of(parts.seq) * a_.num_heads, first = a_.cu_queries[parts.seq] * a_.num_heads;
    isa.merge(parts.outs, parts.lses, parts.count, rows, 0, rows, a_.head_dim, a_.out + first * a_.head_dim,
              a_.lse + first);
  }

  void clear(int64_t s) const {
    const int64_t rows = tokens_of(s) * a_.num_heads, first = a_.cu_queries[s] * a_.num_heads;
    for (int64_t i = 0; i < rows * a_.head_dim; ++i) a_.out[first * a_.head_dim + i] = 0;
    for (int64_t i = 0; i < rows; ++i) a_.lse[first + i] = -__builtin_inff();
  }

  struct Parted {
    bool is_decode;
    size_t item, parts;
    int64_t part;
  };

  const DistkvAttention& a_;
  const int64_t group_;
  int64_t kv_bytes_, prefill_blocks_, call_bytes_, max_decode_rows_ = 0;
  std::vector<Item> decode_, prefill_;
  std::vector<Parts> parts_;
  std::vector<Parted> parted_;
};

}  // namespace
}  // namespace distkv

extern "C" int32_t distkv_micro_attention(const DistkvAttention* args) {
  if (args->struct_size != sizeof *args) return DISTKV_OTHER_ABI;
  if (args->kv_heads <= 0 || args->num_heads % args->kv_heads || args->head_dim <= 0 || args->rblock_size <= 0)
    return DISTKV_UNSUPPORTED;
  if (args->kv_dtype == DISTKV_INT8 && (args->k_scales == nullptr || args->v_scales == nullptr))
    return DISTKV_UNSUPPORTED;
  if (args->layer < 0 || args->layer >= args->num_layers) return DISTKV_BAD_INDEX;
  if (!distkv::is_sound(*args)) return DISTKV_BAD_INDEX;
  return distkv::Plan(*args).run();
}
