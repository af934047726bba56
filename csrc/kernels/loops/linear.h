// The loops that every vector kernel shares, written once over a type V of 16-lane vectors and inner products.
// Include it inside the file's target region, after every other header; all of it has internal linkage.
//
// V supplies: F and I (16 floats, 16 int32) with load/store/arithmetic; Bytes, a register of bytes, with masks and
// shifts; dot<Source, first, last>, the inner products of the quads from first to last of the 8 (32 inputs) of a slab of
// P panels with M rows; unpack<WeightType> and unpacked_bytes<WeightType> (0: tiles read the packed lines);
// taken(type), what dot takes from every code; kTileRows, kDirectRows, kDirectRows8 (of more than 4 bits), kFloatRows (rows of the register tiles); kTileWidth (panels of
// a tile of many rows, which share the load of an input: a power of two); kPassRows (a multiple of the tiles' rows:
// rows that sweep over a block before the next is unpacked);
// kDirectLimit (more rows than this are tiled);
// kTurnSums (panels times rows, of two at most, whose lines are read in turns; a divisor or multiple of the streams);
// kRowStreams (panels, far apart, that one row reads at once);
// kOneSlab (whether blocks of one slab, as groups of 32 have them, get loops of their own, and twice the limit).
#pragma once
#include "kernels/loops/common.h"
#include "kernels/loops/one_row.h"
#include "kernels/loops/tiles.h"

namespace torch_int4 {
namespace {

// The table of a kernel file whose vectors are V, and its registration; the latter stands outside the target region,
// because it runs on every processor.
#define TI4_KERNELS(name, rank, V)                                                                                 \
  {name,         rank, nullptr, loops_to_float<V>, loops_quantize<V>, loops_linear_int8<V>, loops_linear_float<V>, \
   TI4_SHARED(V)}
// The part of the table that no instruction set has its own version of.
#define TI4_SHARED(V) \
  loops_from_float<V>, loops_rotate<V>, loops_attend_few<V>, loops_attend_many<V>, loops_normalize<V>, loops_gate<V>
// `condition` says whether the set runs here; `roofs` points to its Probes, or is null.
#define TI4_REGISTER(condition, roofs)                                                     \
  namespace torch_int4 {                                                                   \
  namespace {                                                                              \
  bool supported() { return condition; }                                                   \
  [[maybe_unused]] const bool registered =                                                 \
      (kernels.supported = supported, kernels.probes = roofs, register_kernels(&kernels)); \
  }                                                                                        \
  }

template <class V, WeightType T, Offset O>
struct Int8Loops : Int8Block<V, T, O> {
  using Block = Int8Block<V, T, O>;
  using typename Block::F;
  using typename Block::Group;
  using typename Block::I;

  // Keeps gcc from starting with one panel or tile before the sums of another have left the registers.
  static TI4_INLINE void part() {
    if constexpr (V::kOneSlab) TI4_BARRIER();
  }

  // One block of Q panels, of kSlabs slabs or, where that is 0, of `inputs`, or the quads [kFirst, kLast) of one; their
  // codes are left behind it. Panels that are read in turns, line by line, share each input's broadcast, keep as many
  // reads under way, and none waits for its own last sum.
  template <int M, int kSlabs, int kFirst, int kLast, int Q>
  static TI4_INLINE void direct_block(F (&acc)[Q][M], const uint8_t* (&codes)[Q], const PackedWeight& w,
                                      const QuantizedRows& a, const int8_t* x, int64_t inputs, int64_t i,
                                      const int64_t (&first)[Q], int64_t parameter) {
    I dot[Q][M];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) dot[q][m] = Block::start(a, i + m);
    }
    for (int64_t k = 0; k < (kSlabs ? kSlabs * kSlab : inputs); k += kSlab, x += a.rows * kSlab) {
      if constexpr (M > 2)
        Block::prefetch_slab(codes[0]);  // fewer rows leave the processor time to look ahead by itself
      V::template dot<packed_source(T), kFirst, kLast>(dot, codes, x, w.book);
      if constexpr (kLast < kQuads) continue;  // the next half of the slab comes from the same lines
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) codes[q] += slab_bytes(T);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const Group g = Block::load_group(w, w.scale_type, first[q] + parameter);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[q][m] = Block::finish(acc[q][m], dot[q][m], g, a, i + m);
    }
    if constexpr (kSlabs && Q == 1) part();
  }

  // Few rows: P panels, `apart` panels from each other, straight from packed memory, each byte touched once.
  template <int M, int P, int kSlabs = 0>
  static TI4_INLINE void direct_panels(const PackedWeight& w, const QuantizedRows& x_rows, int64_t row, int64_t panel,
                                       int64_t apart, const Output& out) {
    const QuantizedRows a = x_rows;  // a copy: no store can change its pointers
    constexpr int Q = Block::template turns<M, P>();
    F acc[P / Q][Q][M];
    const uint8_t* codes[P / Q][Q];
    int64_t first[P / Q][Q];
    for (int p = 0; p < P; ++p) {
      first[p / Q][p % Q] = (panel + p * apart) * w.groups * kPanelRows;
      codes[p / Q][p % Q] = w.codes + (panel + p * apart) * w.panel_bytes();
      for (int m = 0; m < M; ++m) acc[p / Q][p % Q][m] = V::zero();
    }
    const int8_t* x = a.codes + row * kSlab;
    [[maybe_unused]] const int64_t per_group = w.blocks_per_group();
    [[maybe_unused]] int64_t parameter = 0, in_group = 0;
    if constexpr (Block::kHalves) {
      constexpr int kMiddle = kQuads / 2;
      for (int64_t i = row; i < w.blocks * a.rows; i += 2 * a.rows, parameter += 2 * kPanelRows, x += kSlab * a.rows) {
#pragma GCC unroll 8
        for (int p = 0; p < P; p += Q) {
          direct_block<M, 1, 0, kMiddle>(acc[p / Q], codes[p / Q], w, a, x, 0, i, first[p / Q], parameter);
          direct_block<M, 1, kMiddle, kQuads>(acc[p / Q], codes[p / Q], w, a, x, 0, i + a.rows, first[p / Q],
                                              parameter + kPanelRows);
        }
      }
    } else {
      for (int64_t b = 0; b < w.blocks; ++b) {
        const int64_t inputs = kSlabs ? kSlabs * kSlab : smaller(w.block, w.padded_inputs - b * w.block);
#pragma GCC unroll 8
        for (int p = 0; p < P; p += Q) {
          direct_block<M, kSlabs, 0, kQuads>(acc[p / Q], codes[p / Q], w, a, x, inputs, b * a.rows + row, first[p / Q],
                                             parameter);
        }
        x += inputs * a.rows;
        if (++in_group == per_group) in_group = 0, parameter += kPanelRows;
      }
    }
    alignas(64) float c[M * kPanelRows];
    for (int p = 0; p < P; ++p) {
      for (int m = 0; m < M; ++m) V::store(c + m * kPanelRows, acc[p / Q][p % Q][m]);
      store_rows<V>(c, M, row, panel + p * apart, w.out_features, out);
    }
  }

  // Out of line, because gcc runs out of registers where loops for several numbers of rows stand in one function.
  template <int M, int P>
  static __attribute__((noinline)) void direct_pass(const PackedWeight& w, const QuantizedRows& a, int64_t row,
                                                    int64_t panel, int64_t apart, const Output& out) {
    if constexpr (V::kOneSlab && !Block::kHalves) {
      if (w.block == kSlab) return direct_panels<M, P, 1>(w, a, row, panel, apart, out);
    }
    direct_panels<M, P>(w, a, row, panel, apart, out);
  }

  template <int M, int P>
  static TI4_INLINE void direct_rows(int64_t rows, const PackedWeight& w, const QuantizedRows& a, int64_t row,
                                     int64_t panel, int64_t apart, const Output& out) {
    if constexpr (M > 1) {
      if (rows < M) return direct_rows<M - 1, P>(rows, w, a, row, panel, apart, out);
    }
    direct_pass<M, P>(w, a, row, panel, apart, out);
  }

  // All rows over P panels, in as few passes as there must be, of as many rows each as can be had: every pass unpacks
  // the panels again, which the second one finds in the cache. The terms of a row stay together.
  template <int P>
  static TI4_INLINE void direct_passes(const PackedWeight& w, const QuantizedRows& a, int64_t panel, int64_t apart,
                                       const Output& out) {
    constexpr int kMost = is_nibble(T) ? V::kDirectRows : V::kDirectRows8;
    // Codes in two parts need registers, and blocks that end twice in a slab: more rows would spill their sums.
    constexpr int kFewer = kMost > 4 ? (kMost + 1) / 2 : 2;  // two rows may be the terms of one
    constexpr int M = high_bits(T) || Block::kHalves ? kFewer : kMost;
    const int64_t most = M / out.terms, rows = a.rows / out.terms;
    int64_t passes = (rows + most - 1) / most;
    for (int64_t row = 0; passes > 0; --passes) {
      const int64_t pass = (rows - row + passes - 1) / passes;
      direct_rows<M, P>(pass * out.terms, w, a, row * out.terms, panel, apart, out);
      row += pass;
    }
  }

  // Splits a range of panels into P segments and reads one panel of each at a time: P streams for the prefetchers.
  template <int P>
  static void direct(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, const Output& out) {
    if (OneRow<V, T, O>::serves(w, a))
      return OneRow<V, T, O>::template run<P == 1 ? 1 : V::kRowStreams>(w, a, first, last, out);
    const int64_t segment = (last - first) / P;
    for (int64_t i = 0; i < segment; ++i) direct_passes<P>(w, a, first + i, segment, out);
    for (int64_t i = first + P * segment; i < last; ++i) direct_passes<1>(w, a, i, 0, out);
  }

  static void run(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, int streams,
                  const Output& out) {
    const bool one_slab = V::kOneSlab && w.block == kSlab;  // between whose blocks a tile's sums go to memory
    if (a.rows > V::kDirectLimit * (one_slab ? 2 : 1)) TileLoops<V, T, O>::run(w, a, first, last, out);
    else if (streams > 1) direct<kStreams>(w, a, first, last, out);
    else direct<1>(w, a, first, last, out);
  }
};

template <class V>
void loops_linear_int8(const PackedWeight& w, const QuantizedRows& a, int64_t first, int64_t last, int streams,
                       const Output& out) {
  with_loops(w, [&](auto type, auto offset) { Int8Loops<V, type, offset>::run(w, a, first, last, streams, out); });
}

}  // namespace
}  // namespace torch_int4
