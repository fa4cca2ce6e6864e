#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace distkv {
namespace {

// How often a worker looks for the next call before it sleeps, some 10 us: a decode step calls once per layer.
constexpr int NUM_LOOKS = 400;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  void (*work)(void*, int64_t, int64_t);
  void* context;
  int64_t count;
  int num_helpers;
};

class Pool {
 public:
  void run(const Job& job) {
    while (num_workers_ < job.num_helpers) start_worker();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      is_open_ = true;
      next_.store(0, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_items();
    {
      // A worker that has not woken by now is not waited for: on a busy machine that can take milliseconds.
      std::lock_guard<std::mutex> lock(mutex_);
      is_open_ = false;
    }
    for (int i = 0; num_active_.load(std::memory_order_acquire) > 0; ++i) i < NUM_LOOKS ? pause() : (void)sched_yield();
  }

  std::mutex in_use;

 private:
  void start_worker() {
    // The generation is read here, not in the new thread: that may start only after the next one has begun.
    std::thread(&Pool::serve, this, num_workers_, generation_.load()).detach();
    ++num_workers_;
  }

  void serve(int id, uint64_t seen) {
    for (;;) {
      for (int i = 0; i < NUM_LOOKS && generation_.load(std::memory_order_acquire) == seen; ++i) pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (!is_open_ || id >= job_.num_helpers) continue;
        num_active_.fetch_add(1, std::memory_order_relaxed);
      }
      take_items();
      num_active_.fetch_sub(1, std::memory_order_release);
    }
  }

  // Each thread takes its next item before it begins one, but for the last items: those go to whoever is done first.
  void take_items() {
    const int64_t last = job_.count - job_.num_helpers - 1;
    for (int64_t i = take(); i != NO_ITEM;) {
      const int64_t next = next_.load(std::memory_order_relaxed) < last ? take() : NO_ITEM;
      job_.work(job_.context, i, next);
      i = next == NO_ITEM ? take() : next;
    }
  }

  int64_t take() {
    const int64_t i = next_.fetch_add(1);
    return i < job_.count ? i : NO_ITEM;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> num_active_{0};
  Job job_{};
  bool is_open_ = false;
  int num_workers_ = 0;
};

// Never destroyed: workers may still wait on it when the process ends. A forked child has none of the workers and
// starts its own.
std::atomic<Pool*> pool{nullptr};

Pool* the_pool() {
  static const bool registered [[maybe_unused]] =
      pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }) == 0;
  Pool* found = pool.load();
  if (found == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(found, fresh)) return fresh;
    delete fresh;
  }
  return found;
}

struct Memory {
  char* data = nullptr;
  int64_t bytes = 0;
  ~Memory() { free(data); }
};

}  // namespace

void parallel_for(int64_t count, int num_threads, void (*work)(void*, int64_t, int64_t), void* context) {
  if (num_threads > 1 && count > 1) {
    Pool* shared = the_pool();
    std::unique_lock<std::mutex> lock(shared->in_use, std::try_to_lock);
    if (lock.owns_lock()) {
      const int64_t helpers = (count < num_threads ? count : num_threads) - 1;
      return shared->run({work, context, count, static_cast<int>(helpers)});
    }
  }
  for (int64_t i = 0; i < count; ++i) work(context, i, i + 1 < count ? i + 1 : NO_ITEM);
}

char* thread_memory(int slot, int64_t bytes) {
  static thread_local Memory memories[2];
  Memory& memory = memories[slot];
  if (memory.bytes < bytes) {
    free(memory.data);
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.data = static_cast<char*>(aligned_alloc(64, rounded));
    memory.bytes = memory.data ? rounded : 0;
  }
  return memory.data;
}

}  // namespace distkv
