// Memory for packed weights.
#pragma once
#include <stddef.h>

namespace torch_int4 {

// Asks the kernel to back memory, whose contents are lost, with 2 MiB pages: decode streams whole weights, and hardware
// prefetchers stop at the end of a page. Only advice; does nothing for small blocks or where TORCH_INT4_HUGE_PAGES=0.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace torch_int4
