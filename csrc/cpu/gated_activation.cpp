// Gated activation (Gated PixelCNN 1606.05328 eq. 2, WaveNet 1609.03499 eq. 2): y = tanh(f + V_f) sigma(g + V_g).
//
// x (N, 2C, S): k groups of channels, each [f half | g half]; V none, (2C,), (N, 2C) or (N, 2C, S); y (N, C, S). Fused: the
// split, the sum, both maps and their product; in the backward, which recomputes them, also the sums that are the gradient
// of V. One pass each way: an output element costs 12 bytes in float, and 20 backward, and 8 more where V has positions.
// About 60 FLOPs and one division: near the bound of memory bandwidth with 512-bit vectors, bound by arithmetic below.
// Sums run in T over at most 4096 (256 in channels_last order) terms and in double across them, in an order that does not
// depend on the thread count.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 256;   // positions that one partial sum takes in channels_last order
constexpr int64_t kStretch = 4096;

template <class T>
const T* at(const View& v, int64_t n, int64_t c, int64_t s) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
}

template <class T>
struct Gate {  // tanh f = m (1 + e) r, sigma(g) = big (m + 2) r, 1 - sigma(g) = small (m + 2) r
  Vec<T> m, e, r, big, small;
};

// m = e^2|f| - 1 with f's sign kept apart, e = e^-|g|, r = 1 / ((m + 2) (1 + e)): one division for all.
template <class T>
GENFAST_INLINE Gate<T> gate(Vec<T> f, Vec<T> g) {
  const T limit = sizeof(T) == 4 ? T(80) : T(700);
  Vec<T> a = abs<T>(f) * T(2);
  a = a > limit ? splat(limit) : a;
  Gate<T> q;
  q.m = exp_minus_one<T>(a);
  q.m = f == f ? q.m : f;
  q.e = exp<T>(-abs<T>(g));
  q.r = T(1) / ((q.m + T(2)) * (q.e + T(1)));
  const Vec<T> one = splat(T(1));
  q.big = g < T(0) ? q.e : one;
  q.small = g < T(0) ? one : q.e;
  return q;
}

template <class T>
GENFAST_INLINE Vec<T> with_sign(Vec<T> magnitude, Vec<T> of) {
  return of < T(0) ? -magnitude : magnitude;
}

template <class T>
struct Row {  // a run of elements whose f, g and y are contiguous
  const T *f, *g, *vf, *vg, *d;  // vf, vg null: the constants below
  T constant_f, constant_g;
  T *y, *df, *dg;
  T *sum_f, *sum_g;  // null, or one sum an element (channels_last)
};

template <class T, bool kBackward, bool kBias>
GENFAST_INLINE void step(const Row<T>& row, int64_t i, int count, Vec<T>& total_f, Vec<T>& total_g) {
  constexpr int n = lanes<T>();
  const auto get = [&](const T* p) { return count == n ? load(p + i) : load_part(p + i, count); };
  const auto put = [&](T* p, Vec<T> v) { count == n ? store(p + i, v) : store_part(p + i, v, count); };
  Vec<T> f = get(row.f), g = get(row.g);
  if (kBias) {
    f += get(row.vf);
    g += get(row.vg);
  } else {
    f += row.constant_f;
    g += row.constant_g;
  }
  const Gate<T> q = gate<T>(f, g);
  if (!kBackward) {
    put(row.y, with_sign<T>(q.m * q.big * q.r, f));
    return;
  }
  const Vec<T> d = get(row.d), up = (q.e + T(1)) * q.r, across = (q.m + T(2)) * q.r;
  const Vec<T> t = q.m * up, s = q.big * across;
  const Vec<T> df = d * s * ((t + T(1)) * (up * T(2))), dg = d * with_sign<T>(t, f) * s * (q.small * across);
  put(row.df, df);
  put(row.dg, dg);
  if (row.sum_f) {
    put(row.sum_f, get(row.sum_f) + df);
    put(row.sum_g, get(row.sum_g) + dg);
  } else {  // lanes beyond count hold d = 0
    total_f += df;
    total_g += dg;
  }
}

template <class T, bool kBackward, bool kBias>
void run_row(const Row<T>& row, int64_t length, double* sum_f, double* sum_g) {
  constexpr int n = lanes<T>();
  for (int64_t start = 0; start < length; start += kStretch) {
    const int64_t end = length - start < kStretch ? length : start + kStretch;
    Vec<T> total_f = splat(T(0)), total_g = total_f;
    int64_t i = start;
    for (; i + n <= end; i += n) step<T, kBackward, kBias>(row, i, n, total_f, total_g);
    if (i < end) step<T, kBackward, kBias>(row, i, int(end - i), total_f, total_g);
    if (kBackward && sum_f) {
      *sum_f += double(sum<T>(total_f));
      *sum_g += double(sum<T>(total_g));
    }
  }
}

template <class T, bool kBackward>
void run(const GatedActivationArgs& a, const Row<T>& row, int64_t length, double* sum_f = nullptr, double* sum_g = nullptr) {
  row.vf ? run_row<T, kBackward, true>(row, length, sum_f, sum_g) : run_row<T, kBackward, false>(row, length, sum_f, sum_g);
}

template <class T, bool kBackward>
void gated(const GatedActivationArgs& a) {
  const int64_t c = a.c, wide = 2 * c, block = c / a.groups;
  const int threads = a.n * c * a.s < kSerial ? 1 : a.threads;
  const bool summed = kBackward && (a.bias_mode == GatedActivationArgs::kChannel || a.bias_mode == GatedActivationArgs::kSample);
  const bool full = a.bias_mode == GatedActivationArgs::kFull, none = a.bias_mode == GatedActivationArgs::kNone;
  const bool by_sample = a.bias_mode == GatedActivationArgs::kSample;
  // Partial sums (outer, chunks, 2C), which one sample or all share out.
  const int64_t outer = by_sample ? a.n : 1, inner = a.channels_last ? (by_sample ? a.s : a.n * a.s) : (by_sample ? 1 : a.n);
  const int64_t chunks = a.channels_last ? (inner + kChunk - 1) / kChunk : inner;
  const Workspace<double> parts(summed ? outer * chunks * wide : 0, Workspace<double>::kZeros);
  double* partial = summed ? parts.get() : nullptr;
  T *y = static_cast<T*>(a.y);
  if (!a.channels_last) {
    // Where a group's halves are runs of their own and no bias changes along them, a half is one row.
    const bool flat = (none || (full && a.bias.c == a.s)) && a.x.c == a.s && (!kBackward || a.grad.c == a.s);
    const int64_t rows = flat ? a.groups : c, length = flat ? block * a.s : a.s;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < a.n * rows; ++item) {
      const int64_t n = item / rows, channel = (item - n * rows) * (flat ? block : 1);
      const int64_t cf = channel + channel / block * block, cg = cf + block;
      Row<T> row{};
      row.f = at<T>(a.x, n, cf, 0), row.g = at<T>(a.x, n, cg, 0);
      if (full) {
        row.vf = at<T>(a.bias, n, cf, 0), row.vg = at<T>(a.bias, n, cg, 0);
      } else if (!none) {
        row.constant_f = *at<T>(a.bias, n, cf, 0), row.constant_g = *at<T>(a.bias, n, cg, 0);
      }
      if (kBackward) {
        row.d = at<T>(a.grad, n, channel, 0);
        row.df = y + (n * wide + cf) * a.s, row.dg = y + (n * wide + cg) * a.s;
      } else {
        row.y = y + (n * c + channel) * a.s;
      }
      double* sums = summed ? partial + n * wide : nullptr;
      run<T, kBackward>(a, row, length, summed ? sums + cf : nullptr, summed ? sums + cg : nullptr);
    }
  } else {
    const PerThread<T> all_sums(threads, summed ? wide : 0);
#pragma omp parallel num_threads(threads)
    {
      T* sums = summed ? all_sums.get() : nullptr;
#pragma omp for schedule(static)
      for (int64_t item = 0; item < outer * chunks; ++item) {
        const int64_t first = item / chunks * inner, from = item % chunks * kChunk;
        const int64_t to = inner - from < kChunk ? inner : from + kChunk;
        if (summed)
          for (int64_t i = 0; i < wide; ++i) sums[i] = T(0);
        for (int64_t p = first + from; p < first + to; ++p) {
          const int64_t n = p / a.s, s = p - n * a.s;
          for (int64_t group = 0; group < a.groups; ++group) {
            const int64_t cf = 2 * group * block, cg = cf + block;
            Row<T> row{};
            row.f = at<T>(a.x, n, cf, s), row.g = row.f + block;
            if (!none) row.vf = at<T>(a.bias, n, cf, s), row.vg = row.vf + block;
            if (kBackward) {
              row.d = at<T>(a.grad, n, group * block, s);
              row.df = y + p * wide + cf, row.dg = row.df + block;
              if (summed) row.sum_f = sums + cf, row.sum_g = sums + cg;
            } else {
              row.y = y + p * c + group * block;
            }
            run<T, kBackward>(a, row, block);
          }
        }
        if (summed)
          for (int64_t i = 0; i < wide; ++i) partial[item * wide + i] = double(sums[i]);
      }
    }
  }
  if (summed) {
    T* out = static_cast<T*>(a.grad_bias);
    for (int64_t o = 0; o < outer; ++o) {
      double* total = partial + o * chunks * wide;
      for (int64_t k = 1; k < chunks; ++k)
        for (int64_t i = 0; i < wide; ++i) total[i] += total[k * wide + i];
      for (int64_t i = 0; i < wide; ++i) out[o * wide + i] = chunks ? T(total[i]) : T(0);
    }
  }
}

}  // namespace

GENFAST_KERNEL(gated_activation, GatedActivationArgs, gated<T, false>(a))
GENFAST_KERNEL(gated_activation_backward, GatedActivationArgs, gated<T, true>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
