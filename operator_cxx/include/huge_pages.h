/* Huge pages for memory that is about to be written for the first time. */
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nk {

/* Ask Linux to back the memory with pages of 2 MiB; a hint, without effect elsewhere.
 *
 * A newly allocated gradient of 200 MB is mapped page by page as it is written, and the page faults of 50,000 pages of
 * 4 KiB take longer than the arithmetic. */
inline void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;  // whole pages only
  const uintptr_t last = (start + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace nk
