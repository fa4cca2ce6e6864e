// Prefetching what a later part of a walk over memory will read.
#pragma once

#include "vec.h"

namespace {

// What to prefetch, [next, end), a line at a time and evenly over the steps of a loop: bursts would fill the buffers
// that hold what is on its way, and in pauses memory would idle.
struct Fetch {
  const char *next, *end;
  ptrdiff_t stride = 0;
  const char* due = next;

  void spread_over(int64_t steps) { stride = steps > 0 ? (end - due) / steps : 0; }
  void step() {
    for (due += stride; next < due; next += 64) prefetch(next);
  }
  void lines(int64_t count) {
    for (; count > 0 && next < end; --count, next += 64) prefetch(next);
    due = next;
  }
};

inline void fetch_all(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) prefetch(p + i);
}

}  // namespace
