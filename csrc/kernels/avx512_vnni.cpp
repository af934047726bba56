// AVX-512 VNNI: dpbusd multiplies 4 unsigned codes with 4 signed activations per lane and adds them to int32, exactly.

#include "kernels/attention_kernel.h"
#include "kernels/kernel.h"
#include "kernels/scalar.h"
#include "kernels/simd_x86.h"

#ifdef TI4_X86
#include "kernels/probes/x86.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#include "kernels/loops/attention.h"
#include "kernels/loops/block.h"
#include "kernels/loops/float.h"
#include "kernels/loops/quantize.h"
#include "kernels/vectors/avx512_vnni.h"

namespace torch_int4 {
namespace {

IsaKernels kernels = TI4_KERNELS("avx512_vnni", 40, Avx512Vnni);

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

namespace torch_int4 {
namespace {

constexpr Probes kProbes{kDpbusd512, kFma512, kFma512, {}, nullptr};

}  // namespace
}  // namespace torch_int4

TI4_REGISTER(x86::has_avx512_vnni(), &kProbes)
#endif
