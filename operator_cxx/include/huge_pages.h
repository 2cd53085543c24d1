/* Large pages for memory that is about to be written for the first time. */
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nk {

/* A gradient of 200 MB has just come from the system, and Linux gives it out page by page as it is written: 50,000
 * pages of 4 KiB take longer than the arithmetic. This asks for pages of 2 MiB inside of the memory given. It is a
 * hint: where there are none, nothing changes. */
inline void prefer_huge_pages(void* memory, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace nk
