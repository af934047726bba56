// The named code books: 16 values each, as weights of type kBook look them up.
#pragma once
#include "kernels/kernel.h"

namespace torch_int4 {

// "nf4", "fp4" (E2M1) or "bnb_fp4"; null for any other name.
const Codebook* find_codebook(const char* name);

}  // namespace torch_int4
