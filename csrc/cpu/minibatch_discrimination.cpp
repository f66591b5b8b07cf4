// Minibatch discrimination's pairwise part (Salimans et al. 1606.03498, section 3.2), with k_ij = exp(-sum_c |M_ic - M_jc|)
// for each kernel b:
//   sums              o_i = sum_j k_ij
//   backward          dM_ic = -sum_j (g_i + g_j) k_ij s_ijc, s_ijc = sign(M_ic - M_jc)
//   second backward   of <V, dM>, s constant, with D_ij = sum_c s_ijc (V_ic - V_jc):
//                     dg_i = -sum_j k_ij D_ij,  dM_ic = sum_j (g_i + g_j) k_ij D_ij s_ijc
//
// M, V (N, B, C), g, o (N, B). Kernels b go into the lanes of a vector; each pair i < j is computed once and counted for both.
// No array of N x N elements: besides a lane-wise copy of the inputs there are at most about kItems copies of an output of one
// vector of kernels, into which the groups of rows sum, added in their order, so that threads do not matter.
// N^2 B / 2 (3 C + 20) FLOPs forward, 4 C more backward, all in the first cache: bound by arithmetic.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kItems = 16;
constexpr int64_t kSerial = 1 << 15;
constexpr int64_t kTileBytes = 24 << 10;  // of the rows j that stay in the first cache

enum Mode { kSums, kBackward, kSecond };

// x with the sign of `of`, zero where that is zero.
template <class T>
GENFAST_INLINE Vec<T> times_sign(Vec<T> x, Vec<T> of) {
  const typename Types<T>::Int sign = typename Types<T>::Int(1) << (sizeof(T) * 8 - 1);
  return from_bits<T>((bits<T>(x) ^ (bits<T>(of) & (Mask<T>{} + sign))) & (of != T(0)));
}

template <class T>
struct Slab {  // one vector of kernels: rows of c vectors, `wide` apart (m, v, dm), or of one (g, o)
  const T *m, *v, *g;
  T *o, *dm;
  int64_t c, wide;
};

// An odd number of vectors: rows a power of two apart would meet in the low address bits by which a processor tells whether
// a load depends on a store under way (measured: 5 to 15% of the backward at 8 to 32 features).
GENFAST_INLINE int64_t spread(int64_t c) { return c | 1; }

// Row i with the K rows from j on.
template <class T, Mode kMode, int K>
GENFAST_INLINE void pairs(const Slab<T>& s, int64_t i, int64_t j) {
  constexpr int n = lanes<T>();
  const int64_t row = s.wide * n, features = s.c * n;
  const T *mi = s.m + i * row, *mj = s.m + j * row, *vi = s.v + i * row, *vj = s.v + j * row;
  Vec<T> distance[K] = {}, slope[K] = {};
  for (int64_t c = 0; c < features; c += n) {
    const Vec<T> x = load(mi + c);
    Vec<T> y = x;
    if (kMode == kSecond) y = load(vi + c);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const Vec<T> difference = x - load(mj + k * row + c);
      distance[k] += abs<T>(difference);
      if (kMode == kSecond) slope[k] += times_sign<T>(y - load(vj + k * row + c), difference);
    }
  }
  Vec<T> weight[K], total = splat(T(0));
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    Vec<T> e = exp<T>(-distance[k]);
    if (kMode == kSecond) e = e * slope[k];
    if (kMode != kBackward) {
      total += e;
      T* o = s.o + (j + k) * n;
      store(o, kMode == kSums ? load(o) + e : load(o) - e);
    }
    if (kMode != kSums) {
      weight[k] = (load(s.g + i * n) + load(s.g + (j + k) * n)) * e;
      if (kMode == kBackward) weight[k] = -weight[k];
    }
  }
  if (kMode != kBackward) {
    T* o = s.o + i * n;
    store(o, kMode == kSums ? load(o) + total : load(o) - total);
  }
  if (kMode == kSums) return;
  T *di = s.dm + i * row, *dj = s.dm + j * row;
  for (int64_t c = 0; c < features; c += n) {
    const Vec<T> x = load(mi + c);
    Vec<T> sum = load(di + c);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const Vec<T> part = times_sign<T>(weight[k], x - load(mj + k * row + c));
      sum += part;
      store(dj + k * row + c, load(dj + k * row + c) - part);
    }
    store(di + c, sum);
  }
}

// Rows i = first, first + step, ... with all j > i, tile by tile of j.
template <class T, Mode kMode>
void triangle(const Slab<T>& s, int64_t rows, int64_t first, int64_t step) {
  int64_t tile = kTileBytes / (s.wide * GENFAST_VECTOR_BYTES * (kMode == kSums ? 1 : kMode == kBackward ? 2 : 3)) / 4 * 4;
  tile = tile < 8 ? 8 : tile;
  for (int64_t from = 0; from < rows; from += tile) {
    const int64_t to = rows - from < tile ? rows : from + tile;
    for (int64_t i = first; i < to; i += step) {
      int64_t j = i + 1 > from ? i + 1 : from;
      for (; j + 4 <= to; j += 4) pairs<T, kMode, 4>(s, i, j);
      for (; j < to; ++j) pairs<T, kMode, 1>(s, i, j);
    }
  }
}

// (N, B, C) to (N, wide, lanes) for the kernels from `from` on; zero beyond the last.
template <class T>
void pack(const T* x, int64_t rows, int64_t kernels, int64_t dims, int64_t wide, int64_t from, T* out) {
  constexpr int n = lanes<T>();
  const int64_t count = kernels - from < n ? kernels - from : n;
  for (int64_t i = 0; i < rows; ++i, out += wide * n) {
    const T* row = x + (i * kernels + from) * dims;
    for (int64_t c = 0; c < dims; ++c)
      for (int64_t l = 0; l < n; ++l) out[c * n + l] = l < count ? row[l * dims + c] : T(0);
  }
}

template <class T>
void unpack(const T* x, int64_t rows, int64_t kernels, int64_t dims, int64_t wide, int64_t from, T* out) {
  constexpr int n = lanes<T>();
  const int64_t count = kernels - from < n ? kernels - from : n;
  for (int64_t i = 0; i < rows; ++i, x += wide * n)
    for (int64_t l = 0; l < count; ++l)
      for (int64_t c = 0; c < dims; ++c) out[(i * kernels + from + l) * dims + c] = x[c * n + l];
}

template <class T, Mode kMode>
void run(const PairwiseL1Args& a) {
  constexpr int n = lanes<T>();
  const int64_t slabs = (a.b + n - 1) / n, rows = a.n, wide = spread(a.c);
  const int threads = rows * rows * a.b * (a.c + 8) < kSerial ? 1 : a.threads;
  int64_t groups = (kItems + slabs - 1) / slabs;
  groups = rows / 8 < groups ? (rows / 8 ? rows / 8 : 1) : groups;
  const bool sums = kMode != kBackward, gradients = kMode != kSums;
  // What is copied of a slab: m, v, g; what is summed: dm, o.
  const int64_t copied = rows * (wide * (kMode == kSecond ? 2 : 1) + (gradients ? 1 : 0));
  const int64_t summed = rows * ((gradients ? wide : 0) + (sums ? 1 : 0));
  const Workspace<T> all_inputs(slabs * copied * n, Workspace<T>::kZeros), all_outputs(slabs * groups * summed * n, Workspace<T>::kZeros);
  T *inputs = all_inputs.get(), *outputs = all_outputs.get();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t slab = 0; slab < slabs; ++slab) {
      T* to = inputs + slab * copied * n;
      pack(static_cast<const T*>(a.m), rows, a.b, a.c, wide, slab * n, to);
      if (kMode == kSecond) pack(static_cast<const T*>(a.tangent), rows, a.b, a.c, wide, slab * n, to + rows * wide * n);
      if (gradients) pack(static_cast<const T*>(a.grad), rows, a.b, int64_t(1), int64_t(1), slab * n, to + (copied - rows) * n);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < slabs * groups; ++item) {
      const T* from = inputs + item / groups * copied * n;
      T* to = outputs + item * summed * n;
      const Slab<T> s{from, from + rows * wide * n, from + (copied - rows) * n, to + (summed - rows) * n, to, a.c, wide};
      triangle<T, kMode>(s, rows, item % groups, groups);
    }
#pragma omp for schedule(static)
    for (int64_t slab = 0; slab < slabs; ++slab) {
      T* total = outputs + slab * groups * summed * n;
      for (int64_t k = 1; k < groups; ++k)
        for (int64_t i = 0; i < summed * n; ++i) total[i] += total[k * summed * n + i];
      T* o = total + (summed - rows) * n;
      if (kMode == kSums && a.include_self) {
        const T* m = inputs + slab * copied * n;
        for (int64_t i = 0; i < rows; ++i) {  // exp(-|m - m|), which is 1, or NaN where m is not finite
          Vec<T> distance = splat(T(0));
          for (int64_t c = 0; c < a.c; ++c) distance += abs<T>(load(m + (i * wide + c) * n) - load(m + (i * wide + c) * n));
          store(o + i * n, load(o + i * n) + exp<T>(-distance));
        }
      }
      if (sums) unpack(o, rows, a.b, int64_t(1), int64_t(1), slab * n, static_cast<T*>(a.out));
      if (gradients) unpack(total, rows, a.b, a.c, wide, slab * n, static_cast<T*>(a.grad_m));
    }
  }
}

template <class T>
void choose(const PairwiseL1Args& a) {
  if (a.tangent) return run<T, kSecond>(a);
  if (a.grad) return run<T, kBackward>(a);
  run<T, kSums>(a);
}

}  // namespace

GENFAST_KERNEL(pairwise_l1, PairwiseL1Args, choose<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
