// Shared by the loops over int8 rows: where products read weights, how blocks become floats, and where sums go.
#pragma once

namespace torch_int4 {
namespace {

// The place where an inner product reads its weights: packed lines, or the numbers that unpack() made of them in L1.
enum class Source { kInt4Lines, kInt8Lines, kBookLines, kUnpacked4, kUnpacked8 };

constexpr Source packed_source(WeightType type) {
  return type == WeightType::kInt4   ? Source::kInt4Lines
         : type == WeightType::kInt8 ? Source::kInt8Lines
                                     : Source::kBookLines;
}
constexpr Source unpacked_source(WeightType type) { return is_wide(type) ? Source::kUnpacked8 : Source::kUnpacked4; }

// Base of vectors without dpbusd, which multiply 8-bit codes as magnitudes, and activations that carry the signs.
struct SignedPlanes {
  static constexpr int kCentre8 = 128;
  static constexpr int kPlane = kSlab * kPanelRows;  // bytes

  // For tiles int4 becomes one byte per weight, 8-bit codes the plane of their values and that of their magnitudes.
  template <WeightType T>
  static constexpr int unpacked_bytes() {
    return kPlane * (is_wide(T) ? 2 : 1);
  }
};

constexpr int largest_power_of_two(int n) { return n < 2 ? n : 2 * largest_power_of_two(n / 2); }

constexpr int kStreams = 2;     // panels, far apart, that few rows read at once
constexpr int kRowBlock = 128;  // rows of x per pass over a panel: they fit L2, their sums (8 KiB) fit L1

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
  const TwoLevels& at = static_cast<const TwoLevels*>(records)[group / kRecordGroups];
  const auto& multipliers = at.multipliers[group % kRecordGroups];
  scale = V::mul(V::load_as(at.scale, DType::kF16), V::to_float(V::load_u8(multipliers[0])));
  offset = V::mul(V::load_as(at.offset, DType::kF16), V::to_float(V::load_u8(multipliers[1])));
}

// One block of inputs of a panel, in integers, and its way into the sums of floats.
template <class V, WeightType T, Offset O>
struct Int8Block {
  using F = typename V::F;
  using I = typename V::I;

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
    g.scale = load_parameters<V>(w.scales, type, i);
    if constexpr (T == WeightType::kBook) g.scale = V::mul(g.scale, V::set(w.book->step));
    if constexpr (O == Offset::kInteger) g.offset = V::to_float(V::load_u8(static_cast<const uint8_t*>(w.offsets) + i));
    if constexpr (O == Offset::kFloat) g.offset = load_parameters<V>(w.offsets, type, i);
    return g;
  }

  // Of block i of the rows, counted over all of them.
  static TI4_INLINE I start(const QuantizedRows& a, int64_t i) {
    constexpr int kZero = O != Offset::kSymmetric ? 0 : zero_point(T);
    constexpr int kTaken = is_wide(T) ? V::kCentre8 : 0;  // from every code, by the products
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
