// AVX-512 VNNI: dpbusd multiplies 4 unsigned codes with 4 signed activations per lane and adds them to int32, exactly.

#include "../attention_kernel.h"
#include "../kernel.h"
#include "scalar.h"
#include "simd.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#include "avx512_vnni_vectors.h"
#include "loops_attention.h"
#include "loops_block.h"
#include "loops_float.h"
#include "loops_quantize.h"

namespace torch_int4 {
namespace {

IsaKernels kernels = TI4_KERNELS("avx512_vnni", 40, Avx512Vnni);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

TI4_REGISTER(cpu.avx512_vnni)
