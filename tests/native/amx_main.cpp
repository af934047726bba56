// The software tiles of emulated/amx.h by themselves.
//
//   amx_main          every product of bytes and of bfloat16 numbers, on all shapes of tiles, against plain loops
//   amx_main RULE     breaks that rule of the architecture, which must end the program; amx_main --rules lists them
#include <initializer_list>

#include "emulated/amx.h"

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 += 1 x 2: `rows` x `columns` sums of `depth` elements of 4 bytes.
Config shape(int rows, int columns, int depth) {
  Config config;
  const int sizes[3][2] = {{rows, columns}, {rows, depth}, {depth, columns}};
  for (int t = 0; t < 3; ++t) {
    config.rows[t] = uint8_t(sizes[t][0]);
    config.row_bytes[t] = uint16_t(4 * sizes[t][1]);
  }
  return config;
}

uint8_t a[16][64], b[16][64];

void load(const Config& config) {
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_loadd(1, a, 64);
  _tile_loadd(2, b, 64);
}

void broken_rule(const char* name) {
  Config config = shape(4, 4, 4);
  int32_t sums[16][16];
  const auto is = [name](const char* rule) { return !strcmp(name, rule); };
  if (is("configured")) _tile_zero(0);
  if (is("released")) load(config), _tile_release(), _tile_stored(0, sums, 64);
  if (is("palette")) config.palette = 2, _tile_loadconfig(&config);
  if (is("reserved")) config.reserved[13] = 1, _tile_loadconfig(&config);
  if (is("too many rows")) config.rows[1] = 17, _tile_loadconfig(&config);
  if (is("half a size")) config.rows[2] = 0, _tile_loadconfig(&config);
  if (is("tile 8")) config.rows[8] = 1, config.row_bytes[8] = 4, _tile_loadconfig(&config);
  if (is("tile without rows")) load(config), _tile_loadd(3, a, 64);
  if (is("rows")) config.rows[1] = 5, load(config), _tile_dpbsud(0, 1, 2);
  if (is("columns")) config.row_bytes[2] = 20, load(config), _tile_dpbsud(0, 1, 2);
  if (is("depth")) config.rows[2] = 5, load(config), _tile_dpbf16ps(0, 1, 2);
  if (is("elements")) config.row_bytes[1] = 18, load(config), _tile_dpbsud(0, 1, 2);
  if (is("same tile")) load(config), _tile_dpbsud(0, 1, 1);
}

constexpr const char* kRules[] = {"configured",  "released", "palette",           "reserved", "too many rows",
                                  "half a size", "tile 8",   "tile without rows", "rows",     "columns",
                                  "depth",       "elements", "same tile"};

// The sums that tile 0 holds must be `expected(m, n)`; everything around them must be untouched.
template <class T, class Expected>
int differences(const char* name, int rows, int columns, Expected expected) {
  T sums[17][16];
  memset(sums, 0x55, sizeof sums);
  T untouched;
  memset(&untouched, 0x55, sizeof untouched);
  _tile_stored(0, sums, 64);
  int wrong = 0;
  for (int m = 0; m < 17; ++m) {
    for (int n = 0; n < 16; ++n) {
      const T value = m < rows && n < columns ? expected(m, n) : untouched;
      wrong += memcmp(&value, &sums[m][n], sizeof value) != 0;
    }
  }
  if (wrong) printf("FAILED %s: %d of %d x %d sums\n", name, wrong, rows, columns);
  return wrong;
}

template <class A, class B>
auto bytes(int depth) {
  return [depth](int m, int n) {
    int64_t sum = 0;
    for (int k = 0; k < 4 * depth; ++k) sum += int(A(a[m][k])) * int(B(b[k / 4][4 * n + k % 4]));
    return int32_t(sum);
  };
}

float bfloat16(const uint8_t* bytes) {
  const uint32_t bits = uint32_t(bytes[0]) << 16 | uint32_t(bytes[1]) << 24;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Small integers as bfloat16 numbers: their products and sums are exact in any order.
void fill_bfloat16(uint8_t (&tile)[16][64]) {
  for (auto& row : tile) {
    for (int i = 0; i < 64; i += 2) {
      const float value = float(row[i] % 17) - 8;
      uint32_t bits;
      memcpy(&bits, &value, 4);
      row[i] = uint8_t(bits >> 16);
      row[i + 1] = uint8_t(bits >> 24);
    }
  }
}

int check_shape(int rows, int columns, int depth, uint32_t& random) {
  int wrong = 0;
  for (auto* tile : {&a, &b}) {
    for (auto& row : *tile) {
      for (auto& byte : row) byte = uint8_t((random = random * 1664525 + 1013904223) >> 24);
    }
  }
  const Config config = shape(rows, columns, depth);
  load(config), _tile_dpbssd(0, 1, 2);
  wrong += differences<int32_t>("tdpbssd", rows, columns, bytes<int8_t, int8_t>(depth));
  load(config), _tile_dpbsud(0, 1, 2);
  wrong += differences<int32_t>("tdpbsud", rows, columns, bytes<int8_t, uint8_t>(depth));
  load(config), _tile_dpbusd(0, 1, 2);
  wrong += differences<int32_t>("tdpbusd", rows, columns, bytes<uint8_t, int8_t>(depth));
  load(config), _tile_dpbuud(0, 1, 2), _tile_dpbuud(0, 1, 2);
  wrong += differences<int32_t>("tdpbuud twice", rows, columns,
                                [=](int m, int n) { return 2 * bytes<uint8_t, uint8_t>(depth)(m, n); });
  fill_bfloat16(a), fill_bfloat16(b);
  load(config), _tile_dpbf16ps(0, 1, 2);
  return wrong + differences<float>("tdpbf16ps", rows, columns, [=](int m, int n) {
           float sum = 0;
           for (int k = 0; k < 2 * depth; ++k) sum += bfloat16(a[m] + 2 * k) * bfloat16(b[k / 2] + 4 * n + k % 2 * 2);
           return sum;
         });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !strcmp(argv[1], "--rules")) {
    for (const char* rule : kRules) puts(rule);
    return 0;
  }
  if (argc > 1) return broken_rule(argv[1]), 0;
  uint32_t random = 1;
  int wrong = 0;
  for (int rows = 1; rows <= 16; ++rows) {
    for (int columns = 1; columns <= 16; ++columns) {
      for (int depth = 1; depth <= 16; ++depth) wrong += check_shape(rows, columns, depth, random);
    }
  }
  printf("%d wrong\n", wrong);
  return wrong != 0;
}
