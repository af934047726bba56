// Attention of many rows: 16 rows are the lanes of a vector, and each number of a key or a value is broadcast to them.
// So neither keys nor values are transposed, and the softmax of a row stays in its lane. A tile of keys and values is
// converted to float once for all rows. Part of loops/attention.h.
#pragma once
#include "kernels/loops/many_operands.h"

namespace torch_int4 {
namespace {

template <class V, CacheType C>
struct AttendMany : ManyOperands<V, C> {
  using Base = ManyOperands<V, C>;
  using Base::kRows;
  using typename Base::F;
  using typename Base::Group;
  using typename Base::Memory;
  using typename Base::S;
  static constexpr int P = V::kTilePanels, M = V::kTileKeys;

  template <int K>
  static TI4_INLINE void score_tile(const float* query, const float* keys, int64_t dim, float* scores) {
    F acc[K][P];
    for (int k = 0; k < K; ++k) {
      for (int p = 0; p < P; ++p) acc[k][p] = V::zero();
    }
    for (int64_t slab = 0; slab < dim; slab += kLanes, keys += kKeyTile * kLanes) {
      for (int d = 0; d < kLanes; ++d, query += kRows) {
        F q[P];
        for (int p = 0; p < P; ++p) q[p] = V::load(query + p * kLanes);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) {
          const F key = V::set(keys[k * kLanes + d]);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) acc[k][p] = V::fmadd(q[p], key, acc[k][p]);
        }
      }
    }
    for (int k = 0; k < K; ++k) {
      for (int p = 0; p < P; ++p) V::store(scores + k * kRows + p * kLanes, acc[k][p]);
    }
  }

  template <int K>
  static TI4_INLINE void score_last(const float* query, const float* keys, int64_t count, int64_t dim, float* scores) {
    if constexpr (K > 0) {
      const int64_t done = count & K;
      if (done) score_tile<K>(query, keys, dim, scores);
      score_last<K / 2>(query, keys + done * kLanes, count, dim, scores + done * kRows);
    }
  }

  static void score(const float* query, const float* keys, int64_t count, int64_t dim, float* scores) {
    int64_t k = 0;
    for (; k + M <= count; k += M) score_tile<M>(query, keys + k * kLanes, dim, scores + k * kRows);
    score_last<largest_power_of_two(M - 1)>(query, keys + k * kLanes, count - k, dim, scores + k * kRows);
  }

  // Sums of K numbers of the value, for all rows of a group; `shrink` is the factor that the sums before it get.
  template <int K>
  static TI4_INLINE void value_tile(const float* weights, const float* values, int64_t count, int64_t value_dim,
                                    const F (&shrink)[P], float* sums) {
    F acc[K][P];
    for (int k = 0; k < K; ++k) {
      for (int p = 0; p < P; ++p) acc[k][p] = V::mul(V::load(sums + k * kRows + p * kLanes), shrink[p]);
    }
    for (int64_t i = 0; i < count; ++i, weights += kRows, values += value_dim) {
      F w[P];
      for (int p = 0; p < P; ++p) w[p] = V::load(weights + p * kLanes);
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const F value = V::set(values[k]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) acc[k][p] = V::fmadd(w[p], value, acc[k][p]);
      }
    }
    for (int k = 0; k < K; ++k) {
      for (int p = 0; p < P; ++p) V::store(sums + k * kRows + p * kLanes, acc[k][p]);
    }
  }

  static void add_values(const float* weights, const float* values, int64_t count, int64_t value_dim,
                         const F (&shrink)[P], float* sums) {
    constexpr int kWide = M == 8 ? 8 : 4;  // divides 16
    for (int64_t d = 0; d < value_dim; d += kWide) {
      value_tile<kWide>(weights, values + d, count, value_dim, shrink, sums + d * kRows);
    }
  }

  // The same where a value is not finite and a row may not see it.
  static void add_seen_values(const AttentionTile& t, const Group& g, const Memory& m, int64_t begin, int64_t count,
                              bool biased, const F (&shrink)[P]) {
    const int64_t value_dim = padded_lanes(t.value_dim);
    float* sums = m.sums + g.begin * value_dim;
    alignas(64) float factors[kRows];
    for (int p = 0; p < P; ++p) V::store(factors + p * kLanes, shrink[p]);
    for (int64_t i = 0; i < value_dim * kRows; ++i) sums[i] *= factors[i % kRows];
    for (int64_t key = 0; key < count; ++key) {
      for (int lane = 0; lane < g.rows; ++lane) {
        const int64_t i = key * kRows + lane;
        if (!sees(t.row[g.begin + lane], begin + key, biased ? m.bias + i : nullptr)) continue;
        for (int64_t d = 0; d < value_dim; ++d) sums[d * kRows + lane] += m.scores[i] * m.values[key * value_dim + d];
      }
    }
  }

  // The mask of a group of rows and a tile of keys, as [key][row].
  static MaskEffect load_bias(const AttentionTile& t, const Group& g, int64_t begin, int64_t count, float* bias) {
    alignas(64) float row[kKeyTile];
    int none = 0, all = 0;
    for (int lane = 0; lane < kRows; ++lane) {
      if (lane < g.rows) {
        const MaskEffect effect = load_mask<V>(t.row[g.begin + lane].mask, t.mask_type, begin, count, row);
        none += effect == kHidesAll;
        all += effect == kChangesNothing;
      }
      for (int64_t i = 0; i < count; ++i) bias[i * kRows + lane] = row[i];
    }
    return none == g.rows ? kHidesAll : all == g.rows ? kChangesNothing : kShowsSome;
  }

  // Scores to weights, in place; updates the running maximum and sum, and returns what earlier sums are worth.
  static void update(const AttentionTile& t, const Group& g, const Memory& m, int64_t begin, int64_t count, bool biased,
                     F (&shrink)[P]) {
    const bool ranged = g.all_first > begin || g.all_last < begin + count;
    for (int p = 0; p < P; ++p) {
      const int row = g.begin + p * kLanes;
      const F first = V::load(m.first + row), last = V::load(m.last + row), slope = V::load(m.slope + row);
      const F before = V::load(m.largest + row);
      float* scores = m.scores + p * kLanes;
      F largest = before;
      for (int64_t i = 0; i < count; ++i) {
        F s = V::load(scores + i * kRows);
        const F index = V::set(float(begin + i));
        if (t.softcap > 0) s = S::soften(s, t.softcap);
        if (g.slopes) s = V::fmadd(slope, index, s);
        if (biased) s = S::add_bias(s, V::load(m.bias + i * kRows + p * kLanes));
        if (ranged) s = S::hide_from(index, last, S::hide_before(index, first, s));
        V::store(scores + i * kRows, s);
        largest = V::max(s, largest);
      }
      const F base = V::where_less(largest, V::set(kLowest), V::zero(), largest);
      F total = V::zero();
      for (int64_t i = 0; i < count; ++i) {
        const F w = S::exp(V::sub(V::load(scores + i * kRows), base));
        total = V::add(total, w);
        V::store(scores + i * kRows, w);
      }
      shrink[p] = S::exp(V::sub(before, base));
      V::store(m.largest + row, largest);
      V::store(m.total + row, V::fmadd(V::load(m.total + row), shrink[p], total));
    }
  }

  static void run_tile(const AttentionTile& t, const Memory& m, int64_t begin) {
    const int64_t dim = padded_lanes(t.dim), value_dim = padded_lanes(t.value_dim);
    const int64_t keys = smaller(kKeyTile, t.end - begin);
    bool loaded = false, finite = false;
    for (int row = 0; row < t.rows; row += kRows) {
      const Group g = Base::group_rows(t, row);
      const int64_t count = smaller(keys, g.last - begin);
      if (count <= 0 || g.first >= begin + count) continue;
      bool biased = false;
      if (t.mask_type != MaskType::kNone) {
        const MaskEffect effect = load_bias(t, g, begin, count, m.bias);
        if (effect == kHidesAll) continue;
        biased = effect == kShowsSome;
      }
      if (!loaded) {
        Base::load_keys(t, begin, keys, m.keys);
        finite = Base::load_values(t, begin, keys, m.values);
        loaded = true;
      }
      score(m.queries + row * dim, m.keys, count, dim, m.scores);
      F shrink[P];
      update(t, g, m, begin, count, biased, shrink);
      if (finite) add_values(m.scores, m.values, count, value_dim, shrink, m.sums + row * value_dim);
      else add_seen_values(t, g, m, begin, count, biased, shrink);
    }
  }

  static void run(const AttentionTile& t) {
    const Memory m(t);
    Base::pack_rows(t, m);
    int64_t first = t.end, last = t.begin;
    for (int row = 0; row < t.rows; row += kRows) {
      const Group g = Base::group_rows(t, row);
      if (g.first < first) first = g.first;
      if (g.last > last) last = g.last;
    }
    const int64_t end = smaller(last, t.end);
    if (first < t.begin) first = t.begin;
    for (int64_t begin = first / kKeyTile * kKeyTile; begin < end; begin += kKeyTile) run_tile(t, m, begin);
    const int64_t value_dim = padded_lanes(t.value_dim);
    for (int r = 0; r < t.rows; ++r) {
      const float* sums = m.sums + r / kRows * kRows * value_dim + r % kRows;
      for (int64_t d = 0; d < value_dim; ++d) t.sums[r * value_dim + d] = sums[d * kRows];
      t.largest[r] = m.largest[r];
      t.total[r] = m.total[r];
    }
  }
};

template <class V>
void loops_attend_many(const AttentionTile& t) {
  if (t.type == CacheType::kF32) AttendMany<V, CacheType::kF32>::run(t);
  else if (t.type == CacheType::kBF16) AttendMany<V, CacheType::kBF16>::run(t);
  else if (t.type == CacheType::kF16) AttendMany<V, CacheType::kF16>::run(t);
  else AttendMany<V, CacheType::kInt8>::run(t);
}

}  // namespace
}  // namespace torch_int4
