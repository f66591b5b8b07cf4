// Sums of kernels over pairs of rows (MMD: Gretton et al., JMLR 13, 2012; KID: Binkowski et al. 1801.01401), and nearest rows:
//   sums      o_i = sum_j sum_s k_s(x_i, y_j)
//   gradient  dx_i = sum_j (g_i + h_j) 2 k'(d_ij) (x_i - y_j), or sum_j (g_i + h_j) k'(x_i.y_j) y_j for a polynomial
//   nearest   the k least d_ij = |x_i - y_j|^2 of each i and their j
//
// x (n, c), y (m, c), x itself where y is null. Columns y_j lie in packed panels; a tile of the product x y^T (gemm.h) is taken
// through the kernel where it lies, in the first cache, and summed: no array over pairs. d_ij = |x_i|^2 + |y_j|^2 - 2 x_i.y_j of
// rows less their common mean, at least 0; of few features, and of rows that are equal to rounding, the sum of squared differences,
// which cancels nothing. The gradient takes what such rows add from their differences too, and so nothing from a row itself. Of x with
// itself the sums need the tiles on and above the diagonal only, each pair counted for both rows.
// FLOPs: 2 n m c and some 20 a pair and scale (sums; half of both with itself), 4 n m c (gradient): bound by the FMA rate,
// for few features by the kernel's own arithmetic. Rows are added up in groups that depend on the sizes alone.
#include <limits>
#include <vector>

#include "dtype_switch.h"
#include "gemm.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kDirect = 16;        // features up to which differences, which cancel nothing, are faster too (at 32 they lose 5%)
constexpr int64_t kSumRows = 96;       // rows of a block of sums: a panel comes from far once for so many
constexpr int64_t kGradientRows = 48;  // whose weights, by kWeights columns, fit the second-level cache beside a panel
constexpr int64_t kChunk = 16;         // panels between two additions in float64
constexpr int64_t kGroups = 64;        // of blocks of x with itself, each with sums of its own
constexpr int64_t kSmall = 1 << 18;    // products of a batch entry that one thread takes whole
constexpr int64_t kSmallRows = 1 << 17;  // elements of x and y that one thread prepares before others would wake

enum Form { kDifferences, kNorms, kProducts };

template <class T>
constexpr int64_t weight_columns() {
  return 4 * block_columns<T>();
}

template <class T>
GENFAST_INLINE Mask<T> counting() {
  Mask<T> found;
  for (int i = 0; i < lanes<T>(); ++i) found[i] = i;
  return found;
}

// exp of x <= 0 or NaN.
template <class T>
GENFAST_INLINE Vec<T> exp_negative(Vec<T> x) {
  const Vec<T> y = exp_in_range<T>(x < Types<T>::kExpMin ? splat(Types<T>::kExpMin) : x);
  return x == x ? (x < Types<T>::kExpMin ? splat(T(0)) : y) : x;
}

template <class T, int kKernel>
struct Kernel {
  const T* scales;
  int64_t count, degree;
  T offset;

  // sum_s k_s of a squared distance, or of a product.
  GENFAST_INLINE_MEMBER Vec<T> value(Vec<T> a) const {
    Vec<T> total = splat(T(0));
    for (int64_t s = 0; s < count; ++s) {
      if (kKernel == PairwiseArgs::kRbf) total += exp_negative<T>(a * -scales[s]);
      if (kKernel == PairwiseArgs::kImq) total += scales[s] / (a + scales[s]);
      if (kKernel == PairwiseArgs::kPolynomial) total += power(a * scales[s] + offset, degree);
    }
    return total;
  }

  // Twice its derivative by the squared distance, or its derivative by the product.
  GENFAST_INLINE_MEMBER Vec<T> slope(Vec<T> a) const {
    Vec<T> total = splat(T(0));
    for (int64_t s = 0; s < count; ++s) {
      if (kKernel == PairwiseArgs::kRbf) total -= exp_negative<T>(a * -scales[s]) * (T(2) * scales[s]);
      if (kKernel == PairwiseArgs::kImq) {
        const Vec<T> r = T(1) / (a + scales[s]);
        total -= r * (r * (T(2) * scales[s]));
      }
      if (kKernel == PairwiseArgs::kPolynomial) total += power(a * scales[s] + offset, degree - 1) * (T(degree) * scales[s]);
    }
    return total;
  }

 private:
  static GENFAST_INLINE_MEMBER Vec<T> power(Vec<T> x, int64_t n) {
    Vec<T> y = n ? x : splat(T(1));
    for (int64_t i = 1; i < n; ++i) y = y * x;
    return y;
  }
};

template <class T>
struct Problem {
  const T *x, *y, *panels;  // rows, xs and ys apart; y as panels of block_columns
  const T *xn, *yn;         // squared norms, kNorms only; yn is padded
  int64_t n, m, c, xs, ys;
  bool same, exclude;
};

// Squared differences of `height` rows with NV vectors of columns.
template <class T, int NV>
GENFAST_INLINE void differences(const T* x, int64_t stride, int64_t height, int64_t c, const T* panel, T* tile) {
  constexpr int n = lanes<T>();
  for (int64_t m = 0; m < height; ++m, x += stride, tile += NV * n) {
    Vec<T> acc[NV] = {};
    for (int64_t k = 0; k < c; ++k) {
      const Vec<T> a = splat(x[k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec<T> d = a - load(panel + (k * NV + v) * n);
        acc[v] += d * d;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(tile + v * n, acc[v]);
  }
}

template <class T, int kForm>
GENFAST_INLINE void make_tile(const Problem<T>& p, int64_t row, int64_t height, const T* panel, int64_t nv, T* tile) {
  const T* x = p.x + row * p.xs;
  if (kForm != kDifferences) return run_aside<T>(height, nv, tile, x, p.xs, 1, panel, p.c);
#if GENFAST_VECTOR_BYTES == 64
  if (nv == 4) return differences<T, 4>(x, p.xs, height, p.c, panel, tile);
  if (nv == 3) return differences<T, 3>(x, p.xs, height, p.c, panel, tile);
#endif
  if (nv == 2) return differences<T, 2>(x, p.xs, height, p.c, panel, tile);
  differences<T, 1>(x, p.xs, height, p.c, panel, tile);
}

// What the kernel is a function of, from what a tile holds.
template <class T, int kForm>
GENFAST_INLINE Vec<T> argument(const Problem<T>& p, const T* tile, int64_t i, int64_t j) {
  const Vec<T> t = load(tile);
  if (kForm != kNorms) return t;
  const Vec<T> d = (load(p.yn + j) + p.xn[i]) - t * T(2);
  return d < T(0) ? splat(T(0)) : d;
}

template <class T>
T squared_distance(const T* x, const T* y, int64_t c) {
  constexpr int n = lanes<T>();
  Vec<T> acc = splat(T(0));
  int64_t k = 0;
  for (; k + n <= c; k += n) {
    const Vec<T> d = load(x + k) - load(y + k);
    acc += d * d;
  }
  T rest = T(0);
  for (; k < c; ++k) rest += (x[k] - y[k]) * (x[k] - y[k]);
  return sum<T>(acc) + rest;
}

// Below so much of the squared norms a distance taken from them is rounding.
template <class T>
constexpr T rounding() {
  return T(8) * std::numeric_limits<T>::epsilon();
}

// Takes the distances of rows that are equal to rounding from their differences.
template <class T, int kForm>
GENFAST_INLINE Vec<T> distance(const Problem<T>& p, const T* tile, int64_t i, int64_t j) {
  Vec<T> d = argument<T, kForm>(p, tile, i, j);
  if (kForm != kNorms) return d;
  uint64_t near = collect<T>(d <= (load(p.yn + j) + p.xn[i]) * rounding<T>());
  for (; near; near &= near - 1) {
    const int64_t l = __builtin_ctzll(near);
    if (j + l < p.m) d[l] = squared_distance(p.x + i * p.xs, p.y + (j + l) * p.ys, p.c);
  }
  return d;
}

// Rows first .. last with all columns, of the same rows with those from the diagonal on, which `columns` (n) then counts too.
template <class T, int kForm, class K>
void sum_block(const Problem<T>& p, const K& kernel, int64_t first, int64_t last, double* rows, double* columns) {
  constexpr int n = lanes<T>();
  constexpr int64_t block = block_columns<T>();
  alignas(64) T tile[kMaxRows * block];
  Vec<T> acc[kSumRows];
  const int64_t panels = (p.m + block - 1) / block;
  for (int64_t i = first; i < last; ++i) rows[i] = 0;
  for (int64_t from = p.same ? first / block : 0; from < panels; from += kChunk) {
    for (int64_t i = 0; i < last - first; ++i) acc[i] = splat(T(0));
    for (int64_t q = from; q < std::min(panels, from + kChunk); ++q) {
      const int64_t column = q * block, live = std::min(block, p.m - column), nv = vectors<T>(live);
      Vec<T> total[kMaxVectors] = {};
      for (int64_t row = first; row < last; row += kMaxRows) {
        if (p.same && column + live <= row) break;  // below the diagonal, and so are the tiles that follow
        const int64_t height = std::min<int64_t>(kMaxRows, last - row);
        make_tile<T, kForm>(p, row, height, p.panels + column * p.c, nv, tile);
        const bool whole = live == nv * n && !(p.same && column < row + height);
        for (int64_t m = 0; m < height; ++m) {
          const int64_t i = row + m;
          for (int64_t v = 0; v < nv; ++v) {
            Vec<T> k = kernel.value(distance<T, kForm>(p, tile + (m * nv + v) * n, i, column + v * n));
            if (!whole) {
              const Mask<T> j = counting<T>() + typename Types<T>::Int(column + v * n);
              Mask<T> counts = j < typename Types<T>::Int(p.m);
              if (p.same) counts &= p.exclude ? j > typename Types<T>::Int(i) : j >= typename Types<T>::Int(i);
              k = counts ? k : splat(T(0));
              if (p.same) total[v] += j == typename Types<T>::Int(i) ? splat(T(0)) : k;
            } else if (p.same) {
              total[v] += k;
            }
            acc[i - first] += k;
          }
        }
      }
      if (p.same) {
        T sums[block];
        for (int64_t v = 0; v < nv; ++v) store(sums + v * n, total[v]);
        for (int64_t j = 0; j < live; ++j) columns[column + j] += double(sums[j]);
      }
    }
    for (int64_t i = first; i < last; ++i) rows[i] += double(sum<T>(acc[i - first]));
  }
}

template <class T, int kForm, class K>
void sums(const Problem<T>& p, const K& kernel, T* out, int threads) {
  const int64_t blocks = (p.n + kSumRows - 1) / kSumRows, groups = p.same ? std::min(blocks, kGroups) : blocks;
  static thread_local Scratch scratch;
  double *const rows = scratch.get<double>((p.same ? groups + 1 : 1) * p.n), *const columns = rows + p.n;
  std::fill(rows, columns + (p.same ? groups * p.n : 0), 0.0);
#pragma omp parallel num_threads(threads)
  {
    // The first blocks have the longest rows: each group takes them from both ends in turn.
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t base = 0, turn = 0; base < blocks; base += groups, ++turn) {
        const int64_t b = base + (turn % 2 ? groups - 1 - g : g);
        if (b < blocks)
          sum_block<T, kForm>(p, kernel, b * kSumRows, std::min(p.n, (b + 1) * kSumRows), rows,
                              p.same ? columns + g * p.n : nullptr);
      }
  }
  for (int64_t i = 0; i < p.n; ++i) {  // small beside the pairs: another barrier would cost more
    double total = rows[i];
    if (p.same)
      for (int64_t g = 0; g < groups; ++g) total += columns[g * p.n + i];
    out[i] = T(total);
  }
}

template <class T>
struct Continued {  // a tile of accumulators that begins with what `out` holds
  T* out;
  int64_t ld;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] = load(out + m * ld + v * lanes<T>());
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) store(out + m * ld + v * lanes<T>(), acc[m][v]);
  }
};

// Adds the weights (height, count), `wide` apart, times `count` rows of y to height rows, ld apart.
template <class T>
__attribute__((noinline)) void add_product(int64_t height, int64_t count, const T* weights, int64_t wide, const T* y, int64_t ys,
                                           int64_t c, T* out, int64_t ld) {
  const Segment segment{0, 0, count};
  for (int64_t k = 0; k < c; k += block_columns<T>()) {
    const int64_t nv = vectors<T>(std::min(block_columns<T>(), c - k));
    for (int64_t m = 0; m < height; m += kMaxRows)
      run<T>(std::min<int64_t>(kMaxRows, height - m), nv, Continued<T>{out + m * ld + k, ld}, weights + m * wide, wide, 1, &segment, 1,
             y + k, ys);
  }
}

// What gradient_block works in: weights, then the sums of the rows of y.
template <class T>
int64_t gradient_elements(const Problem<T>& p) {
  return std::min(p.n, kGradientRows) * (weight_columns<T>() + padded<T>(p.c));
}

template <class T, int kForm, class K>
void gradient_block(const Problem<T>& p, const K& kernel, const T* g, const T* h, int64_t first, int64_t last, T* weights, T* out) {
  constexpr int n = lanes<T>();
  constexpr int64_t block = block_columns<T>(), wide = weight_columns<T>();
  constexpr T kNear = rounding<T>();
  alignas(64) T tile[kMaxRows * block];
  Vec<T> acc[kGradientRows];
  const int64_t ld = padded<T>(p.c), rows = last - first;
  T* const total = weights + rows * wide;
  memset(total, 0, size_t(rows * ld) * sizeof(T));
  for (int64_t i = 0; i < rows; ++i) acc[i] = splat(T(0));
  for (int64_t from = 0; from < p.m; from += wide) {
    const int64_t to = std::min(p.m, from + wide);
    for (int64_t column = from; column < to; column += block) {
      const int64_t live = std::min(block, p.m - column), nv = vectors<T>(live);
      for (int64_t row = first; row < last; row += kMaxRows) {
        const int64_t height = std::min<int64_t>(kMaxRows, last - row);
        make_tile<T, kForm>(p, row, height, p.panels + column * p.c, nv, tile);
        const bool whole = live == nv * n && !(p.exclude && column < row + height && row < column + live);
        for (int64_t m = 0; m < height; ++m) {
          const int64_t i = row + m;
          const T gi = g ? g[i] : T(0);
          for (int64_t v = 0; v < nv; ++v) {
            const int64_t j = column + v * n;
            const Vec<T> d = distance<T, kForm>(p, tile + (m * nv + v) * n, i, j);
            Vec<T> w = kernel.slope(d);
            w = w * (h ? load(h + j) + gi : splat(gi));
            if (!whole) {
              const Mask<T> at = counting<T>() + typename Types<T>::Int(j);
              Mask<T> counts = at < typename Types<T>::Int(p.m);
              if (p.exclude) counts &= at != typename Types<T>::Int(i);
              w = counts ? w : splat(T(0));
            }
            if (kForm != kProducts) {  // s x - sum w y would round what is near as finely as it weighs, which is most of all
              uint64_t near = collect<T>(d <= (load(p.yn + j) + p.xn[i]) * kNear);
              for (; near; near &= near - 1) {
                const int64_t l = __builtin_ctzll(near);
                const T weight = w[l], *x = p.x + i * p.xs, *y = p.y + (j + l) * p.ys;
                w[l] = T(0);
                if (j + l >= p.m || d[l] == T(0) || weight == T(0)) continue;
                for (int64_t k = 0; k < p.c; ++k) total[(i - first) * ld + k] -= weight * (x[k] - y[k]);
              }
            }
            acc[i - first] += w;
            store(weights + (i - first) * wide + (j - from), w);
          }
        }
      }
    }
    add_product(rows, to - from, weights, wide, p.y + from * p.ys, p.ys, p.c, total, ld);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const T s = sum<T>(acc[i]);
    const T* x = p.x + (first + i) * p.xs;
    T* to = out + (first + i) * p.c;
    for (int64_t k = 0; k < p.c; ++k) to[k] = kForm == kProducts ? total[i * ld + k] : s * x[k] - total[i * ld + k];
  }
}

// Puts (value, j) behind all that is not greater among `filled` ascending ones; the last of k falls out.
template <class T>
GENFAST_INLINE void insert(T* values, int64_t* index, int64_t filled, int64_t k, T value, int64_t j) {
  int64_t at = std::min(filled, k - 1);
  for (; at > 0 && values[at - 1] > value; --at) values[at] = values[at - 1], index[at] = index[at - 1];
  values[at] = value, index[at] = j;
}

template <class T, int kForm>
void nearest_block(const Problem<T>& p, const T* x, const T* y, int64_t k, int64_t first, int64_t last, T* out, int64_t* index,
                   int64_t* found) {
  constexpr int n = lanes<T>();
  constexpr int64_t block = block_columns<T>();
  alignas(64) T tile[kMaxRows * block];
  int64_t filled[kSumRows] = {};
  T worst[kSumRows];
  for (int64_t i = 0; i < last - first; ++i) worst[i] = std::numeric_limits<T>::infinity();
  for (int64_t column = 0; column < p.m; column += block) {
    const int64_t live = std::min(block, p.m - column), nv = vectors<T>(live);
    const uint64_t there = live == 64 ? ~uint64_t(0) : (uint64_t(1) << live) - 1;
    for (int64_t row = first; row < last; row += kMaxRows) {
      const int64_t height = std::min<int64_t>(kMaxRows, last - row);
      make_tile<T, kForm>(p, row, height, p.panels + column * p.c, nv, tile);
      for (int64_t m = 0; m < height; ++m) {
        const int64_t i = row + m;
        T* line = tile + m * nv * n;
        T& limit = worst[i - first];
        uint64_t near = 0;
        for (int64_t v = 0; v < nv; ++v) {
          Vec<T> d = load(line + v * n);
          if (kForm == kNorms) store(line + v * n, d = load(p.yn + column + v * n) - d * T(2));
          near |= collect<T>(d < limit) << (v * n);
        }
        near &= there;
        if (p.exclude && i >= column && i < column + live) near &= ~(uint64_t(1) << (i - column));
        for (; near; near &= near - 1) {
          const int64_t j = __builtin_ctzll(near);
          if (!(line[j] < limit)) continue;
          int64_t& count = filled[i - first];
          insert(out + i * k, index + i * k, count, k, line[j], column + j);
          count = std::min(count + 1, k);
          if (count == k) limit = out[i * k + k - 1];
        }
      }
    }
  }
  for (int64_t i = first; i < last; ++i) {
    T* values = out + i * k;
    int64_t* chosen = index + i * k;
    int64_t count = filled[i - first];
    for (int64_t j = 0; count < k; ++j) {  // rows at no finite distance, in their order
      const bool taken = (p.exclude && j == i) || std::find(chosen, chosen + count, j) != chosen + count;
      if (!taken) chosen[count++] = j;
    }
    std::copy(chosen, chosen + k, found);
    std::sort(found, found + k);
    for (int64_t a = 0; a < k; ++a)
      insert(values, chosen, a, k, squared_distance(x + i * p.c, y + found[a] * p.c, p.c), found[a]);
  }
}

// The common mean of the rows of x and y, feature by feature.
template <class T>
void common_mean(const T* x, int64_t n, const T* y, int64_t m, int64_t c, T* mean, int threads) {
  constexpr int64_t width = 64;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t from = 0; from < c; from += width) {
    const int64_t count = std::min(width, c - from);
    double total[width] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < count; ++k) total[k] += double(x[i * c + from + k]);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t k = 0; k < count; ++k) total[k] += double(y[i * c + from + k]);
    for (int64_t k = 0; k < count; ++k) mean[from + k] = T(total[k] / double(n + m));
  }
}

// Rows less the mean, zeros behind, and their squared norms.
template <class T>
void prepare_rows(const T* x, int64_t n, int64_t c, const T* mean, T* rows, int64_t stride, T* norms, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    T* to = rows + i * stride;
    for (int64_t k = 0; k < c; ++k) to[k] = x[i * c + k] - mean[k];
    for (int64_t k = c; k < stride; ++k) to[k] = T(0);
    Vec<T> total = splat(T(0));
    for (int64_t k = 0; k < padded<T>(c); k += lanes<T>()) total += load(to + k) * load(to + k);
    norms[i] = sum<T>(total);
  }
}

// What all modes need of entry b of the batch, then `then(problem, padded gradient of the columns)`.
template <class T, int kForm, class Then>
void prepare(const PairwiseArgs& a, int64_t b, int threads, const Then& then) {
  constexpr int64_t block = block_columns<T>();
  const T* const x = static_cast<const T*>(a.x) + b * a.n * a.c;
  const T* const y = a.y ? static_cast<const T*>(a.y) + b * a.m * a.c : x;
  const int64_t across = (a.m + block - 1) / block, padded_m = across * block;
  // An odd number of cache lines: rows a power of two apart would meet in a few sets of a cache.
  const int64_t line = 64 / int64_t(sizeof(T)), stride = ((a.c + line - 1) / line | 1) * line;
  const bool copies = kForm == kNorms || a.mode == PairwiseArgs::kGradient;
  const int64_t copied = copies ? (a.y ? a.n + a.m : a.m) * stride : 0, norms = (a.n + line - 1) / line * line;
  static thread_local Scratch scratch;
  T* const panels = scratch.get<T>(padded_m * a.c + copied + norms + 2 * padded_m + (a.c + line) / line * line);
  T* const rows = panels + padded_m * a.c;
  T *const xn = rows + copied, *const yn = xn + norms, *const h = yn + padded_m, *const mean = h + padded_m;
  Problem<T> p{x, y, panels, xn, yn, a.n, a.m, a.c, a.c, a.c, !a.y, a.exclude_diagonal};
  if ((a.n + a.m) * a.c < kSmallRows) threads = 1;
  if (copies) {
    for (int64_t k = 0; k < a.c; ++k) mean[k] = T(0);
    if (kForm != kProducts) common_mean(x, a.n, y, a.y ? a.m : 0, a.c, mean, threads);
    T* const yr = a.y ? rows + a.n * stride : rows;
    prepare_rows(y, a.m, a.c, mean, yr, stride, yn, threads);
    if (a.y)
      prepare_rows(x, a.n, a.c, mean, rows, stride, xn, threads);
    else
      p.xn = yn;
    p.x = rows, p.y = yr, p.xs = p.ys = stride;
    for (int64_t j = a.m; j < padded_m; ++j) yn[j] = T(0);
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t q = 0; q < across; ++q) {
    const Strided<T> columns{p.y, 1, p.ys};
    pack_columns(columns, 0, a.c, q * block, a.m, std::min(block, padded<T>(a.m - q * block)), panels + q * block * a.c);
  }
  if (a.y_grad)
    for (int64_t j = 0; j < padded_m; ++j) h[j] = j < a.m ? static_cast<const T*>(a.y_grad)[b * a.m + j] : T(0);
  then(p, a.y_grad ? h : nullptr);
}

template <class T, int kForm, int kKernel>
void run_kernel(const PairwiseArgs& a, int64_t b, int threads) {
  const std::vector<T> scales(a.scales, a.scales + a.count);
  const Kernel<T, kKernel> kernel{scales.data(), a.count, a.degree, T(a.offset)};
  prepare<T, kForm>(a, b, threads, [&](const Problem<T>& p, const T* h) {
    if (a.mode == PairwiseArgs::kSums) return sums<T, kForm>(p, kernel, static_cast<T*>(a.out) + b * a.n, threads);
    const T* g = a.x_grad ? static_cast<const T*>(a.x_grad) + b * a.n : nullptr;
    T* const out = static_cast<T*>(a.out) + b * a.n * a.c;
    static thread_local TeamScratch scratch;
    const Slices<T> weights = scratch.get<T>(threads, gradient_elements(p));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < p.n; i += kGradientRows)
      gradient_block<T, kForm>(p, kernel, g, h, i, std::min(p.n, i + kGradientRows), weights.get(), out);
  });
}

template <class T, int kForm>
void run_nearest(const PairwiseArgs& a, int64_t b, int threads) {
  const T* const x = static_cast<const T*>(a.x) + b * a.n * a.c;
  const T* const y = a.y ? static_cast<const T*>(a.y) + b * a.m * a.c : x;
  const int64_t at = b * a.n * a.k;
  prepare<T, kForm>(a, b, threads, [&](const Problem<T>& p, const T*) {
    static thread_local TeamScratch scratch;
    const Slices<int64_t> found = scratch.get<int64_t>(threads, a.k);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < p.n; i += kSumRows)
      nearest_block<T, kForm>(p, x, y, a.k, i, std::min(p.n, i + kSumRows), static_cast<T*>(a.out) + at, a.index + at, found.get());
  });
}

template <class T, int kForm>
void run_distances(const PairwiseArgs& a, int64_t b, int threads) {
  if (a.mode == PairwiseArgs::kNearest) return run_nearest<T, kForm>(a, b, threads);
  if (a.kernel == PairwiseArgs::kRbf) return run_kernel<T, kForm, PairwiseArgs::kRbf>(a, b, threads);
  run_kernel<T, kForm, PairwiseArgs::kImq>(a, b, threads);
}

template <class T>
void run_one(const PairwiseArgs& a, int64_t b, int threads) {
  if (a.mode != PairwiseArgs::kNearest && a.kernel == PairwiseArgs::kPolynomial)
    return run_kernel<T, kProducts, PairwiseArgs::kPolynomial>(a, b, threads);
  a.c <= kDirect ? run_distances<T, kDifferences>(a, b, threads) : run_distances<T, kNorms>(a, b, threads);
}

// Small entries of a batch go to a thread each, large ones to all threads in turn.
template <class T>
void run_all(const PairwiseArgs& a) {
  const bool small = a.n * a.m * (a.c + 8) < kSmall;
  const int across = small && a.b > 1 && a.b * a.n * a.m * (a.c + 8) >= kSmall / 8 ? a.threads : 1, within = small ? 1 : a.threads;
  TaskFailure failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(across)
  for (int64_t b = 0; b < a.b; ++b) failure.run([&] { run_one<T>(a, b, within); });
  failure.rethrow();
}

}  // namespace

GENFAST_KERNEL(pairwise, PairwiseArgs, run_all<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
