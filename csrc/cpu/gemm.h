// A register-blocked product over packed panels, with whatever epilogue its caller writes:
//
//   acc[m][v] += sum over segments s, k < s.length:  a[m * am + s.a + k * ak] * b[s.b + k * ldb + lane v]
//
// A tile is MR rows by NV vectors of columns. Segments make it a convolution (one per run of taps), a weight gradient (one
// per row of positions) or a plain product (one). Per k, NV loads of b serve MR * NV fused multiply-adds, so from MR = 6 on
// the panel may stream from the second-level cache. Bound by the FMA rate; b read once per tile.
#pragma once

#include <stdlib.h>

#include <algorithm>
#include <exception>
#include <new>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef GENFAST_SANITIZED
#include <sanitizer/asan_interface.h>
#endif

#include "transpose.h"
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

// ---- a whole product: out (rows, columns) = end(sum over k of a[row, k] b[k, column]) ----

template <class T>
struct Strided {  // element (i, j) at data + i * row + j * column; one of the two is 1
  const T* data;
  int64_t row, column;
};

constexpr int64_t kInner = 512;          // terms between two visits of an output: a panel of them lies in the second-level cache
constexpr int64_t kPanelTiles = 8;       // tiles for which packing a panel again is still cheap, in another thread
constexpr int64_t kPacked = 4 << 20;     // elements of a that are packed at once
constexpr int64_t kRowsCache = 256 << 10;  // bytes of a b that is packed whole

GENFAST_INLINE int64_t inner_runs(int64_t inner) { return std::max<int64_t>(1, (inner + kInner - 1) / kInner); }

// Scratch that a thread keeps from call to call: fresh memory costs more than the packing.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* get(int64_t elements) {
    if (elements < 0 || elements > INT64_MAX / int64_t(sizeof(T)) - 64) throw std::bad_alloc();
    const size_t bytes = (size_t(elements) * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      release();
      data_ = aligned_alloc(64, bytes);
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  void release() {
    free(data_);
    data_ = nullptr, size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

template <class T>
struct Slices {  // as many elements for each thread of a team, whole cache lines apart
  T* data;
  int64_t stride;

  // Of the thread that calls.
  T* get() const {
#ifdef _OPENMP
    return data + omp_get_thread_num() * stride;
#else
    return data;
#endif
  }
};

// Scratch for a team of threads. The thread that starts the team keeps it from call to call, and gets it before the parallel
// region: an exception that left a region would end the process.
class TeamScratch {
 public:
  template <class T>
  Slices<T> get(int threads, int64_t elements) {
    constexpr int64_t line = 128 / int64_t(sizeof(T));
    const int64_t team = std::max(1, threads);
    if (elements < 0 || elements > INT64_MAX / (int64_t(sizeof(T)) * team) - 4 * line) throw std::bad_alloc();
    const Slices<T> slices{nullptr, (elements + line - 1) / line * line};
#ifdef GENFAST_SANITIZED
    all_.release();  // so that the sanitizer sees the first element beyond a slice, and none is poisoned from before
#endif
    T* data = all_.get<T>(slices.stride * team);
#ifdef GENFAST_SANITIZED
    for (int64_t t = 0; t < team; ++t)
      ASAN_POISON_MEMORY_REGION(data + t * slices.stride + elements, size_t(slices.stride - elements) * sizeof(T));
#endif
    return {data, slices.stride};
  }

 private:
  Scratch all_;
};

// The first exception of the tasks of a parallel region, which must not leave the region: each task runs by `run`, and after
// the region `rethrow` throws the exception on the thread that started the team.
class TaskFailure {
 public:
  template <class Task>
  void run(const Task& task) noexcept {
    try {
      task();
    } catch (...) {
#pragma omp critical(genfast_task_failure)
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::exception_ptr first_;
};

// b[k0 .. k0 + count, first .. first + width) as (k, column), zeros beyond the last column.
template <class T>
static inline void pack_columns(const Strided<T>& b, int64_t k0, int64_t count, int64_t first, int64_t columns, int64_t width,
                                T* panel) {
  const int64_t live = std::min(width, columns - first);
  if (live < width)
    for (int64_t k = 0; k < count; ++k)
      for (int64_t j = live; j < width; ++j) panel[k * width + j] = T(0);
  if (b.column == 1) {
    const T* from = b.data + k0 * b.row + first;
    if (live == block_columns<T>())
      for (int64_t k = 0; k < count; ++k) memcpy(panel + k * width, from + k * b.row, size_t(block_columns<T>()) * sizeof(T));
    else
      for (int64_t k = 0; k < count; ++k) memcpy(panel + k * width, from + k * b.row, size_t(live) * sizeof(T));
  } else {
    transpose(b.data + k0 + first * b.column, b.column, live, count, panel, width);
  }
}

// a[first .. first + height, k0 .. k0 + count) as (k, row), for a whose rows are not contiguous.
template <class T>
static inline void pack_rows(const Strided<T>& a, int64_t k0, int64_t count, int64_t first, int64_t height, T* tile) {
  const T* from = a.data + k0 * a.column + first;
  if (height == kMaxRows)
    for (int64_t k = 0; k < count; ++k) memcpy(tile + k * kMaxRows, from + k * a.column, kMaxRows * sizeof(T));
  else
    for (int64_t k = 0; k < count; ++k) memcpy(tile + k * height, from + k * a.column, size_t(height) * sizeof(T));
}


template <class T>
struct Aside {  // a tile of accumulators from zero to a buffer: what follows the sum keeps no register of the kernel's
  T* buffer;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] = Vec<T>{};
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) store(buffer + (m * NV + v) * lanes<T>(), acc[m][v]);
  }
};

template <class T>
static __attribute__((noinline)) void run_aside(int64_t height, int64_t nv, T* buffer, const T* left, int64_t am, int64_t ak,
                                                const T* panel, int64_t count) {
  const Segment segment{0, 0, count};
  run<T>(height, nv, Aside<T>{buffer}, left, am, ak, &segment, 1, panel, nv * lanes<T>());
}

struct Place {  // of a tile in the output, and of its run of terms in the sum
  int64_t row, height, column, width;  // width: of the tile; the output may end before
  bool first, last;
};

// One run of terms of a tile: added to what the output holds of the runs before; the last goes through `end`.
template <class T, class End>
static inline void run_part(const Place& at, int64_t columns, const T* left, int64_t am, int64_t ak, const T* panel,
                            int64_t count, T* out, int64_t ld, const End& end) {
  alignas(64) T tile[kMaxRows * block_columns<T>()];
  const int64_t live = std::min(at.width, columns - at.column);
  run_aside<T>(at.height, at.width / lanes<T>(), tile, left, am, ak, panel, count);
  out += at.row * ld + at.column;
  if (!at.first)
    for (int64_t m = 0; m < at.height; ++m)
      for (int64_t j = 0; j < live; ++j) tile[m * at.width + j] += out[m * ld + j];
  if (at.last) {
    end(tile, at.row, at.height, at.column, at.width);
    return;
  }
  for (int64_t m = 0; m < at.height; ++m) memcpy(out + m * ld, tile + m * at.width, size_t(live) * sizeof(T));
}

// In both, `end(tile, row, height, column, width)` takes the finished sums of a tile (height, width) and stores the output.

// A b that fits the second-level cache beside a tile of a: all its panels are packed first, then each thread takes rows, whose
// outputs it writes from end to end.
template <class T, class End>
void product_by_rows(int64_t rows, int64_t columns, int64_t inner, const Strided<T>& a, const Strided<T>& b, T* out, int64_t ld,
                     int threads, const End& end) {
  constexpr int64_t block = block_columns<T>();
  const int64_t runs = inner_runs(inner), longest = (inner + runs - 1) / runs, down = tiles(rows);
  const int64_t across = (columns + block - 1) / block, share = std::max<int64_t>(1, std::min<int64_t>(8, down / (4 * threads)));
  static thread_local Scratch scratch;
  static thread_local TeamScratch team;
  T* panels = scratch.get<T>(across * block * longest);
  const bool direct = a.column == 1;
  const Slices<T> own = team.get<T>(threads, direct ? 0 : kMaxRows * longest);
#pragma omp parallel num_threads(threads)
  {
    T* packed = direct ? nullptr : own.get();
    for (int64_t run_ = 0; run_ < runs; ++run_) {
      const int64_t k0 = inner * run_ / runs, count = inner * (run_ + 1) / runs - k0;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < across; ++p)
        pack_columns(b, k0, count, p * block, columns, std::min(block, padded<T>(columns - p * block)), panels + p * block * longest);
#pragma omp for schedule(dynamic, share)
      for (int64_t tile = 0; tile < down; ++tile) {
        const int64_t row = tile_start(rows, tile), height = tile_start(rows, tile + 1) - row;
        if (packed) pack_rows(a, k0, count, row, height, packed);
        const T* left = packed ? packed : a.data + row * a.row + k0;
        for (int64_t p = 0; p < across; ++p)
          run_part({row, height, p * block, std::min(block, padded<T>(columns - p * block)), run_ == 0, run_ + 1 == runs}, columns,
                   left, packed ? 1 : a.row, packed ? height : 1, panels + p * block * longest, count, out, ld, end);
      }
    }
  }
}

// Otherwise panels of b are packed by the thread that uses them, just before; a is read as it lies where its rows are
// contiguous and packed where they are not. A task has at least eight columns, so that no two share a byte of one bit a column.
template <class T, class End>
void product_by_columns(int64_t rows, int64_t columns, int64_t inner, const Strided<T>& a, const Strided<T>& b, T* out, int64_t ld,
                        int threads, const End& end) {
  constexpr int64_t block = block_columns<T>(), group = block < 8 ? 8 / block : 1;
  const bool direct = a.column == 1;
  const int64_t runs = inner_runs(inner), longest = (inner + runs - 1) / runs, down = tiles(rows);
  const int64_t across = (columns + block * group - 1) / (block * group);
  const int64_t wanted = across % threads && across < 8 * threads ? (4 * threads + across - 1) / across : 1;
  const int64_t pieces = std::max<int64_t>(1, std::min(wanted, down / kPanelTiles));
  const int64_t at_once = direct ? down : std::max<int64_t>(1, std::min(down, kPacked / (kMaxRows * std::max<int64_t>(1, longest))));
  static thread_local Scratch scratch;
  static thread_local TeamScratch team;
  T* packed = direct ? nullptr : scratch.get<T>(at_once * kMaxRows * longest);
  const Slices<T> own = team.get<T>(threads, longest * block);
#pragma omp parallel num_threads(threads)
  {
    T* panel = own.get();
    for (int64_t run_ = 0; run_ < runs; ++run_) {
      const int64_t k0 = inner * run_ / runs, count = inner * (run_ + 1) / runs - k0;
      for (int64_t base = 0; base < down; base += at_once) {
        const int64_t stop = std::min(down, base + at_once);
        if (!direct) {
#pragma omp for schedule(static)
          for (int64_t tile = base; tile < stop; ++tile) {
            const int64_t row = tile_start(rows, tile), height = tile_start(rows, tile + 1) - row;
            pack_rows(a, k0, count, row, height, packed + (tile - base) * kMaxRows * longest);
          }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < across * pieces; ++task) {
          const int64_t from = base + (stop - base) * (task % pieces) / pieces;
          const int64_t to = base + (stop - base) * (task % pieces + 1) / pieces;
          for (int64_t g = 0; g < group; ++g) {
            const int64_t column = (task / pieces * group + g) * block;
            if (column >= columns) break;
            const int64_t width = std::min(block, padded<T>(columns - column));
            pack_columns(b, k0, count, column, columns, width, panel);
            for (int64_t tile = from; tile < to; ++tile) {
              const int64_t row = tile_start(rows, tile), height = tile_start(rows, tile + 1) - row;
              const T* left = direct ? a.data + row * a.row + k0 : packed + (tile - base) * kMaxRows * longest;
              run_part({row, height, column, width, run_ == 0, run_ + 1 == runs}, columns, left, direct ? a.row : 1,
                       direct ? 1 : height, panel, count, out, ld, end);
            }
          }
        }
      }
    }
  }
}

// The tiles and the order of each sum depend on the sizes alone, neither on the threads nor on which of the two it is.
template <class T, class End>
void product(int64_t rows, int64_t columns, int64_t inner, const Strided<T>& a, const Strided<T>& b, T* out, int64_t ld,
             int threads, const End& end) {
  if (!rows || !columns) return;
  const int64_t runs = inner_runs(inner), longest = (inner + runs - 1) / runs;
  if (longest * columns * int64_t(sizeof(T)) <= kRowsCache && tiles(rows) >= 4 * threads)
    product_by_rows(rows, columns, inner, a, b, out, ld, threads, end);
  else
    product_by_columns(rows, columns, inner, a, b, out, ld, threads, end);
}

// ---- a matrix times its own transpose: the lower triangle of  sum over k of f[i, k] f[j, k], f (rows, inner) ----

// Panels of block_columns() rows of f, each (k, row): one packing serves both sides.
template <class T>
struct Panels {
  T* data;
  int64_t rows, longest;  // terms that there is room for

  int64_t count() const { return (rows + block_columns<T>() - 1) / block_columns<T>(); }
  int64_t width(int64_t p) const { return std::min(block_columns<T>(), padded<T>(rows - p * block_columns<T>())); }
  int64_t live(int64_t p) const { return std::min(block_columns<T>(), rows - p * block_columns<T>()); }
  T* at(int64_t p) const { return data + p * block_columns<T>() * longest; }
  static int64_t elements(int64_t rows, int64_t longest) { return padded<T>(rows) * longest; }
};

// f[first .. , k0 .. k0 + count) of panel p, `shift` added. Rows of f are read a vector of them at a time, since more would be
// more streams than the processor fetches ahead.
template <class T>
static inline void pack_panel(const Panels<T>& panels, int64_t p, const Strided<T>& f, int64_t k0, int64_t count, T shift) {
  const int64_t first = p * block_columns<T>(), width = panels.width(p), live = panels.live(p);
  T* to = panels.at(p);
  if (f.row == 1) {
    pack_columns<T>({f.data, f.column, 1}, k0, count, first, panels.rows, width, to);
  } else {
    for (int64_t k = 0; live < width && k < count; ++k)
      for (int64_t j = live; j < width; ++j) to[k * width + j] = T(0);
    for (int64_t r = 0; r < live; r += lanes<T>())
      transpose(f.data + (first + r) * f.row + k0, f.row, std::min<int64_t>(lanes<T>(), live - r), count, to + r, width);
  }
  if (shift != T(0))
    for (int64_t i = 0; i < count * width; i += lanes<T>()) store(to + i, load(to + i) + shift);
}

template <class T>
struct Onto {  // a tile of accumulators from zero, added to what the sums hold: long sums of one sign lose little so
  T* sums;
  int64_t ld;
  bool first;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] = Vec<T>{};
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) {
        T* at = sums + m * ld + v * lanes<T>();
        store(at, first ? acc[m][v] : load(at) + acc[m][v]);
      }
  }
};

// Tiles [from, to) of the rows of panel q against panel p <= q, added to the sums (rows, ld = padded rows). On the diagonal a tile
// is as many vectors wide as its last row needs; what it computes above the diagonal is not to be used.
template <class T>
static __attribute__((noinline)) void triangle_tiles(const Panels<T>& panels, int64_t q, int64_t p, int64_t from, int64_t to,
                                                     int64_t count, T* sums, int64_t ld, bool first) {
  const Segment segment{0, 0, count};
  const int64_t live = panels.live(q), step = panels.width(q), start = q * block_columns<T>();
  for (int64_t tile = from; tile < to; ++tile) {
    const int64_t row = tile_start(live, tile), height = tile_start(live, tile + 1) - row;
    const int64_t nv = p < q ? kMaxVectors : vectors<T>(row + height);
    run<T>(height, nv, Onto<T>{sums + (start + row) * ld + p * block_columns<T>(), ld, first}, panels.at(q) + row, 1, step, &segment,
           1, panels.at(p), panels.width(p));
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
