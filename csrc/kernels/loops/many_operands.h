// The operands of attend_many in its scratch: rows and sums transposed, a tile of keys and values in float. Part of
// loops/attention.h.
#pragma once

namespace torch_int4 {
namespace {

template <class V, CacheType C>
struct ManyOperands {
  using F = typename V::F;
  using S = Softmax<V>;
  using Cache = CacheLoads<V, C>;
  static constexpr int kRows = V::kTilePanels * kLanes;  // rows of a group
  static_assert(kRows <= 4 * kLanes, "many_scratch() counts on it");

  // Scratch of a call. Layouts: queries [group][dim][row], sums [group][value_dim][row], keys [dim / 16][key][16],
  // values [key][value_dim], scores and bias [key][row].
  struct Memory {
    float *queries, *sums, *keys, *values, *scores, *bias, *largest, *total, *first, *last, *slope;

    explicit Memory(const AttentionTile& t) {
      const int64_t dim = padded_lanes(t.dim), value_dim = padded_lanes(t.value_dim);
      float* p = t.scratch;
      const auto take = [&](int64_t count) { return p += count, p - count; };
      queries = take(kManyRows * dim);
      sums = take(kManyRows * value_dim);
      keys = take(kKeyTile * dim);
      values = take(kKeyTile * value_dim);
      scores = take(kKeyTile * kRows);
      bias = take(kKeyTile * kRows);
      largest = take(kManyRows);
      total = take(kManyRows);
      first = take(kManyRows);
      last = take(kManyRows);
      slope = take(kManyRows);
    }
  };

  // The rows of a group and the keys that they see.
  struct Group {
    int begin, rows;
    int64_t first, last;          // any of them
    int64_t all_first, all_last;  // every one of them
    bool slopes;
  };

  static Group group_rows(const AttentionTile& t, int begin) {
    Group g{begin, int(smaller(kRows, t.rows - begin)), t.end, t.begin, t.begin, t.end, false};
    for (int r = begin; r < begin + g.rows; ++r) {
      const AttentionRow& row = t.row[r];
      if (row.first < g.first) g.first = row.first;
      if (row.last > g.last) g.last = row.last;
      if (row.first > g.all_first) g.all_first = row.first;
      if (row.last < g.all_last) g.all_last = row.last;
      g.slopes |= row.slope != 0;
    }
    return g;
  }

  // Lanes without a row copy the last row: they cost nothing and hide nothing.
  static void pack_rows(const AttentionTile& t, const Memory& m) {
    const int64_t dim = padded_lanes(t.dim);
    for (int begin = 0; begin < t.rows; begin += kRows) {
      float* target = m.queries + begin * dim;
      for (int lane = 0; lane < kRows; ++lane) {
        const int r = int(smaller(begin + lane, t.rows - 1));
        const float* query = t.query + r * dim;
        for (int64_t d = 0; d < dim; ++d) target[d * kRows + lane] = query[d];
        m.first[begin + lane] = float(t.row[r].first);
        m.last[begin + lane] = float(t.row[r].last);
        m.slope[begin + lane] = t.row[r].slope;
        m.largest[begin + lane] = kMinusInfinity;
        m.total[begin + lane] = 0;
      }
      memset(m.sums + begin * padded_lanes(t.value_dim), 0, size_t(kRows * padded_lanes(t.value_dim)) * sizeof(float));
    }
  }

  static void load_keys(const AttentionTile& t, int64_t begin, int64_t count, float* target) {
    const char* key = static_cast<const char*>(t.keys) + begin * t.key_stride * Cache::kBytes;
    for (int64_t i = 0; i < count; ++i, key += t.key_stride * Cache::kBytes) {
      const F scale = V::set(t.key_scales ? t.key_scales[begin + i] : 1.f);
      for (int64_t d = 0; d < t.dim; d += kLanes) {
        const char* p = key + d * Cache::kBytes;
        F x = d + kLanes <= t.dim ? Cache::load(p) : Cache::load_part(p, t.dim - d);
        if constexpr (C == CacheType::kInt8) x = V::mul(x, scale);
        V::store(target + d * kKeyTile + i * kLanes, x);
      }
    }
  }

  // Returns whether all of them are finite.
  static bool load_values(const AttentionTile& t, int64_t begin, int64_t count, float* target) {
    const char* value = static_cast<const char*>(t.values) + begin * t.value_stride * Cache::kBytes;
    F check = V::zero();
    for (int64_t i = 0; i < count; ++i, value += t.value_stride * Cache::kBytes) {
      const F scale = V::set(t.value_scales ? t.value_scales[begin + i] : 1.f);
      for (int64_t d = 0; d < t.value_dim; d += kLanes, target += kLanes) {
        const char* p = value + d * Cache::kBytes;
        F x = d + kLanes <= t.value_dim ? Cache::load(p) : Cache::load_part(p, t.value_dim - d);
        if constexpr (C == CacheType::kInt8) x = V::mul(x, scale);
        check = V::fmadd(x, V::zero(), check);
        V::store(target, x);
      }
    }
    return S::reduce(check, false) == 0.f;
  }
};

}  // namespace
}  // namespace torch_int4
