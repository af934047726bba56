#include "framework/codebooks.h"

#include <math.h>

namespace torch_int4 {
namespace {

// Codes are values / step, rounded to int8, plus 128.
Codebook make(const float (&values)[16], float step) {
  Codebook book{};
  book.step = step;
  for (int i = 0; i < 16; ++i) {
    const int code = int(lrintf(values[i] / step)) + 128;
    book.values[i] = values[i];
    book.codes[i] = uint8_t(code);
    book.weights[i] = int8_t(code - 128);
  }
  return book;
}

}  // namespace

// NormalFloat4 of QLoRA (arXiv 2305.14314, appendix E): quantiles of the normal distribution, scaled to [-1, 1]. In
// int8 they are off by at most 0.4 % of the largest; compute="fp32" and "bf16" use them as they are.
const Codebook kNf4 = make(
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    1.0f / 127);

// E2M1 of the OCP Microscaling formats: sign, two bits of exponent, one of mantissa. Exact in halves.
const Codebook kFp4 =
    make({0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -0.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f}, 0.5f);

// The FP4 of bitsandbytes: multiples of 1/192, which bytes cannot hold. In steps of 1/96 only the smallest value is
// off, by 0.5 % of the largest; compute="fp32" and "bf16" use all as they are.
const Codebook kBnbFp4 = make({0.f, 1.f / 192, 2.f / 3, 1.f, 1.f / 3, 1.f / 2, 1.f / 6, 1.f / 4,  //
                               -0.f, -1.f / 192, -2.f / 3, -1.f, -1.f / 3, -1.f / 2, -1.f / 6, -1.f / 4},
                              1.f / 96);

// The values of IQ4_NL and IQ4_XS (ggml-common.h), which are int8 numbers.
const Codebook kIq4Nl = make({-127.f, -104.f, -83.f, -65.f, -49.f, -35.f, -22.f, -10.f,  //
                              1.f, 13.f, 25.f, 38.f, 53.f, 69.f, 89.f, 113.f},
                             1.f);

}  // namespace torch_int4
