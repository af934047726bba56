// Many rows: each block of a few panels is unpacked to L1 once, and all rows of a pass sweep over it in register tiles.
// Part of loops/linear.h, which says what V supplies.
#pragma once
#include "kernels/loops/common.h"

namespace torch_int4 {
namespace {

template <class V, WeightType T, Offset O>
struct TileLoops : Int8Block<V, T, O> {
  using Block = Int8Block<V, T, O>;
  using typename Block::F;
  using typename Block::Group;
  using typename Block::I;

  static constexpr int kUnpacked = V::template unpacked_bytes<T>();  // bytes of 32 inputs of a panel

  // One block of P panels: 32 inputs of a panel are `apart` bytes from those of the next, and `step` from its own next.
  template <int P>
  struct Weights {
    const uint8_t* codes;
    int64_t apart, step, inputs;
    Group group[P];
  };

  // The sums of P panels, [panel][row][16] floats; `apart` floats from panel to panel.
  struct Sums {
    float* c;
    int64_t apart;
  };

  // Narrower tiles, of the panels that are left over, have more rows: they must keep as many products under way.
  template <int P>
  static constexpr int rows_of_tile() {
    return P == V::kTileWidth ? V::kTileRows : 2 * V::kTileRows;
  }

  // One register tile: M rows of P panels, over kSlabs slabs or, where that is 0, over as many as the block has; or over
  // the first kLast quads of one.
  template <int P, int M, int kSlabs, int kLast>
  static TI4_INLINE void tile(const Weights<P>& w, const QuantizedRows& a, const int8_t* x, int64_t i,
                              const Sums& sums) {
    I dot[P][M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const I first = Block::start(a, i + m);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) dot[p][m] = first;
    }
    const uint8_t* codes = w.codes;
    for (int64_t k = 0; k < (kSlabs ? kSlabs * kSlab : w.inputs); k += kSlab, x += a.rows * kSlab, codes += w.step) {
      const uint8_t* lines[P];
      for (int p = 0; p < P; ++p) lines[p] = codes + p * w.apart;
      V::template dot<unpacked_source(T), 0, kLast>(dot, lines, x, nullptr);
    }
    if constexpr (kSlabs != 0) TI4_BARRIER();  // gcc would start with the next tile before these sums have left
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        float* c = sums.c + p * sums.apart + m * kPanelRows;
        V::store(c, Block::finish(V::load(c), dot[p][m], w.group[p], a, i + m));
      }
    }
  }

  // The rows that no whole tile takes, in tiles of the powers of two that add up to them.
  template <int P, int M, int kLast>
  static TI4_INLINE void last_tiles(int rows, const Weights<P>& w, const QuantizedRows& a, const int8_t* x, int64_t i,
                                    const Sums& sums) {
    if constexpr (M > 0) {
      const int done = rows & M;
      if (done) tile<P, M, kLast == kQuads ? 0 : 1, kLast>(w, a, x, i, sums);
      last_tiles<P, M / 2, kLast>(rows, w, a, x + done * kSlab, i + done, {sums.c + done * kPanelRows, sums.apart});
    }
  }

  // All rows of a pass over one block.
  template <int P, int kSlabs, int kLast = kQuads>
  static TI4_INLINE void sweep(int rows, const Weights<P>& w, const QuantizedRows& a, const int8_t* x, int64_t block,
                               const Sums& sums) {
    constexpr int M = rows_of_tile<P>();
    int i = 0;
    for (; i + M <= rows; i += M) {
      tile<P, M, kSlabs, kLast>(w, a, x + i * kSlab, block + i, {sums.c + i * kPanelRows, sums.apart});
    }
    last_tiles<P, largest_power_of_two(M - 1), kLast>(rows - i, w, a, x + i * kSlab, block + i,
                                                      {sums.c + i * kPanelRows, sums.apart});
  }

  // Block b of panels [panel, panel + P), unpacked where the products do not read what is stored; of blocks that are half
  // a slab, two.
  template <int P>
  static TI4_INLINE Weights<P> block_of(const PackedWeight& w, int64_t panel, int64_t b, uint8_t* unpacked) {
    const int64_t inputs = Block::kHalves ? kSlab : smaller(w.block, w.padded_inputs - b * w.block);
    const int64_t slabs = inputs / kSlab;
    const uint8_t* codes = w.codes + panel * w.panel_bytes() + b * w.block / kSlab * slab_bytes(T);
    Weights<P> result{kUnpacked ? unpacked : codes,
                      kUnpacked ? kUnpacked : w.panel_bytes(),
                      kUnpacked ? P * kUnpacked : slab_bytes(T),
                      inputs,
                      {}};
    for (int p = 0; p < P; ++p, codes += w.panel_bytes()) {
      for (int64_t s = 0; s < slabs; ++s) {
        Block::prefetch_slab(codes + s * slab_bytes(T));
        if constexpr (kUnpacked != 0) {
          V::template unpack<T>(codes + s * slab_bytes(T), unpacked + (s * P + p) * kUnpacked, w.book);
        }
      }
    }
    load_groups(w, panel, b, result);
    return result;
  }

  template <int P>
  static TI4_INLINE void load_groups(const PackedWeight& w, int64_t panel, int64_t b, Weights<P>& weights) {
    for (int p = 0; p < P; ++p) {
      const int64_t group = (panel + p) * w.groups + b / w.blocks_per_group();
      weights.group[p] = Block::load_group(w, w.scale_type, group * kPanelRows);
    }
  }

  // Rows [row, row + rows) of panels [panel, panel + P).
  template <int P>
  static void pass(const PackedWeight& w, const QuantizedRows& x_rows, int64_t row, int rows, int64_t panel,
                   const Output& out) {
    static_assert(kUnpacked || !Block::kHalves, "the second half of a slab lies behind the first where it is unpacked");
    const QuantizedRows a = x_rows;  // a copy: no store can change its pointers
    alignas(64) uint8_t unpacked[P * kMaxBlock / kSlab * kUnpacked + 1];
    alignas(64) float c[P * V::kPassRows * kPanelRows];
    const Sums sums{c, rows * kPanelRows};
    for (int i = 0; i < P * rows; ++i) V::store(c + i * kPanelRows, V::zero());
    for (int64_t b = 0; b < w.blocks; b += Block::kHalves ? 2 : 1) {
      Weights<P> weights = block_of<P>(w, panel, b, unpacked);
      const int8_t* x = a.codes + (b * w.block / kSlab * a.rows + row) * kSlab;
      if constexpr (Block::kHalves) {
        for (int half = 0; half < 2; ++half, weights.codes += kHalf * kPanelRows) {
          if (half) load_groups(w, panel, b + 1, weights);
          sweep<P, 1, kQuads / 2>(rows, weights, a, x + half * kHalf, (b + half) * a.rows + row, sums);
        }
      } else {
        if constexpr (V::kOneSlab) {
          if (weights.inputs == kSlab) {
            sweep<P, 1>(rows, weights, a, x, b * a.rows + row, sums);
            continue;
          }
        }
        sweep<P, 0>(rows, weights, a, x, b * a.rows + row, sums);
      }
    }
    for (int p = 0; p < P; ++p) store_tile<V>(c + p * sums.apart, rows, row, panel + p, w.out_features, out);
  }

  template <int P>
  static void panels(const PackedWeight& w, const QuantizedRows& a, int64_t row, int rows, int64_t first, int64_t last,
                     const Output& out) {
    for (; first + P <= last; first += P) pass<P>(w, a, row, rows, first, out);
    if constexpr (P > 1) panels<P / 2>(w, a, row, rows, first, last, out);
  }

  // In as few passes as there must be, of as many whole tiles each as can be had.
  static void run(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, const Output& out) {
    constexpr int M = V::kTileRows;
    static_assert(V::kPassRows % M == 0, "the sums of a pass have room for whole tiles");
    int64_t passes = (a.rows + V::kPassRows - 1) / V::kPassRows;
    for (int64_t row = 0; passes > 0; --passes) {
      const int64_t share = (a.rows - row + passes - 1) / passes;
      const int rows = int(smaller((share + M - 1) / M * M, a.rows - row));
      panels<V::kTileWidth>(w, a, row, rows, first, last, out);
      row += rows;
    }
  }
};

}  // namespace
}  // namespace torch_int4
