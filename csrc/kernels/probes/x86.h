// Probes of x86-64, for kernel files to choose from; include it outside of target regions.
//
// The loops are assembly with registers of their own choice, so that no compiler flag, spill or reassociation changes
// a limit, and so that no target pragma is needed.
#pragma once
#include "kernels/probe.h"

namespace torch_int4 {
namespace {

#define TI4_R(i) "%%" REG #i
// Four independent chains: f(sum, int16 sum, product).
#define TI4_CHAINS(f) f(0, 4, 8) f(1, 5, 9) f(2, 6, 10) f(3, 7, 11)
#define TI4_TWICE(text) text text
#define TI4_8_TIMES(text) TI4_TWICE(TI4_TWICE(TI4_TWICE(text)))

// The operands, registers 13 to 15, are bytes of 63 or floats of 0.75: nothing becomes subnormal or infinite.
#define TI4_EACH12(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define TI4_START(i) "vbroadcastss %1, " TI4_R(i) "\n"
#define TI4_LOOP(name, body)                                                                                      \
  inline void name(int64_t iterations) {                                                                          \
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
  inline void name(int64_t iterations) {                                                                      \
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

constexpr int kFma = 8 * 12 * 2, kDot = 8 * 12 * 2, kChains = 8 * 4 * 2;

constexpr Probe kFma256{"fma_256", fma_256, kFma * 8};
constexpr Probe kMaddubsMadd256{"maddubs_madd_256", maddubs_madd_256, kChains * 32};
constexpr Probe kMaddubsAdd16_256{"maddubs_add16_256", maddubs_add16_256, kChains * 32};
constexpr Probe kMaddubsAdd16Only256{"maddubs_add16_only_256", maddubs_add16_only_256, kChains * 32};
constexpr Probe kDpbusd256{"dpbusd_256", dpbusd_256, kDot * 32};
constexpr Probe kIssue{"issue", issue, 64};
constexpr Probe kFma512{"fma_512", fma_512, kFma * 16};
constexpr Probe kMaddubsMadd512{"maddubs_madd_512", maddubs_madd_512, kChains * 64};
constexpr Probe kMaddubsAdd16_512{"maddubs_add16_512", maddubs_add16_512, kChains * 64};
constexpr Probe kMaddubsAdd16Only512{"maddubs_add16_only_512", maddubs_add16_only_512, kChains * 64};
constexpr Probe kDpbusd512{"dpbusd_512", dpbusd_512, kDot * 64};
constexpr Probe kTilesInt8{"tiles_int8", tiles_int8, 4 * 16 * 16 * 64 * 2};
constexpr Probe kTilesBf16{"tiles_bf16", tiles_bf16, 4 * 16 * 16 * 32 * 2};

inline void read_256(const char* p, int64_t bytes, int64_t streams, int64_t prefetch) {
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

}  // namespace
}  // namespace torch_int4
