// A register-blocked product over packed panels, with whatever epilogue its caller writes:
//
//   acc[m][v] += sum over segments s, k < s.length:  a[m * am + s.a + k * ak] * b[s.b + k * ldb + lane v]
//
// A tile is MR rows by NV vectors of columns. Segments make it a convolution (one per run of taps), a weight gradient (one
// per row of positions) or a plain product (one). Per k, NV loads of b serve MR * NV fused multiply-adds, so from MR = 6 on
// the panel may stream from the second-level cache. Bound by the FMA rate; b read once per tile.
#pragma once

#include <stdlib.h>

#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {

struct Segment {
  int64_t a, b, length;  // offsets in elements
};

// Accumulators, the row of b and one broadcast must fit the registers: 32 with AVX-512, 16 elsewhere.
constexpr int kMaxVectors = GENFAST_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kMaxRows = 6;

template <class T>
constexpr int64_t block_columns() {
  return kMaxVectors * lanes<T>();
}

template <class T>
GENFAST_INLINE int64_t vectors(int64_t columns) {
  return (columns + lanes<T>() - 1) / lanes<T>();
}

template <class T>
GENFAST_INLINE int64_t padded(int64_t columns) {
  return vectors<T>(columns) * lanes<T>();
}

template <class T, int MR, int NV>
GENFAST_INLINE void multiply(const T* a, int64_t am, int64_t ak, const Segment* segments, int64_t count, const T* b, int64_t ldb,
                             Vec<T> (&acc)[MR][NV]) {
  for (int64_t s = 0; s < count; ++s) {
    const T* left = a + segments[s].a;
    const T* right = b + segments[s].b;
    for (int64_t k = segments[s].length; k > 0; --k, left += ak, right += ldb) {
      Vec<T> row[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) row[v] = load(right + v * lanes<T>());
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec<T> x = splat(left[m * am]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
      }
    }
  }
}

// One row: two halves of each segment in turn, or the additions would wait for one another.
template <class T, int NV>
GENFAST_INLINE void multiply_row(const T* a, int64_t ak, const Segment* segments, int64_t count, const T* b, int64_t ldb,
                                 Vec<T> (&acc)[1][NV]) {
  Vec<T> other[NV] = {};
  for (int64_t s = 0; s < count; ++s) {
    const T* left = a + segments[s].a;
    const T* right = b + segments[s].b;
    int64_t k = segments[s].length;
    for (; k > 1; k -= 2, left += 2 * ak, right += 2 * ldb) {
      const Vec<T> x = splat(left[0]), z = splat(left[ak]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        acc[0][v] += x * load(right + v * lanes<T>());
        other[v] += z * load(right + ldb + v * lanes<T>());
      }
    }
    if (k) {
      const Vec<T> x = splat(left[0]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[0][v] += x * load(right + v * lanes<T>());
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) acc[0][v] += other[v];
}

// How `rows` are cut into tiles of nearly equal height, and a tile's first row.
GENFAST_INLINE int64_t tiles(int64_t rows) { return (rows + kMaxRows - 1) / kMaxRows; }
GENFAST_INLINE int64_t tile_start(int64_t rows, int64_t tile) { return rows * tile / tiles(rows); }

// A tile of a fixed height and width: `begin(acc)` sets the accumulators, `end(acc)` takes them.
template <class T, int MR, int NV, class Tile>
GENFAST_INLINE void run_tile(const Tile& tile, const T* a, int64_t am, int64_t ak, const Segment* segments, int64_t count,
                             const T* b, int64_t ldb) {
  Vec<T> acc[MR][NV];
  tile.template begin<MR, NV>(acc);
  if (MR == 1)
    multiply_row<T, NV>(a, ak, segments, count, b, ldb, reinterpret_cast<Vec<T>(&)[1][NV]>(acc));
  else
    multiply<T, MR, NV>(a, am, ak, segments, count, b, ldb, acc);
  tile.template end<MR, NV>(acc);
}

template <class T, int NV, class Tile>
GENFAST_INLINE void run_rows(int64_t rows, const Tile& tile, const T* a, int64_t am, int64_t ak, const Segment* segments,
                             int64_t count, const T* b, int64_t ldb) {
  switch (rows) {
    case 1: return run_tile<T, 1, NV>(tile, a, am, ak, segments, count, b, ldb);
    case 2: return run_tile<T, 2, NV>(tile, a, am, ak, segments, count, b, ldb);
    case 3: return run_tile<T, 3, NV>(tile, a, am, ak, segments, count, b, ldb);
    case 4: return run_tile<T, 4, NV>(tile, a, am, ak, segments, count, b, ldb);
    case 5: return run_tile<T, 5, NV>(tile, a, am, ak, segments, count, b, ldb);
    default: return run_tile<T, 6, NV>(tile, a, am, ak, segments, count, b, ldb);
  }
}

// At most kMaxRows rows and kMaxVectors vectors of columns.
template <class T, class Tile>
GENFAST_INLINE void run(int64_t rows, int64_t nv, const Tile& tile, const T* a, int64_t am, int64_t ak, const Segment* segments,
                        int64_t count, const T* b, int64_t ldb) {
#if GENFAST_VECTOR_BYTES == 64
  if (nv == 4) return run_rows<T, 4>(rows, tile, a, am, ak, segments, count, b, ldb);
  if (nv == 3) return run_rows<T, 3>(rows, tile, a, am, ak, segments, count, b, ldb);
#endif
  if (nv == 2) return run_rows<T, 2>(rows, tile, a, am, ak, segments, count, b, ldb);
  return run_rows<T, 1>(rows, tile, a, am, ak, segments, count, b, ldb);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
