// A pool of threads for calls that have work for more than one.
#pragma once

#include <cstdint>

namespace distkv {

// No item, where one may come next.
constexpr int64_t NO_ITEM = -1;

// Calls work(context, i, next) once for each i in [0, count), on up to num_threads threads, this one among them; the
// same thread goes on with `next`, so that it can fetch what that will need. When another call has the pool, this
// thread does all of it.
void parallel_for(int64_t count, int num_threads, void (*work)(void* context, int64_t i, int64_t next), void* context);

// The same for a function object.
template <class F>
void parallel_for(int64_t count, int num_threads, F&& body) {
  const auto work = [](void* context, int64_t i, int64_t next) { (*static_cast<F*>(context))(i, next); };
  parallel_for(count, num_threads, work, const_cast<void*>(static_cast<const void*>(&body)));
}

// Grow-only memory of the calling thread, aligned to a cache line; null when there is none left. Slot 0 is for an
// item's scratch, slot 1 for a call's partial results.
char* thread_memory(int slot, int64_t bytes);

}  // namespace distkv
