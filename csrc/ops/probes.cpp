// What this processor can do at most: probes that the bench measures in the same run as the operators.
//
// The loops are assembly with registers of their own choice, so that no compiler flag, spill or reassociation changes
// a limit, and so that no target pragma is needed. Every probe runs once on each thread of torch's pool.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <chrono>
#include <string>
#include <tuple>

#include "framework/dispatch.h"

namespace torch_int4 {
namespace {

using torch::stable::Tensor;

#define TI4_R(i) "%%" REG #i
// Four independent chains: f(sum, int16 sum, product).
#define TI4_CHAINS(f) f(0, 4, 8) f(1, 5, 9) f(2, 6, 10) f(3, 7, 11)
#define TI4_TWICE(text) text text
#define TI4_8_TIMES(text) TI4_TWICE(TI4_TWICE(TI4_TWICE(text)))

// The operands, registers 13 to 15, are bytes of 63 or floats of 0.75: nothing becomes subnormal or infinite.
#define TI4_EACH12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define TI4_START(i) "vbroadcastss %1, " TI4_R(i) "\n"
#define TI4_LOOP(name, body)                                                                                      \
  void name(int64_t iterations) {                                                                                 \
    static const uint32_t ones = 0x3f3f3f3fu;                                                                     \
    __asm__ volatile(TI4_EACH12(TI4_START) TI4_START(13) TI4_START(14) TI4_START(15) ".p2align 5\n1:\n" body      \
                                                                                     "dec %0\njnz 1b\nvzeroupper" \
                     : "+r"(iterations)                                                                           \
                     : "m"(ones)                                                                                  \
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",   \
                       "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc");                                        \
  }

#define TI4_FMA(i) "vfmadd231ps " TI4_R(14) ", " TI4_R(15) ", " TI4_R(i) "\n"
#define TI4_DPBUSD(i) "vpdpbusd " TI4_R(14) ", " TI4_R(15) ", " TI4_R(i) "\n"
#define TI4_VEX_DPBUSD(i) "%{vex%} " TI4_DPBUSD(i)
#define TI4_MADDUBS(target) "vpmaddubsw " TI4_R(14) ", " TI4_R(15) ", " TI4_R(target) "\n"
#define TI4_WIDEN(sum, narrow, product)                                                                             \
  "vpmaddwd " TI4_R(13) ", " TI4_R(narrow) ", " TI4_R(narrow) "\nvpaddd " TI4_R(narrow) ", " TI4_R(sum) ", " TI4_R( \
      sum) "\n"
#define TI4_FIRST(sum, narrow, product) TI4_MADDUBS(narrow)
#define TI4_NEXT(sum, narrow, product) \
  TI4_MADDUBS(product) "vpaddw " TI4_R(product) ", " TI4_R(narrow) ", " TI4_R(narrow) "\n"
#define TI4_WIDE(sum, narrow, product) TI4_MADDUBS(narrow) TI4_WIDEN(sum, narrow, product)

// maddubs_madd widens every product at once, which any int8 operands need. maddubs_add16 adds eight products in int16
// before it widens them, which is exact for weights of 4 bits. maddubs_add16_only never widens: it is no product, but
// bounds every loop that is made of the pair. issue counts instructions that need no unit: a core that another thread
// shares issues half as many, which slows kernels, while the loops above have instructions to spare.
#define TI4_ADD16       \
  TI4_CHAINS(TI4_FIRST) \
  TI4_CHAINS(TI4_NEXT) TI4_TWICE(TI4_TWICE(TI4_CHAINS(TI4_NEXT))) TI4_TWICE(TI4_CHAINS(TI4_NEXT)) TI4_CHAINS(TI4_WIDEN)

#define REG "ymm"
TI4_LOOP(fma_256, TI4_8_TIMES(TI4_EACH12(TI4_FMA)))
TI4_LOOP(maddubs_madd_256, TI4_8_TIMES(TI4_CHAINS(TI4_WIDE)))
TI4_LOOP(maddubs_add16_256, TI4_ADD16)
TI4_LOOP(maddubs_add16_only_256, TI4_8_TIMES(TI4_CHAINS(TI4_NEXT)))
TI4_LOOP(dpbusd_256, TI4_8_TIMES(TI4_EACH12(TI4_VEX_DPBUSD)))
TI4_LOOP(issue, TI4_8_TIMES(TI4_8_TIMES("nop\n")))
#undef REG
#define REG "zmm"
TI4_LOOP(fma_512, TI4_8_TIMES(TI4_EACH12(TI4_FMA)))
TI4_LOOP(maddubs_madd_512, TI4_8_TIMES(TI4_CHAINS(TI4_WIDE)))
TI4_LOOP(maddubs_add16_512, TI4_ADD16)
TI4_LOOP(maddubs_add16_only_512, TI4_8_TIMES(TI4_CHAINS(TI4_NEXT)))
TI4_LOOP(dpbusd_512, TI4_8_TIMES(TI4_EACH12(TI4_DPBUSD)))
#undef REG

// Tiles of 16 rows of 64 bytes: four sums hide the latency of one product.
#define TI4_TILES(name, instruction)                                                                          \
  void name(int64_t iterations) {                                                                             \
    alignas(64) uint8_t config[64] = {1};                                                                     \
    for (int tile = 0; tile < 6; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;                  \
    __asm__ volatile(                                                                                         \
        "ldtilecfg %1\ntilezero %%tmm0\ntilezero %%tmm1\ntilezero %%tmm2\ntilezero %%tmm3\ntilezero %%tmm4\n" \
        "tilezero %%tmm5\n.p2align 5\n1:\n" instruction " %%tmm5, %%tmm4, %%tmm0\n" instruction               \
        " %%tmm5, %%tmm4, %%tmm1\n" instruction " %%tmm5, %%tmm4, %%tmm2\n" instruction                       \
        " %%tmm5, %%tmm4, %%tmm3\n"                                                                           \
        "dec %0\njnz 1b\ntilerelease"                                                                         \
        : "+r"(iterations)                                                                                    \
        : "m"(config)                                                                                         \
        : "cc");                                                                                              \
  }
TI4_TILES(tiles_int8, "tdpbusd")
TI4_TILES(tiles_bf16, "tdpbf16ps")

// `operations`: multiplications and additions of one iteration.
struct Probe {
  const char* name;
  bool CpuFeatures::* needs;
  void (*run)(int64_t iterations);
  int operations;
};

constexpr int kFma = 8 * 12 * 2, kDot = 8 * 12 * 2, kChains = 8 * 4 * 2;

constexpr Probe kProbes[] = {
    {"fma_256", &CpuFeatures::avx2, fma_256, kFma * 8},
    {"maddubs_madd_256", &CpuFeatures::avx2, maddubs_madd_256, kChains * 32},
    {"maddubs_add16_256", &CpuFeatures::avx2, maddubs_add16_256, kChains * 32},
    {"maddubs_add16_only_256", &CpuFeatures::avx2, maddubs_add16_only_256, kChains * 32},
    {"issue", &CpuFeatures::avx2, issue, 64},
    {"dpbusd_256", &CpuFeatures::avx_vnni, dpbusd_256, kDot * 32},
    {"fma_512", &CpuFeatures::avx512, fma_512, kFma * 16},
    {"maddubs_madd_512", &CpuFeatures::avx512, maddubs_madd_512, kChains * 64},
    {"maddubs_add16_512", &CpuFeatures::avx512, maddubs_add16_512, kChains * 64},
    {"maddubs_add16_only_512", &CpuFeatures::avx512, maddubs_add16_only_512, kChains * 64},
    {"dpbusd_512", &CpuFeatures::avx512_vnni, dpbusd_512, kDot * 64},
    {"tiles_int8", &CpuFeatures::amx_int8, tiles_int8, 4 * 16 * 16 * 64 * 2},
    {"tiles_bf16", &CpuFeatures::amx_bf16, tiles_bf16, 4 * 16 * 16 * 32 * 2},
};

// Reads [p, p + bytes) as `streams` sequences far apart; bytes is a multiple of 256 * streams.
void read_streams(const char* p, int64_t bytes, int64_t streams, int64_t prefetch) {
  const int64_t part = bytes / streams;
  for (int64_t i = 0; i < part; i += 256) {
    for (int64_t s = 0; s < streams; ++s) {
      const char* q = p + s * part + i;
      if (prefetch) {
        for (int line = 0; line < 256; line += 64) __builtin_prefetch(q + prefetch + line);
      }
      __asm__ volatile(
          "vpxor (%0), %%ymm0, %%ymm0\nvpxor 32(%0), %%ymm1, %%ymm1\n"
          "vpxor 64(%0), %%ymm2, %%ymm2\nvpxor 96(%0), %%ymm3, %%ymm3\n"
          "vpxor 128(%0), %%ymm0, %%ymm0\nvpxor 160(%0), %%ymm1, %%ymm1\n"
          "vpxor 192(%0), %%ymm2, %%ymm2\nvpxor 224(%0), %%ymm3, %%ymm3\n" ::"r"(q)
          : "xmm0", "xmm1", "xmm2", "xmm3", "memory");
    }
  }
  __asm__ volatile("vzeroupper" ::: "xmm0", "xmm1", "xmm2", "xmm3");
}

template <class Body>
double seconds_of(int64_t count, const Body& body) {
  const auto start = std::chrono::steady_clock::now();
  torch::stable::parallel_for(0, count, 1, body);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string probe_names() {
  const CpuFeatures cpu = detect_cpu();
  std::string text;
  for (const Probe& probe : kProbes) {
    if (cpu.*probe.needs) text += (text.empty() ? "" : ",") + std::string(probe.name);
  }
  return text;
}

// (seconds, operations of all threads together)
std::tuple<double, double> probe_compute(std::string name, int64_t iterations) {
  const CpuFeatures cpu = detect_cpu();
  STD_TORCH_CHECK(iterations > 0, "torch_int4: iterations must be positive");
  for (const Probe& probe : kProbes) {
    if (name != probe.name || !(cpu.*probe.needs)) continue;
    const int64_t threads = torch::stable::get_num_threads();
    const double seconds = seconds_of(threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) probe.run(iterations);
    });
    return {seconds, double(threads) * double(iterations) * probe.operations};
  }
  STD_TORCH_CHECK(false, "torch_int4: no probe '", name, "' runs here; there are ", probe_names());
  return {};
}

// Seconds to read a whole buffer, every thread its own range.
double probe_read(const Tensor& buffer, int64_t streams, int64_t prefetch) {
  const int64_t threads = torch::stable::get_num_threads(), bytes = buffer.numel() * int64_t(buffer.element_size());
  STD_TORCH_CHECK(detect_cpu().avx2, "torch_int4: probe_read needs AVX2");
  STD_TORCH_CHECK(buffer.is_cpu() && buffer.is_contiguous(), "torch_int4: buffer must be a contiguous CPU tensor");
  STD_TORCH_CHECK(streams > 0 && prefetch >= 0, "torch_int4: streams must be positive, prefetch not negative");
  STD_TORCH_CHECK(bytes > 0 && bytes % (threads * streams * 256) == 0,
                  "torch_int4: buffer must be a multiple of threads * streams * 256 bytes long");
  const char* data = static_cast<const char*>(buffer.const_data_ptr());
  const int64_t part = bytes / threads;
  return seconds_of(threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) read_streams(data + i * part, part, streams, prefetch);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(torch_int4, m) {
  m.def("probe_names() -> str");
  m.def("probe_compute(str name, int iterations) -> (float, float)");
  m.def("probe_read(Tensor buffer, int streams, int prefetch) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(torch_int4, CompositeExplicitAutograd, m) {
  m.impl("probe_names", TORCH_BOX(&probe_names));
  m.impl("probe_compute", TORCH_BOX(&probe_compute));
  m.impl("probe_read", TORCH_BOX(&probe_read));
}

}  // namespace
}  // namespace torch_int4
