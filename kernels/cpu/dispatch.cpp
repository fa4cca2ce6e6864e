#include "dispatch.h"

#include <cstring>

namespace distkv {
namespace {

struct Candidate {
  const Isa& isa;
  bool is_here;
};

// Best first.
template <class F>
const Isa* first_that(F suits) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Candidate fast[] = {
      {isa_avx512bf16(), avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")},
      {isa_avx512(), avx512},
      {isa_avx2(), avx2},
  };
  for (const Candidate& candidate : fast)
    if (candidate.is_here && suits(candidate.isa)) return &candidate.isa;
#endif
  return suits(isa_baseline()) ? &isa_baseline() : nullptr;
}

std::atomic<const Isa*> in_use{nullptr};

}  // namespace

const Isa& isa_in_use() {
  const Isa* isa = in_use.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = first_that([](const Isa&) { return true; });
    in_use.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace distkv

extern "C" const char* distkv_isa() { return distkv::isa_in_use().name; }

extern "C" int32_t distkv_use_isa(const char* name) {
  const distkv::Isa* isa = distkv::first_that([&](const distkv::Isa& other) { return !strcmp(other.name, name); });
  if (isa != nullptr) distkv::in_use.store(isa);
  return isa != nullptr;
}
