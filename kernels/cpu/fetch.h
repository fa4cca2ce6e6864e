// Prefetching what a walk over rBlocks will read.
#pragma once

#include "vec.h"

namespace {

// How far ahead. A processor drops prefetches when all its buffers for lines on their way are taken, so work that waits
// for memory asks for each line three times: 12 to 25 % faster than once. Work that does not has no instruction to spare.
constexpr int64_t AHEAD_BYTES[] = {32 * 1024, 16 * 1024, 8 * 1024};

// Of kind X with so many query rows.
template <class X>
constexpr int times_to_ask(int64_t rows) {
  return rows <= 4 && ((X::IS_PAIRS && !X::IS_OCTETS) || sizeof(typename X::Element) == 4) ? 3 : 1;
}

// The distances in bytes from where a walk is to what it reads so much later; 0 after its end.
struct Ahead {
  ptrdiff_t by[3] = {};

  template <int TIMES>
  void prefetch_from(const void* at) const {
#pragma GCC unroll 3
    for (int i = 0; i < TIMES; ++i) prefetch((const char*)at + by[i]);
  }
};

// What follows a stretch [next, end), a line at a time and evenly over the steps of a loop: bursts would fill the
// buffers, and in pauses memory would idle.
struct Fetch {
  const char *next, *end;
  Ahead ahead;
  ptrdiff_t stride = 0;
  const char* due = next;

  void spread_over(int64_t steps) { stride = steps > 0 ? (end - due) / steps : 0; }

  template <int TIMES>
  void step() {
    for (due += stride; next < due; next += 64) ahead.prefetch_from<TIMES>(next);
  }

  template <int TIMES>
  void lines(int64_t count) {
    for (; count > 0 && next < end; --count, next += 64) ahead.prefetch_from<TIMES>(next);
    due = next;
  }
};

inline void fetch_all(const float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) prefetch(p + i);
}

}  // namespace
