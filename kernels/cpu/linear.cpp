// The C function that multiplies rows with weights.
#include <atomic>

#include "dispatch.h"
#include "isa.h"
#include "threads.h"

extern "C" int32_t distkv_linear(const DistkvLinear* args) {
  using distkv::LINEAR_OUTPUTS;
  using distkv::LINEAR_ROWS;
  const DistkvLinear& p = *args;
  if (p.struct_size != sizeof p) return DISTKV_OTHER_ABI;
  const auto& isa = distkv::isa_in_use();
  const int64_t row_blocks = (p.num_rows + LINEAR_ROWS - 1) / LINEAR_ROWS;
  const int64_t output_blocks = (p.num_outputs + LINEAR_OUTPUTS - 1) / LINEAR_OUTPUTS;
  std::atomic<bool> has_memory{true};
  // Blocks that share weights follow each other.
  distkv::parallel_for(row_blocks * output_blocks, p.num_threads, [&](int64_t i, int64_t) {
    char* scratch = distkv::thread_memory(0, isa.linear_bytes());
    if (scratch == nullptr) {
      has_memory.store(false);
      return;
    }
    const int64_t m = i % row_blocks * LINEAR_ROWS, n = i / row_blocks * LINEAR_OUTPUTS;
    const int64_t rows = p.num_rows - m < LINEAR_ROWS ? p.num_rows - m : LINEAR_ROWS;
    const int64_t outputs = p.num_outputs - n < LINEAR_OUTPUTS ? p.num_outputs - n : LINEAR_OUTPUTS;
    isa.linear(p, m, rows, n, outputs, scratch);
  });
  return has_memory.load() ? DISTKV_OK : DISTKV_OUT_OF_MEMORY;
}
