// AMX: 16 rows of x times 16 output rows per tile instruction. Unpacked lines are rows of the B tile as they are.
// Tiles of 32 inputs serve every group size; the int32 sums of a block leave the tile and are scaled by AVX-512, in the
// order of all other kernels, so that int8 results are the same bits. Up to 4 rows run on VNNI, where tiles idle.

#include "kernels/attention_kernel.h"
#include "kernels/kernel.h"
#include "kernels/scalar.h"
#include "kernels/simd_x86.h"

#ifdef TI4_X86
#include "kernels/probes/x86.h"

#pragma GCC push_options
TI4_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16")

#include "kernels/loops/attention.h"
#include "kernels/loops/block.h"
#include "kernels/loops/float.h"
#include "kernels/loops/quantize.h"
#include "kernels/vectors/avx512_vnni.h"

namespace torch_int4 {
namespace {

using V = Avx512Vnni;

constexpr int kTile = 16;  // rows of x per tile
constexpr int kSmallRows = 4;

// gcc 12's tile loads and stores have no memory clobber: without it, a store to a buffer that only a tile reads, or a
// read of one that only a tile writes, may be moved or dropped.
#define TI4_TILE_FENCE() __asm__ volatile("" ::: "memory")

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void set(int tile, int64_t tile_rows, int bytes) {
    if (!tile_rows) return;
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};

// Tiles 0 (sums), 1 (rows of x), 2 (weights) for 16 rows; 3 and 4 are 0 and 1 for the rows that remain. The state is
// the thread's own, so every worker configures it and lets go of it.
class Tiles {
 public:
  Tiles(int64_t rows, int x_bytes, int weight_rows) {
    TileConfig config;
    config.set(0, rows >= kTile ? kTile : 0, kLineBytes);
    config.set(1, rows >= kTile ? kTile : 0, x_bytes);
    config.set(2, weight_rows, kLineBytes);
    config.set(3, rows % kTile, kLineBytes);
    config.set(4, rows % kTile, x_bytes);
    TI4_TILE_FENCE();
    _tile_loadconfig(&config);
    TI4_TILE_FENCE();
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Sums of int8 products: `slabs` steps of 32 inputs. Tile numbers are part of the instructions, hence two copies.
TI4_INLINE void multiply_int8(bool whole, const int8_t* x, int64_t x_step, const uint8_t* weights, int64_t slabs,
                              int32_t* sums) {
  TI4_TILE_FENCE();
  if (whole) {
    _tile_zero(0);
    for (int64_t s = 0; s < slabs; ++s) {
      _tile_loadd(1, x + s * x_step, kSlab);
      _tile_loadd(2, weights + s * kSlab * kPanelRows, kLineBytes);
      _tile_dpbsud(0, 1, 2);
    }
    _tile_stored(0, sums, kLineBytes);
  } else {
    _tile_zero(3);
    for (int64_t s = 0; s < slabs; ++s) {
      _tile_loadd(4, x + s * x_step, kSlab);
      _tile_loadd(2, weights + s * kSlab * kPanelRows, kLineBytes);
      _tile_dpbsud(3, 4, 2);
    }
    _tile_stored(3, sums, kLineBytes);
  }
  TI4_TILE_FENCE();
}

template <WeightType T, Offset O>
struct AmxInt8 {
  using Loops = Int8Loops<V, T, O>;

  static void run(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, int streams,
                  const Output& out) {
    if (a.rows <= kSmallRows) return Loops::run(w, a, first, last, streams, out);
    alignas(64) uint8_t unpacked[kMaxBlock * kPanelRows];
    alignas(64) int32_t sums[kTile * kPanelRows];
    alignas(64) float c[kRowBlock * kPanelRows];
    constexpr int kStep = Loops::kHalves ? kHalf : kSlab;  // inputs of a tile
    const Tiles tiles(a.rows, kStep, kStep / 4);
    for (int64_t row = 0; row < a.rows; row += kRowBlock) {
      const int rows = int(smaller(kRowBlock, a.rows - row));
      for (int64_t panel = first; panel < last; ++panel) {
        for (int i = 0; i < rows; ++i) V::store(c + i * kPanelRows, V::zero());
        for (int64_t b = 0; b < w.blocks; ++b) {
          const int64_t input = b * w.block, inputs = smaller(w.block, w.padded_inputs - input);
          const int inside = int(input % kSlab);  // of the slab that the block begins in
          const uint8_t* weights = weights_of(w, panel, input / kSlab, (inside + inputs) / kSlab, inside, unpacked);
          const auto group =
              Loops::load_group(w, w.scale_type, (panel * w.groups + b / w.blocks_per_group()) * kPanelRows);
          const int8_t* x = a.codes + (input / kSlab * a.rows + row) * kSlab + inside;
          const int64_t block = b * a.rows + row;
          for (int i = 0; i < rows; i += kTile) {
            const int count = int(smaller(kTile, rows - i));
            multiply_int8(count == kTile, x + i * kSlab, a.rows * kSlab, weights, inputs / kStep, sums);
            for (int m = 0; m < count; ++m) {
              float* target = c + (i + m) * kPanelRows;
              const auto dot = V::add_int(Loops::start(a, block + i + m), V::load_int(sums + m * kPanelRows));
              V::store(target, Loops::finish(V::load(target), dot, group, a, block + i + m));
            }
          }
        }
        store_tile<V>(c, rows, row, panel, w.out_features, out);
      }
    }
  }

  // The lines of a block as bytes, four inputs of a row in each four: those that are packed so, or unpacked ones. A block
  // that begins inside a slab finds them where the block before has left them.
  static TI4_INLINE const uint8_t* weights_of(const PackedWeight& w, int64_t panel, int64_t slab, int64_t slabs,
                                              int inside, uint8_t* unpacked) {
    const uint8_t* codes = w.codes + panel * w.panel_bytes() + slab * slab_bytes(T);
    if constexpr (code_bits(T) == 8) return codes;
    if (inside) return unpacked + inside * kPanelRows;
    for (int64_t s = 0; s < (Loops::kHalves ? 1 : slabs); ++s, codes += slab_bytes(T)) {
      V::unpack<T>(codes, unpacked + s * kSlab * kPanelRows, w.book);
    }
    return unpacked;
  }
};

void amx_int8(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, int streams,
              const Output& out) {
  with_loops(w, [&](auto type, auto offset) { AmxInt8<type, offset>::run(w, a, first, last, streams, out); });
}

// 32 inputs x 16 rows of floats to the B tile of bfloat16 products: pairs of inputs, 16 rows each.
TI4_INLINE void pair_bfloat16(const float* weights, uint8_t* target) {
  for (int k = 0; k < kSlab; k += 2) {
    const __m512i even = V::round_bits(V::load(weights + k * kPanelRows));
    const __m512i odd = V::round_bits(V::load(weights + (k + 1) * kPanelRows));
    _mm512_store_si512(target + k / 2 * kLineBytes, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

// 16 or fewer rows of 32 floats, which are bfloat16 numbers already, to the A tile.
TI4_INLINE void narrow_rows(const float* x, int rows, uint16_t* target) {
  for (int m = 0; m < rows; ++m, x += kSlab, target += kSlab) {
    V::store_as(target, DType::kBF16, V::load(x));
    V::store_as(target + kPanelRows, DType::kBF16, V::load(x + kPanelRows));
  }
}

TI4_INLINE void multiply_bf16(bool whole, const uint16_t* x, const uint8_t* weights, int64_t slabs, float* c) {
  constexpr int kXStep = kTile * kSlab, kWeightStep = kSlab * kPanelRows * 2;
  TI4_TILE_FENCE();
  if (whole) {
    _tile_loadd(0, c, kLineBytes);
    for (int64_t s = 0; s < slabs; ++s) {
      _tile_loadd(1, x + s * kXStep, kLineBytes);
      _tile_loadd(2, weights + s * kWeightStep, kLineBytes);
      _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, c, kLineBytes);
  } else {
    _tile_loadd(3, c, kLineBytes);
    for (int64_t s = 0; s < slabs; ++s) {
      _tile_loadd(4, x + s * kXStep, kLineBytes);
      _tile_loadd(2, weights + s * kWeightStep, kLineBytes);
      _tile_dpbf16ps(3, 4, 2);
    }
    _tile_stored(3, c, kLineBytes);
  }
  TI4_TILE_FENCE();
}

// compute="bf16": rows of x are narrowed once for kPanels panels, whose dequantized blocks stand ready as B tiles.
template <WeightType T>
void amx_bf16_typed(const PackedWeight& w, const FloatRows& a, int64_t first, int64_t last, const Output& out) {
  constexpr int kPanels = 4, kBlockBytes = kMaxBlock * kPanelRows * 2;
  alignas(64) float dense[kMaxBlock * kPanelRows];
  alignas(64) uint8_t weights[kPanels * kBlockBytes];
  alignas(64) uint16_t x[kMaxBlock * kTile];
  alignas(64) float c[kPanels][kTile * kPanelRows];
  const Tiles tiles(a.rows, kLineBytes, kSlab / 2);
  for (int64_t panel = first; panel < last; panel += kPanels) {
    const int panels = int(smaller(kPanels, last - panel));
    for (int64_t row = 0; row < a.rows; row += kTile) {
      const int rows = int(smaller(kTile, a.rows - row));
      for (int p = 0; p < panels; ++p) memset(c[p], 0, sizeof c[p]);
      for (int64_t input = 0, inputs; input < w.padded_inputs; input += inputs) {
        inputs = smaller(FloatLoops<V, T>::span_of(w), w.padded_inputs - input);
        const int64_t slabs = inputs / kSlab;
        for (int64_t s = 0; s < slabs; ++s) {
          const float* rows_of_slab = a.values + ((input / kSlab + s) * a.rows + row) * kSlab;
          narrow_rows(rows_of_slab, rows, x + s * kTile * kSlab);
        }
        for (int p = 0; p < panels; ++p) {
          uint8_t* tiles_of_panel = weights + p * kBlockBytes;
          FloatLoops<V, T>::dequantize(w, panel + p, input, inputs, false, dense);
          for (int64_t s = 0; s < slabs; ++s) {
            pair_bfloat16(dense + s * kSlab * kPanelRows, tiles_of_panel + s * kSlab * kPanelRows * 2);
          }
          multiply_bf16(rows == kTile, x, tiles_of_panel, slabs, c[p]);
        }
      }
      for (int p = 0; p < panels; ++p) store_rows<V>(c[p], rows, row, panel + p, w.out_features, out);
    }
  }
}

void amx_float(const PackedWeight& w, const FloatRows& a, int64_t first, int64_t last, bool bf16, const Output& out) {
  if (!bf16 || a.rows <= kSmallRows) return loops_linear_float<V>(w, a, first, last, bf16, out);
  with_type(w.type, [&](auto type) { amx_bf16_typed<type>(w, a, first, last, out); });
}

IsaKernels kernels{"amx", 50, nullptr, loops_to_float<V>, loops_quantize<V>, amx_int8, amx_float, TI4_SHARED(V)};

}  // namespace
}  // namespace torch_int4

#pragma GCC pop_options

namespace torch_int4 {
namespace {

// Flags of the tiles, of their int8 and of their bfloat16 products.
bool has_amx() {
  using namespace x86;
  return has_avx512_vnni() && saves(kTiles) && cpuid(7, 0, kEdx, 24) && cpuid(7, 0, kEdx, 25) &&
         cpuid(7, 0, kEdx, 22) && request(kTileData);
}

constexpr Probes kProbes{kTilesInt8, kTilesBf16, kFma512, {}, nullptr};

}  // namespace
}  // namespace torch_int4

TI4_REGISTER(has_amx(), &kProbes)
#endif
