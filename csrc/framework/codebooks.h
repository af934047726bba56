// The code books: 16 values each, as weights of type kBook look them up. Their names are in framework/types.h.
#pragma once
#include "kernels/kernel.h"

namespace torch_int4 {

extern const Codebook kNf4, kFp4, kBnbFp4, kIq4Nl;

}  // namespace torch_int4
