/* Threads of the CPU library. */
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace nk {

/* Call body(block) for every block in [0, count) on up to `threads` threads.
 *
 * Blocks start in order, each on the next free thread: results must not depend on which thread runs a block. Threads
 * are started and joined per call, which takes about 20 microseconds each, so that none keeps spinning, is lost in a
 * fork or is shared between callers. If the system refuses to start a thread, the others do its work. */
template <class Body>
void parallel_for(int64_t count, intptr_t threads, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    while (true) {
      const int64_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= count) return;
      body(block);
    }
  };
  const int64_t helper_count = std::min<int64_t>(threads, count) - 1;  // this thread works too
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 0; i < helper_count; ++i) helpers.emplace_back(work);
  } catch (const std::exception&) {
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace nk
