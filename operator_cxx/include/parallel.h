/* Threads of the CPU library. */
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace nk {

/* Calls body(block, worker) for every block in [0, count), worker in [0, threads): what a worker alone may write is found
 * by its number. Blocks start in order, each on whichever thread is free, so a result must not depend on the worker.
 *
 * Threads are started and joined for every call (some 20 microseconds each): nothing stays behind to spin, to be lost in
 * a fork or to be shared between callers. Where the system refuses a thread, the others do its work. */
template <class Body>
void parallel_for(int64_t count, intptr_t threads, const Body& body) {
  const int64_t crew = std::max<int64_t>(1, std::min<int64_t>(threads, count));
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(block, worker);
  };
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<size_t>(crew - 1));
    for (int64_t worker = 1; worker < crew; ++worker) helpers.emplace_back(work, worker);
  } catch (const std::exception&) {
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace nk
