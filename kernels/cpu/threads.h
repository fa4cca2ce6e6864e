// A pool of threads for calls that have work for more than one.
#pragma once

#include <cstdint>

namespace distkv {

// Calls work(context, i) once for each i in [0, count), on up to num_threads threads, this one among them. When
// another call has the pool, this thread does all of it.
void parallel_for(int64_t count, int num_threads, void (*work)(void* context, int64_t i), void* context);

// The same for a function object.
template <class F>
void parallel_for(int64_t count, int num_threads, F&& body) {
  parallel_for(count, num_threads, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); },
               const_cast<void*>(static_cast<const void*>(&body)));
}

// Grow-only memory of the calling thread, aligned to a cache line; null when there is none left. Slot 0 is for an
// item's scratch, slot 1 for a call's partial results.
char* thread_memory(int slot, int64_t bytes);

}  // namespace distkv
