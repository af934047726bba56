// Attention of a few rows to a span of keys: each key and value is read once and serves all rows. Part of
// loops/attention.h.
#pragma once

namespace torch_int4 {
namespace {

// Keys of a span that some row sees, as [begin, end) relative to the span, in multiples of 16.
struct SeenRuns {
  int count = 0;
  int16_t begin[kSpan / kLanes / 2 + 1], end[kSpan / kLanes / 2 + 1];

  void add(int64_t first, int64_t last) {
    if (count && end[count - 1] == first) {
      end[count - 1] = int16_t(last);
      return;
    }
    begin[count] = int16_t(first);
    end[count++] = int16_t(last);
  }
};

template <class V, CacheType C>
struct AttendFew {
  using F = typename V::F;
  using S = Softmax<V>;
  using Cache = CacheLoads<V, C>;
  static constexpr int kKeys = 4;         // keys of a register tile of scores
  static constexpr int kValueBlock = 16;  // keys of a stream whose values stay in L1 while all rows pass over them

  // Scores of R rows and four keys, `apart` from each other, of which the last ones may repeat.
  template <int R>
  static TI4_INLINE void score(const AttentionTile& t, const char* const (&keys)[kKeys], const float* query,
                               float* scores, int64_t apart, int valid) {
    const int64_t padded = padded_lanes(t.dim);
    F acc[R][kKeys];
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kKeys; ++j) acc[r][j] = V::zero();
    }
    int64_t d = 0;
    for (; d + kLanes <= t.dim; d += kLanes) {
      F key[kKeys];
      for (int j = 0; j < kKeys; ++j) key[j] = Cache::load(keys[j] + d * Cache::kBytes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const F q = V::load(query + r * padded + d);
#pragma GCC unroll 4
        for (int j = 0; j < kKeys; ++j) acc[r][j] = V::fmadd(key[j], q, acc[r][j]);
      }
    }
    if (d < t.dim) {
      for (int j = 0; j < kKeys; ++j) {
        const F key = Cache::load_part(keys[j] + d * Cache::kBytes, t.dim - d);
        for (int r = 0; r < R; ++r) acc[r][j] = V::fmadd(key, V::load(query + r * padded + d), acc[r][j]);
      }
    }
    for (int r = 0; r < R; ++r) {
      alignas(16) float sums[kKeys];
      V::store_sums(sums, acc[r]);
      for (int j = 0; j < valid; ++j) scores[r * kSpan + j * apart] = sums[j];
    }
  }

  template <int R>
  static TI4_INLINE void score_rows(const AttentionTile& t, const char* const (&keys)[kKeys], int row, float* scores,
                                    int64_t apart, int valid) {
    const int64_t padded = padded_lanes(t.dim);
    for (; row + R <= t.rows; row += R) {
      score<R>(t, keys, t.query + row * padded, scores + row * kSpan, apart, valid);
    }
    if constexpr (R > 1) score_rows<R / 2>(t, keys, row, scores, apart, valid);
  }

  // `count` groups of four keys that are `apart` keys from each other; of the first one, only `valid` keys exist.
  static void score_keys(const AttentionTile& t, int64_t begin, int64_t count, int64_t apart, int64_t valid,
                         float* scores) {
    const int64_t step = t.key_stride * Cache::kBytes;
    const char* key = static_cast<const char*>(t.keys) + (t.begin + begin) * step;
    for (int64_t i = 0; i < count; ++i, key += step) {
      const char* keys[kKeys];
      for (int j = 0; j < kKeys; ++j) {
        keys[j] = key + smaller(j, valid - 1) * apart * step;
      }
      score_rows<V::kScoreRows>(t, keys, 0, scores + begin + i, apart, int(valid));
    }
  }

  // A quarter of the run from each of four places: one stream does not fill the memory's bandwidth.
  static void score_run(const AttentionTile& t, int64_t begin, int64_t end, float* scores) {
    const int64_t quarter = (end - begin) / kKeys, rest = (end - begin) % kKeys;
    score_keys(t, begin, quarter, quarter, kKeys, scores);
    if (rest) score_keys(t, end - rest, 1, 1, rest, scores);
  }

  // Scores of one row to probabilities times the scales of the values.
  static void normalize(const AttentionTile& t, int r, float* scores, const float* bias) {
    const int64_t count = t.end - t.begin;
    const AttentionRow& row = t.row[r];
    const F first = V::set(float(row.first)), last = V::set(float(row.last)), slope = V::set(row.slope);
    F largest = V::set(kMinusInfinity);
    for (int64_t i = 0; i < count; i += kLanes) {
      const F index = V::add(S::iota(), V::set(float(t.begin + i)));
      F s = V::load(scores + i);
      if (t.key_scales) s = V::mul(s, S::load_floats(t.key_scales + t.begin + i, count - i));
      if (t.softcap > 0) s = S::soften(s, t.softcap);
      if (row.slope != 0) s = V::fmadd(slope, index, s);
      if (bias) s = S::add_bias(s, V::load(bias + i));
      s = S::hide_from(index, last, S::hide_before(index, first, s));
      V::store(scores + i, s);
      largest = V::max(s, largest);
    }
    t.largest[r] = S::reduce(largest, true);
    const F base = V::set(t.largest[r] == kMinusInfinity ? 0.f : t.largest[r]);
    F total = V::zero();
    for (int64_t i = 0; i < count; i += kLanes) {
      F p = S::exp(V::sub(V::load(scores + i), base));
      total = V::add(total, p);
      if (t.value_scales) p = V::mul(p, S::load_floats(t.value_scales + t.begin + i, count - i));
      V::store(scores + i, p);
    }
    t.total[r] = S::reduce(total, false);
  }

  // Adds `count` values of each of S streams, `apart` values from each other, to R rows, N vectors wide.
  template <int R, int N, int S>
  static TI4_INLINE void add_values(const char* value, int64_t step, int64_t count, int64_t apart, const float* p,
                                    float* sums, int64_t padded) {
    F acc[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) acc[r][n] = V::load(sums + r * padded + n * kLanes);
    }
    for (int64_t i = 0; i < count; ++i, value += step) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const char* x = value + s * apart * step;
        const float* weight = p + i + s * apart;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          const F v = Cache::load(x + n * kLanes * Cache::kBytes);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][n] = V::fmadd(v, V::set(weight[r * kSpan]), acc[r][n]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) V::store(sums + r * padded + n * kLanes, acc[r][n]);
    }
  }

  template <int R, int N, int S>
  static TI4_INLINE int64_t add_columns(const AttentionTile& t, const char* value, int64_t count, int64_t apart,
                                        const float* p, float* sums, int64_t d) {
    const int64_t padded = padded_lanes(t.value_dim), step = t.value_stride * Cache::kBytes;
    for (; d + N * kLanes <= t.value_dim; d += N * kLanes) {
      add_values<R, N, S>(value + d * Cache::kBytes, step, count, apart, p, sums + d, padded);
    }
    if constexpr (N > 1) return add_columns<R, N / 2, S>(t, value, count, apart, p, sums, d);
    else return d;
  }

  template <int R, int S>
  static TI4_INLINE void add_rows(const AttentionTile& t, const char* value, int64_t count, int64_t apart,
                                  const float* p, int row) {
    const int64_t padded = padded_lanes(t.value_dim), step = t.value_stride * Cache::kBytes;
    constexpr int kVectors = R == 1 ? V::kValueVectors : 2 * V::kValueVectors / R;
    for (; row + R <= t.rows; row += R) {
      float* sums = t.sums + row * padded;
      const float* weights = p + row * kSpan;
      const int64_t d = add_columns<R, kVectors, S>(t, value, count, apart, weights, sums, 0);
      for (int64_t i = 0; d < t.value_dim && i < count * S; ++i) {
        const int64_t at = i / count * apart + i % count;
        const F x = Cache::load_part(value + at * step + d * Cache::kBytes, t.value_dim - d);
        for (int r = 0; r < R; ++r) {
          float* target = sums + r * padded + d;
          V::store(target, V::fmadd(x, V::set(weights[r * kSpan + at]), V::load(target)));
        }
      }
    }
    if constexpr (R > 1) add_rows<R / 2, S>(t, value, count, apart, p, row);
  }

  static void add_run(const AttentionTile& t, int64_t begin, int64_t end, const float* p) {
    const int64_t step = t.value_stride * Cache::kBytes;
    const int64_t part = (end - begin) / kStreams, rest = (end - begin) % kStreams;
    const char* value = static_cast<const char*>(t.values) + (t.begin + begin) * step;
    for (int64_t i = 0; i < part; i += kValueBlock) {
      add_rows<V::kScoreRows, kStreams>(t, value + i * step, smaller(kValueBlock, part - i), part, p + begin + i, 0);
    }
    if (rest) add_rows<V::kScoreRows, 1>(t, value + (end - begin - rest) * step, rest, 0, p + end - rest, 0);
  }

  // A value that is not finite, under a key that some row does not see, has made NaN of 0 * value: those rows again.
  static void mend(const AttentionTile& t, int r, const SeenRuns& runs, const float* p, const float* bias) {
    float* sums = t.sums + r * padded_lanes(t.value_dim);
    F check = V::zero();
    for (int64_t d = 0; d < t.value_dim; d += kLanes) check = V::fmadd(V::load(sums + d), V::zero(), check);
    if (S::reduce(check, false) == 0.f) return;
    memset(sums, 0, size_t(t.value_dim) * sizeof(float));
    for (int run = 0; run < runs.count; ++run) {
      for (int64_t i = runs.begin[run]; i < runs.end[run]; ++i) {
        if (!sees(t.row[r], t.begin + i, bias ? bias + i : nullptr)) continue;
        const char* value = static_cast<const char*>(t.values) + (t.begin + i) * t.value_stride * Cache::kBytes;
        for (int64_t d = 0; d < t.value_dim; ++d) sums[d] += p[i] * Cache::element(value, d);
      }
    }
  }

  // Reads the mask and finds the keys that any row sees.
  static SeenRuns find_runs(const AttentionTile& t, float* bias) {
    const int64_t count = t.end - t.begin;
    bool seen[kSpan / kLanes] = {};
    for (int r = 0; r < t.rows; ++r) {
      const int64_t first = t.row[r].first - t.begin, last = smaller(t.row[r].last - t.begin, count);
      float* row = bias + r * kSpan;
      if (t.mask_type != MaskType::kNone) load_mask<V>(t.row[r].mask, t.mask_type, t.begin, count, row);
      for (int64_t i = first > 0 ? first / kLanes * kLanes : 0; i < last; i += kLanes) {
        bool shown = t.mask_type == MaskType::kNone;
        for (int64_t j = i; j < i + kLanes && !shown; ++j) shown = !(row[j] < kLowest);
        seen[i / kLanes] |= shown;
      }
    }
    SeenRuns runs;
    for (int64_t i = 0; i < count; i += kLanes) {
      if (seen[i / kLanes]) runs.add(i, smaller(i + kLanes, count));
    }
    return runs;
  }

  static void run(const AttentionTile& t) {
    float* scores = t.scratch;
    float* bias = t.scratch + kFewRows * kSpan;
    const bool masked = t.mask_type != MaskType::kNone;
    const SeenRuns runs = find_runs(t, bias);
    for (int i = 0; i < runs.count; ++i) score_run(t, runs.begin[i], runs.end[i], scores);
    for (int r = 0; r < t.rows; ++r) normalize(t, r, scores + r * kSpan, masked ? bias + r * kSpan : nullptr);
    memset(t.sums, 0, size_t(t.rows * padded_lanes(t.value_dim)) * sizeof(float));
    for (int i = 0; i < runs.count; ++i) add_run(t, runs.begin[i], runs.end[i], scores);
    for (int r = 0; r < t.rows; ++r) mend(t, r, runs, scores + r * kSpan, masked ? bias + r * kSpan : nullptr);
  }
};

template <class V>
void loops_attend_few(const AttentionTile& t) {
  if (t.type == CacheType::kF32) AttendFew<V, CacheType::kF32>::run(t);
  else if (t.type == CacheType::kBF16) AttendFew<V, CacheType::kBF16>::run(t);
  else if (t.type == CacheType::kF16) AttendFew<V, CacheType::kF16>::run(t);
  else AttendFew<V, CacheType::kInt8>::run(t);
}

}  // namespace
}  // namespace torch_int4
