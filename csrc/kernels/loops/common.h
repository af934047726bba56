// Shared by the loops over int8 rows: where products read weights, how blocks become floats, and where sums go.
#pragma once

namespace torch_int4 {
namespace {

// The place where an inner product reads its weights: packed lines, or the numbers that unpack() made of them in L1.
enum class Source { kInt4Lines, kInt8Lines, kBookLines, kInt5Lines, kInt6Lines, kUnpacked4, kUnpacked8 };

constexpr Source packed_source(WeightType type) {
  return type == WeightType::kInt4   ? Source::kInt4Lines
         : type == WeightType::kInt8 ? Source::kInt8Lines
         : type == WeightType::kInt5 ? Source::kInt5Lines
         : type == WeightType::kInt6 ? Source::kInt6Lines
                                     : Source::kBookLines;
}
constexpr Source unpacked_source(WeightType type) { return is_nibble(type) ? Source::kUnpacked4 : Source::kUnpacked8; }

// The type of codes whose low and high bits have lines of their own; of other lines, kInt4.
constexpr WeightType split_type(Source source) {
  return source == Source::kInt5Lines   ? WeightType::kInt5
         : source == Source::kInt6Lines ? WeightType::kInt6
                                        : WeightType::kInt4;
}
constexpr bool is_split(Source source) { return high_bits(split_type(source)) > 0; }

// Base of vectors without dpbusd, which multiply codes of more than 4 bits as magnitudes, and activations that carry
// the signs.
struct SignedPlanes {
  static constexpr int kPlane = kSlab * kPanelRows;  // bytes

  // The number that products take from every code.
  static constexpr int taken(WeightType type) { return is_nibble(type) ? 0 : zero_point(type); }

  // For tiles int4 becomes one byte per weight, other codes the plane of their values and that of their magnitudes.
  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kPlane * (is_nibble(T) ? 1 : 2);
  }
};

// Base of vectors with dpbusd, which multiplies codes as they are.
struct UnsignedCodes {
  static constexpr int taken(WeightType) { return 0; }

  // Int8 lines are what dpbusd reads: they stay where they are.
  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return code_bits(T) == 8 ? 0 : kSlab * kPanelRows;
  }
};

// The bits above the low ones of the four inputs of quad j, in place, from their lines behind those of the low bits.
template <class V, Source S>
TI4_INLINE typename V::Bytes high_part(const uint8_t* slab, int j, int offset) {
  constexpr WeightType T = split_type(S);
  constexpr int kBits = high_bits(T), kQuads = high_quads(T), kMask = ((1 << kBits) - 1) << low_bits(T);
  const auto line = V::load_bytes(slab + low_bytes(T) + j / kQuads * kLineBytes + offset);
  const int by = low_bits(T) - j % kQuads * kBits;  // to the left
  return V::masked_bytes(by < 0 ? V::shift_bits_right(line, -by) : V::shift_bits_left(line, by), kMask);
}

constexpr int largest_power_of_two(int n) { return n < 2 ? n : 2 * largest_power_of_two(n / 2); }

// body(type, offset), tags of those of w, for which loops exist: operators refuse others.
template <class Body>
TI4_INLINE void with_loops(const PackedWeight& w, Body body) {
  with_type(w.type, [&](auto type) {
    with_offset(w.offset, [&](auto offset) {
      if constexpr (are_served(type, offset)) body(type, offset);
    });
  });
}

constexpr int kQuads = kSlab / 4;  // of a slab
constexpr int kStreams = 2;        // panels, far apart, that few rows read at once
constexpr int kRowBlock = 128;     // rows of x per pass over a panel: they fit L2, their sums (8 KiB) fit L1

// Rounds y to the type of the output and adds the residual.
template <class V>
TI4_INLINE void store_sum(const Output& out, int64_t element, typename V::F y) {
  const int64_t byte = element * element_bytes(out.dtype);
  char* target = static_cast<char*>(out.data) + byte;
  if (out.residual) {
    if (out.dtype != DType::kF32) V::store_as(target, out.dtype, y), y = V::load_as(target, out.dtype);
    y = V::add(V::load_as(static_cast<const char*>(out.residual) + byte, out.dtype), y);
  }
  V::store_as(target, out.dtype, y);
}

// Sums the `terms` rows of each output, adds the bias and writes the columns of one panel; `row` counts input rows.
template <class V>
TI4_INLINE void store_rows(const float* c, int rows, int64_t row, int64_t panel, int64_t out_features,
                           const Output& output) {
  const Output out = output;  // a copy: no store can change it
  const int64_t column = panel * kPanelRows;
  const int columns = int(smaller(kPanelRows, out_features - column));
  alignas(64) float bias[kPanelRows] = {};
  if (out.bias) memcpy(bias, out.bias + column, size_t(columns) * sizeof(float));
  int64_t element = row / out.terms * out.stride + column;
  for (int i = 0; i < rows; i += out.terms, c += out.terms * kPanelRows, element += out.stride) {
    auto y = V::load(c);
    if (out.terms == 2) y = V::add(y, V::load(c + kPanelRows));
    if (out.bias) y = V::add(y, V::load(bias));
    if (columns == kPanelRows) {
      store_sum<V>(out, element, y);
      continue;
    }
    alignas(64) float tail[kPanelRows];
    V::store(tail, y);
    for (int n = 0; n < columns; ++n) store_output(out, element + n, tail[n]);
  }
}

// The same for many rows. Rows of outputs often lie multiples of 4 KiB apart, where the processor takes a load of sums
// for one of an output that is still on its way to memory, and waits: so loads of several rows go before their stores.
template <class V>
TI4_INLINE void store_tile(const float* c, int rows, int64_t row, int64_t panel, int64_t out_features,
                           const Output& output) {
  constexpr int kBatch = 8;
  const Output out = output;
  const int step = out.terms * kPanelRows;
  const int64_t column = panel * kPanelRows;
  int i = 0;
  int64_t element = row / out.terms * out.stride + column;
  for (; column + kPanelRows <= out_features && i + kBatch * out.terms <= rows; i += kBatch * out.terms) {
    typename V::F y[kBatch];
#pragma GCC unroll 8
    for (int j = 0; j < kBatch; ++j, c += step) {
      y[j] = V::load(c);
      if (out.terms == 2) y[j] = V::add(y[j], V::load(c + kPanelRows));
      if (out.bias) y[j] = V::add(y[j], V::load(out.bias + column));
    }
    TI4_BARRIER();
#pragma GCC unroll 8
    for (int j = 0; j < kBatch; ++j, element += out.stride) store_sum<V>(out, element, y[j]);
    TI4_BARRIER();
  }
  store_rows<V>(c, rows - i, row + i, panel, out_features, out);
}

// 16 scales or float offsets, from element i on.
template <class V>
TI4_INLINE typename V::F load_parameters(const void* p, ScaleType type, int64_t i) {
  if (type == ScaleType::kF16) return V::load_as(static_cast<const uint16_t*>(p) + i, DType::kF16);
  if (type == ScaleType::kF32) return V::load(static_cast<const float*>(p) + i);
  const auto exponent = V::load_u8(static_cast<const uint8_t*>(p) + i);
  const auto power = V::max_int(V::shift_left(exponent, 23), V::set_int(0x400000));  // 0 is a subnormal number
  const auto quiet = V::shift_left(V::shift_right(V::add_int(exponent, V::set_int(1)), 8), 22);  // and 255 is NaN
  return V::as_float(V::add_int(power, quiet));
}

// 16 scales and offsets of two levels, from element i on.
template <class V>
TI4_INLINE void load_two_levels(const void* records, int64_t i, typename V::F& scale, typename V::F& offset) {
  const uint64_t group = uint64_t(i) / kPanelRows;
  const TwoLevels& at = static_cast<const TwoLevels*>(records)[group / TwoLevels::kGroups];
  const auto& multipliers = at.multipliers[group % TwoLevels::kGroups];
  scale = V::mul(V::load_as(at.scale, DType::kF16), V::to_float(V::load_u8(multipliers[0])));
  offset = V::mul(V::load_as(at.offset, DType::kF16), V::to_float(V::load_u8(multipliers[1])));
}

// 16 scales of two levels, from element i on.
template <class V, int kInputs>
TI4_INLINE typename V::F load_two_level_scale(const void* records, int64_t i) {
  using Record = TwoLevelScales<kInputs>;
  const uint64_t group = uint64_t(i) / kPanelRows;
  const Record& at = static_cast<const Record*>(records)[group / Record::kGroups];
  return V::mul(V::load_as(at.scale, DType::kF16), V::load_int8(at.multipliers[group % Record::kGroups]));
}

// One block of inputs of a panel, in integers, and its way into the sums of floats.
template <class V, WeightType T, Offset O>
struct Int8Block {
  using F = typename V::F;
  using I = typename V::I;

  static constexpr bool kHalves = O == Offset::kTwoLevelHalves;  // blocks are half a slab long

  struct Group {
    F scale, offset;
  };

  // Scales of type `type`, which the compiler may know, and offsets from element i on.
  static TI4_INLINE Group load_group(const PackedWeight& w, ScaleType type, int64_t i) {
    Group g{};
    if constexpr (O == Offset::kTwoLevel) {
      load_two_levels<V>(w.scales, i, g.scale, g.offset);
      return g;
    }
    if constexpr (O == Offset::kTwoLevelScale) g.scale = load_two_level_scale<V, kSlab>(w.scales, i);
    else if constexpr (kHalves) g.scale = load_two_level_scale<V, kHalf>(w.scales, i);
    else g.scale = load_parameters<V>(w.scales, type, i);
    if constexpr (T == WeightType::kBook) g.scale = V::mul(g.scale, V::set(w.book->step));
    if constexpr (O == Offset::kInteger) g.offset = V::to_float(V::load_u8(static_cast<const uint8_t*>(w.offsets) + i));
    if constexpr (O == Offset::kFloat) g.offset = load_parameters<V>(w.offsets, type, i);
    return g;
  }

  // Of block i of the rows, counted over all of them.
  static TI4_INLINE I start(const QuantizedRows& a, int64_t i) {
    constexpr int kZero = takes_zero_point(O) ? zero_point(T) : 0;
    constexpr int kTaken = V::taken(T);  // from every code, by the products
    return V::set_int(kTaken == kZero ? 0 : (kTaken - kZero) * a.sums[i]);
  }

  static TI4_INLINE F finish(F acc, I dot, const Group& g, const QuantizedRows& a, int64_t i) {
    F t = V::to_float(dot);
    if constexpr (O == Offset::kInteger) t = V::fnmadd(g.offset, V::set(float(a.sums[i])), t);
    acc = V::fmadd(t, V::mul(g.scale, V::set(a.scales[i])), acc);
    if constexpr (adds_offset(O)) acc = V::fmadd(g.offset, V::set(a.scaled_sums[i]), acc);
    return acc;
  }

  // Panels are read in pieces of 1 KiB and less, too short for the processor to look ahead by itself.
  static TI4_INLINE void prefetch_slab(const uint8_t* codes) {
    constexpr int kAhead = 1024;
    for (int i = 0; i < slab_bytes(T); i += kLineBytes) __builtin_prefetch(codes + kAhead + i);
  }

  // Of P panels, how many are read in turns, line by line, for M rows.
  template <int M, int P>
  static constexpr int turns() {
    constexpr int kTurns = M > 2 ? 1 : V::kTurnSums / M / (T == WeightType::kBook ? 2 : 1);
    return kTurns < P ? kTurns : P;
  }
};

}  // namespace
}  // namespace torch_int4
