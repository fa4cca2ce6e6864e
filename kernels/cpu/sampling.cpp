// The C function that draws tokens.
#include <atomic>

#include "dispatch.h"
#include "isa.h"
#include "threads.h"

extern "C" int32_t distkv_sample(const DistkvSample* args) {
  const DistkvSample& a = *args;
  if (a.struct_size != sizeof a) return DISTKV_OTHER_ABI;
  if (a.vocabulary < 1 || a.vocabulary > INT32_MAX) return DISTKV_UNSUPPORTED;
  const auto& isa = distkv::isa_in_use();
  std::atomic<bool> has_memory{true};
  distkv::parallel_for(a.num_rows, a.num_threads, [&](int64_t r, int64_t) {
    char* scratch = distkv::thread_memory(0, isa.sampling_bytes(a.vocabulary));
    if (scratch == nullptr) {
      has_memory.store(false);
      return;
    }
    const distkv::SampledRow row{a.logits,        a.dtype,    r * a.row_stride, a.vocabulary, a.temperatures[r],
                                 a.top_ps[r],     a.min_ps[r], a.top_ks[r],      a.uniforms[r]};
    a.token_ids[r] = isa.sample(row, scratch);
  });
  return has_memory.load() ? DISTKV_OK : DISTKV_OUT_OF_MEMORY;
}
