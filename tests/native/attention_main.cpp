// Attention and the cache of every kernel set that runs on this processor against the scalar reference, without torch,
// with an unmapped page right before or right behind every buffer.
//
//   attention_main [--small | --tiny]
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

#include "framework/attention.h"
#include "framework/dispatch.h"
#include "guarded.h"
#include "kernels/scalar.h"

using namespace torch_int4;

namespace {

struct Case {
  int64_t batch, tokens, heads, kv_heads, dim, value_dim, length;
  CacheType type;
  DType dtype;
  MaskType mask;
  bool causal;
  int64_t window;
  float softcap;
  bool slopes, bad;  // bad: a value that some rows may not see is NaN
};

std::string describe(const Case& c) {
  char text[200];
  snprintf(text, sizeof text,
           "B=%d T=%d H=%d/%d D=%d/%d n=%d cache=%d dtype=%d mask=%d causal=%d window=%d cap=%g "
           "slopes=%d bad=%d",
           int(c.batch), int(c.tokens), int(c.heads), int(c.kv_heads), int(c.dim), int(c.value_dim), int(c.length),
           int(c.type), int(c.dtype), int(c.mask), c.causal, int(c.window), double(c.softcap), c.slopes, c.bad);
  return text;
}

int cache_bytes(CacheType type) { return type == CacheType::kF32 ? 4 : type == CacheType::kInt8 ? 1 : 2; }
int mask_bytes(MaskType type) { return type == MaskType::kBool ? 1 : type == MaskType::kF32 ? 4 : 2; }
DType cache_float(CacheType type) {
  return type == CacheType::kF32 ? DType::kF32 : type == CacheType::kBF16 ? DType::kBF16 : DType::kF16;
}
DType mask_float(MaskType type) {
  return type == MaskType::kF32 ? DType::kF32 : type == MaskType::kBF16 ? DType::kBF16 : DType::kF16;
}

// Two uneven parts, as two threads would get them.
void two_parts(int64_t count, int64_t, ParallelBody body, void* context) {
  body(context, 0, count / 3);
  body(context, count / 3, count);
}

// The operands of one case in guarded memory; `attend` and `append` run the kernel set in use.
class Problem {
 public:
  Problem(const Case& c, bool at_end)
      : case_(c),
        bytes_(element_bytes(c.dtype)),
        tokens_(c.batch * c.kv_heads * c.length),
        query_(size_t(c.batch * c.tokens * c.heads * c.dim * bytes_), at_end),
        keys_(size_t(tokens_ * c.dim * cache_bytes(c.type)), at_end),
        values_(size_t(tokens_ * c.value_dim * cache_bytes(c.type)), at_end),
        key_scales_(size_t(tokens_ * 4), at_end),
        value_scales_(size_t(tokens_ * 4), at_end),
        mask_(size_t(c.batch * c.tokens * c.length * mask_bytes(c.mask)), at_end),
        slopes_(size_t(c.heads * 4), at_end),
        output_(size_t(c.batch * c.tokens * c.heads * (c.dim > c.value_dim ? c.dim : c.value_dim) * bytes_), at_end),
        new_keys_(size_t(c.batch * c.tokens * c.kv_heads * c.dim * bytes_), at_end),
        new_values_(size_t(c.batch * c.tokens * c.kv_heads * c.value_dim * bytes_), at_end),
        cos_(size_t(c.batch * c.tokens * (c.dim / 2) * bytes_), at_end),
        sin_(size_t(c.batch * c.tokens * (c.dim / 2) * bytes_), at_end) {
    fill();
  }

  std::vector<char> attend() {
    const Case& c = case_;
    Attention a{};
    a.batch = c.batch;
    a.tokens = c.tokens;
    a.kv_heads = c.kv_heads;
    a.length = c.length;
    a.query = view(query_, c.heads, c.dim);
    a.type = c.type;
    a.keys = keys_view(keys_, key_scales_, c.dim);
    a.values = keys_view(values_, value_scales_, c.value_dim);
    a.mask_type = c.mask;
    a.mask = c.mask == MaskType::kNone ? nullptr : mask_.as<char>();
    a.mask_batch_stride = c.tokens * c.length;
    a.mask_token_stride = c.length;
    a.slopes = c.slopes ? slopes_.as<float>() : nullptr;
    a.scale = 1 / sqrtf(float(c.dim));
    a.softcap = c.softcap;
    a.causal = c.causal;
    a.window = c.window;
    a.output = output_.as<char>();
    const size_t size = size_t(c.batch * c.tokens * c.heads * c.value_dim * bytes_);
    memset(a.output, 0xee, size);
    attention(a, two_parts);
    return {output_.as<char>(), output_.as<char>() + size};
  }

  // The rotated query and both caches after the last tokens were written into them.
  std::vector<char> append() {
    const Case& c = case_;
    RotaryAppend a{};
    a.batch = c.batch;
    a.tokens = c.tokens < c.length ? c.tokens : c.length;
    a.capacity = c.length;
    a.length = c.length - a.tokens;
    a.query = view(query_, c.heads, c.dim);
    a.key = view(new_keys_, c.kv_heads, c.dim);
    a.value = view(new_values_, c.kv_heads, c.value_dim);
    a.cos = cos_.as<char>();
    a.sin = sin_.as<char>();
    a.angle_type = c.dtype;
    a.rotary_dim = c.dim / 2 * 2;
    a.cos_token_stride = a.sin_token_stride = c.dim / 2;
    a.cos_batch_stride = a.sin_batch_stride = c.tokens * (c.dim / 2);
    a.interleaved = c.heads % 2 == 0;
    a.type = c.type;
    a.key_cache = {keys_.as<char>(), c.type == CacheType::kInt8 ? key_scales_.as<float>() : nullptr};
    a.value_cache = {values_.as<char>(), c.type == CacheType::kInt8 ? value_scales_.as<float>() : nullptr};
    a.rotated = output_.as<char>();
    rotary_append(a, two_parts);
    std::vector<char> all;
    const auto add = [&](Guarded& memory, int64_t bytes) {
      all.insert(all.end(), memory.as<char>(), memory.as<char>() + bytes);
    };
    add(output_, c.batch * a.tokens * c.heads * c.dim * bytes_);
    add(keys_, tokens_ * c.dim * cache_bytes(c.type));
    add(values_, tokens_ * c.value_dim * cache_bytes(c.type));
    if (c.type == CacheType::kInt8) add(key_scales_, tokens_ * 4), add(value_scales_, tokens_ * 4);
    return all;
  }

 private:
  HeadsView view(Guarded& memory, int64_t heads, int64_t dim) {
    return {memory.as<char>(), case_.dtype, heads, dim, case_.tokens * heads * dim, heads * dim, dim};
  }
  KeysView keys_view(Guarded& memory, Guarded& scales, int64_t dim) {
    const int64_t n = case_.length;
    return {memory.as<char>(),
            dim,
            case_.kv_heads * n * dim,
            n * dim,
            dim,
            case_.type == CacheType::kInt8 ? scales.as<float>() : nullptr,
            case_.kv_heads * n,
            n};
  }

  void fill_floats(Guarded& memory, DType dtype, int64_t count) {
    for (int64_t i = 0; i < count; ++i) store_element(memory.as<char>(), dtype, i, random_.normal());
  }
  void fill_cache(Guarded& memory, Guarded& scales, int64_t dim) {
    for (int64_t i = 0; i < tokens_; ++i) scales.as<float>()[i] = 0.01f + 0.001f * random_.normal();
    if (case_.type != CacheType::kInt8) return fill_floats(memory, cache_float(case_.type), tokens_ * dim);
    for (int64_t i = 0; i < tokens_ * dim; ++i) memory.as<int8_t>()[i] = int8_t(int(random_.next() >> 9) % 255 - 127);
  }
  void fill() {
    const Case& c = case_;
    fill_floats(query_, c.dtype, c.batch * c.tokens * c.heads * c.dim);
    fill_floats(new_keys_, c.dtype, c.batch * c.tokens * c.kv_heads * c.dim);
    fill_floats(new_values_, c.dtype, c.batch * c.tokens * c.kv_heads * c.value_dim);
    fill_floats(cos_, c.dtype, c.batch * c.tokens * (c.dim / 2));
    fill_floats(sin_, c.dtype, c.batch * c.tokens * (c.dim / 2));
    fill_cache(keys_, key_scales_, c.dim);
    fill_cache(values_, value_scales_, c.value_dim);
    for (int64_t h = 0; h < c.heads; ++h) slopes_.as<float>()[h] = 1.f / float(2 << h);
    for (int64_t i = 0; i < c.batch * c.tokens * c.length; ++i) {
      const bool hidden = random_.next() % 3 == 0 || (i % c.length > 20 && i % c.length < 60);
      if (c.mask == MaskType::kBool) mask_.as<uint8_t>()[i] = !hidden;
      else if (c.mask != MaskType::kNone) {
        store_element(mask_.as<char>(), mask_float(c.mask), i, hidden ? -INFINITY : random_.normal());
      }
    }
    if (!c.bad) return;
    const int64_t i = c.length - 1;  // of the first kv head; only the last token sees it
    if (c.type == CacheType::kInt8) value_scales_.as<float>()[i] = NAN;
    else store_element(values_.as<char>(), cache_float(c.type), i * c.value_dim, NAN);
  }

  Case case_;
  int64_t bytes_, tokens_;
  Random random_;
  Guarded query_, keys_, values_, key_scales_, value_scales_, mask_, slopes_, output_, new_keys_, new_values_, cos_,
      sin_;
};

bool close(const std::vector<char>& a, const std::vector<char>& b, DType dtype) {
  const float tolerance = dtype == DType::kF32 ? 1e-4f : dtype == DType::kF16 ? 4e-3f : 3e-2f;
  for (int64_t i = 0; i < int64_t(a.size()) / element_bytes(dtype); ++i) {
    const float p = load_element(a.data(), dtype, i), q = load_element(b.data(), dtype, i);
    if (isnan(p) != isnan(q)) return false;
    if (fabsf(p - q) > tolerance * (1 + fabsf(q))) return false;
  }
  return true;
}

int failures = 0, passed = 0;

void check(bool ok, const char* what, const char* kernels, const Case& c) {
  ok ? ++passed : ++failures;
  if (!ok && failures < 20) printf("FAILED %s: %s %s\n", kernels, what, describe(c).c_str());
}

void run_case(const Case& c, const std::vector<std::string>& sets) {
  for (int at_end = 0; at_end < 2; ++at_end) {
    select_kernels("reference");
    const std::vector<char> expected = Problem(c, at_end).attend();
    const std::vector<char> appended = Problem(c, at_end).append();
    for (const auto& set : sets) {
      select_kernels(set);
      Problem problem(c, at_end);
      const std::vector<char> y = problem.attend();
      check(close(y, expected, c.dtype), "attention differs from the reference", set.c_str(), c);
      check(problem.attend() == y || c.bad, "attention is not the same bits again", set.c_str(), c);
      check(problem.append() == appended || c.bad, "the cache differs from the reference", set.c_str(), c);
    }
  }
}

std::vector<Case> cases(bool small) {
  const int64_t dims[][2] = {{64, 64}, {20, 33}, {80, 80}, {33, 17}, {128, 128}, {1, 5}, {96, 48}, {256, 256}};
  const int64_t heads[][2] = {{1, 1}, {4, 2}, {2, 2}, {6, 1}, {20, 1}};
  const int64_t tokens[] = {1, 2, 5, 17, 33, 130}, lengths[] = {1, 16, 63, 129, 530, 2100};
  std::vector<Case> all;
  int turn = 0;
  for (int type = 0; type < 4; ++type) {
    for (int mask = 0; mask < 5; ++mask) {
      for (int i = 0; i < (small ? 3 : 12); ++i, ++turn) {
        const auto* dim = dims[size_t(turn) % (small ? 6 : 8)];
        const auto* h = heads[size_t(turn / 2) % 5];
        const int64_t t = tokens[size_t(turn * 5 + turn / 6) % (small ? 5 : 6)];
        int64_t n = lengths[size_t(turn * 7 + turn / 5) % (small ? 4 : 6)];
        if (n < t) n = t;
        all.push_back({1 + turn % 2, t, h[0], h[1], dim[0], dim[1], n, CacheType(type), DType(turn % 3), MaskType(mask),
                       turn % 3 != 0, turn % 4 == 1 ? 30 : 0, turn % 5 == 2 ? 5.f : 0.f, turn % 7 == 3, turn % 6 == 5});
      }
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  bool small = false, tiny = false;
  for (int i = 1; i < argc; ++i) {
    tiny |= !strcmp(argv[i], "--tiny");
    small |= tiny || !strcmp(argv[i], "--small");
  }
  const std::vector<std::string> sets = kernel_names(true);
  printf("run here:");
  for (const auto& name : sets) printf(" %s", name.c_str());
  printf("\n");
  int turn = 0;
  for (const Case& c : cases(small)) {
    if (!tiny || turn++ % 3 == 0) run_case(c, sets);
  }
  printf("%d passed, %d failed\n", passed, failures);
  return failures != 0;
}
