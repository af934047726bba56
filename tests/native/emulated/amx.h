// AMX tiles in software, after chapter "Intel AMX" of Intel's Software Developer's Manual. Whatever makes the processor
// fault ends the program with a message. Tile numbers are template arguments because they are part of the instruction.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace emulated {

constexpr int kTiles = 8, kTileRows = 16, kTileBytes = 64;

struct Tile {
  int rows, row_bytes;
  uint8_t data[kTileRows][kTileBytes];
};

struct TileState {
  bool configured;
  Tile tiles[kTiles];
};

// The state belongs to the thread: what one thread configures, another one has not.
inline thread_local TileState tile_state{};

inline void tile_check(bool holds, const char* instruction, const char* reason) {
  if (holds) return;
  fprintf(stderr, "AMX emulation: %s: %s\n", instruction, reason);
  abort();
}

inline void tile_release() { tile_state = TileState{}; }

// 64 bytes: palette, start row, 14 reserved bytes, 16 words of bytes per row, 16 bytes of rows.
inline void tile_loadconfig(const void* source) {
  uint8_t config[64];
  memcpy(config, source, sizeof config);
  tile_release();
  if (config[0] == 0) return;
  const auto require = [](bool holds, const char* reason) { tile_check(holds, "ldtilecfg", reason); };
  require(config[0] == 1, "the palette is neither 0 nor 1");
  require(config[1] == 0, "the start row is for resuming after a fault: it must be 0 here");
  for (int i = 2; i < 16; ++i) require(config[i] == 0, "a reserved byte is not 0");
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + 16 + 2 * t, 2);
    const int rows = config[48 + t];
    require(t < kTiles || (!rows && !row_bytes), "there are 8 tiles");
    require(rows <= kTileRows && row_bytes <= kTileBytes, "a tile has at most 16 rows of 64 bytes");
    require(!rows == !row_bytes, "rows and bytes per row of a tile are both 0 or neither");
    if (t >= kTiles) continue;
    tile_state.tiles[t].rows = rows;
    tile_state.tiles[t].row_bytes = row_bytes;
  }
  tile_state.configured = true;
}

template <int kTile>
Tile& tile(const char* instruction) {
  static_assert(kTile >= 0 && kTile < kTiles, "there are 8 tiles");
  tile_check(tile_state.configured, instruction, "no tile configuration is loaded on this thread");
  tile_check(tile_state.tiles[kTile].rows > 0, instruction, "the tile has no rows in this configuration");
  return tile_state.tiles[kTile];
}

template <int kTile>
void tile_zero() {
  memset(tile<kTile>("tilezero").data, 0, sizeof Tile::data);
}

template <int kTile>
void tile_load(const void* source, int64_t stride) {
  Tile& target = tile<kTile>("tileloadd");
  for (int r = 0; r < target.rows; ++r) {
    memcpy(target.data[r], static_cast<const char*>(source) + r * stride, size_t(target.row_bytes));
  }
}

template <int kTile>
void tile_store(void* target, int64_t stride) {
  const Tile& source = tile<kTile>("tilestored");
  for (int r = 0; r < source.rows; ++r) {
    memcpy(static_cast<char*>(target) + r * stride, source.data[r], size_t(source.row_bytes));
  }
}

// sums[m][n] += a[m][k] * b[k][n] over 4-byte elements; Product adds one element's products to a sum.
template <int kSums, int kA, int kB, class Sum, class Product>
void tile_multiply(const char* instruction, Product product) {
  const auto require = [=](bool holds, const char* reason) { tile_check(holds, instruction, reason); };
  require(kSums != kA && kSums != kB && kA != kB, "the three tiles must differ");
  Tile &sums = tile<kSums>(instruction), &a = tile<kA>(instruction), &b = tile<kB>(instruction);
  require(sums.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "rows are not whole elements");
  require(sums.rows == a.rows, "the sums and the left tile differ in rows");
  require(sums.row_bytes == b.row_bytes, "the sums and the right tile differ in columns");
  require(a.row_bytes / 4 == b.rows, "columns of the left tile and rows of the right one differ");
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      Sum sum{};
      for (int k = 0; k < b.rows; ++k) product(sum, a.data[m] + 4 * k, b.data[k] + 4 * n);
      sum.add_to(sums.data[m] + 4 * n);
    }
  }
}

// Four products of bytes in wrapping 32-bit arithmetic.
struct ByteSum {
  uint32_t value = 0;
  void add_to(uint8_t* target) const {
    uint32_t sum;
    memcpy(&sum, target, 4);
    sum += value;
    memcpy(target, &sum, 4);
  }
};

template <int kSums, int kA, int kB, class A, class B>
void tile_multiply_bytes(const char* instruction) {
  tile_multiply<kSums, kA, kB, ByteSum>(instruction, [](ByteSum& sum, const uint8_t* a, const uint8_t* b) {
    for (int i = 0; i < 4; ++i) sum.value += uint32_t(int(A(a[i])) * int(B(b[i])));
  });
}

// Two products of bfloat16 numbers; even and odd ones have a sum each. Numbers below the normal range count as zero.
struct Bfloat16Sum {
  float even = 0, odd = 0;
  static float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
  static float load(const uint8_t* source) {
    const uint32_t bits = uint32_t(source[0]) << 16 | uint32_t(source[1]) << 24;
    float x;
    memcpy(&x, &bits, 4);
    return flush(x);
  }
  void add_to(uint8_t* target) const {
    float sum;
    memcpy(&sum, target, 4);
    sum = flush(flush(sum) + flush(even + odd));
    memcpy(target, &sum, 4);
  }
};

template <int kSums, int kA, int kB>
void tile_multiply_bfloat16() {
  tile_multiply<kSums, kA, kB, Bfloat16Sum>("tdpbf16ps", [](Bfloat16Sum& sum, const uint8_t* a, const uint8_t* b) {
    sum.even = Bfloat16Sum::flush(fmaf(Bfloat16Sum::load(a), Bfloat16Sum::load(b), sum.even));
    sum.odd = Bfloat16Sum::flush(fmaf(Bfloat16Sum::load(a + 2), Bfloat16Sum::load(b + 2), sum.odd));
  });
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbsud
#undef _tile_dpbusd
#undef _tile_dpbuud
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::tile_loadconfig(config)
#define _tile_release() emulated::tile_release()
#define _tile_zero(t) emulated::tile_zero<t>()
#define _tile_loadd(t, source, stride) emulated::tile_load<t>(source, stride)
#define _tile_stream_loadd(t, source, stride) emulated::tile_load<t>(source, stride)
#define _tile_stored(t, target, stride) emulated::tile_store<t>(target, stride)
#define _tile_dpbssd(c, a, b) emulated::tile_multiply_bytes<c, a, b, int8_t, int8_t>("tdpbssd")
#define _tile_dpbsud(c, a, b) emulated::tile_multiply_bytes<c, a, b, int8_t, uint8_t>("tdpbsud")
#define _tile_dpbusd(c, a, b) emulated::tile_multiply_bytes<c, a, b, uint8_t, int8_t>("tdpbusd")
#define _tile_dpbuud(c, a, b) emulated::tile_multiply_bytes<c, a, b, uint8_t, uint8_t>("tdpbuud")
#define _tile_dpbf16ps(c, a, b) emulated::tile_multiply_bfloat16<c, a, b>()
