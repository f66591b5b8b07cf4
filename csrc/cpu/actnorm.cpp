// Activation normalisation (Glow 1807.03039 sec. 3.1): y = s x + b per channel, logdet = S sum log|s|.
//
// x (N, C, S), s and b (C,). One pass: the forward reads x and writes y (8 bytes an element in float), the backward reads
// grad_y and x and writes dx (12) while it sums grad s and grad b. Bound by memory bandwidth.
// Sums run in T along a row and in double across rows, over groups that do not depend on the thread count.
//
// s and b come as the sum of two numbers each, the value and what it was rounded by: where x lies far from zero s x and b nearly
// cancel, and the rounding of s alone would be that of s x. The fused product x s + b is exact where they cancel.
#include <math.h>
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kGroups = 16;

template <class T>
const T* at(const View& v, int64_t n, int64_t c, int64_t s) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
}

// x mul + add, of fused multiplications where the processor has them.
template <class T>
GENFAST_INLINE T affine(T x, T mul, T mul_low, T add, T add_low) {
  const T large = x * mul + add;
  return x * mul_low + large + add_low;
}

// The compiler vectorises these rows as they stand.
template <class T>
GENFAST_INLINE void affine_row(const T* x, T mul, T mul_low, T add, T add_low, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = affine(x[i], mul, mul_low, add, add_low);
}

// What rounding took from a value, zero for one that is not finite.
template <class T>
T lost(double value, T rounded) {
  const double low = value - double(rounded);
  return low - low == 0 ? T(low) : T(0);
}

template <class T>
void forward(const ActNormArgs& a) {
  const T *scale = static_cast<const T*>(a.scale), *bias = static_cast<const T*>(a.bias);
  T* y = static_cast<T*>(a.y);
  const Workspace<T> coefficients(4 * a.c);
  T *mul = coefficients.get(), *add = mul + a.c, *mul_low = add + a.c, *add_low = mul_low + a.c;
  double unit = 0;
  for (int64_t c = 0; c < a.c; ++c) {
    const double s = a.log_scale ? ::exp(double(scale[c])) : double(scale[c]);
    unit += a.log_scale ? double(scale[c]) : ::log(fabs(s));
    const double by = a.inverse ? 1 / s : s, plus = a.inverse ? -double(bias[c]) / s : double(bias[c]);
    mul[c] = T(by), add[c] = T(plus);
    mul_low[c] = lost(by, mul[c]), add_low[c] = lost(plus, add[c]);
  }
  const T logdet = T((a.inverse ? -1 : 1) * double(a.s) * unit);
  for (int64_t n = 0; n < a.n; ++n) static_cast<T*>(a.logdet)[n] = logdet;
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
  if (!a.channels_last) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < a.n * a.c; ++row) {
      const int64_t n = row / a.c, c = row % a.c;
      affine_row(at<T>(a.x, n, c, 0), mul[c], mul_low[c], add[c], add_low[c], y + row * a.s, a.s);
    }
  } else {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < a.n * a.s; ++p) {
      const T* x = at<T>(a.x, p / a.s, 0, p % a.s);
      T* out = y + p * a.c;
#pragma omp simd
      for (int64_t c = 0; c < a.c; ++c) out[c] = affine(x[c], mul[c], mul_low[c], add[c], add_low[c]);
    }
  }
}

template <class T>
void backward(const ActNormArgs& a) {
  const T *scale = static_cast<const T*>(a.scale), *bias = static_cast<const T*>(a.bias);
  T *dx = static_cast<T*>(a.y), *ds = static_cast<T*>(a.grad_scale), *db = static_cast<T*>(a.grad_bias);
  const Workspace<T> factors(a.c);
  T* mul = factors.get();
  for (int64_t c = 0; c < a.c; ++c) {
    const double s = a.log_scale ? ::exp(double(scale[c])) : double(scale[c]);
    mul[c] = T(a.inverse ? 1 / s : s);
  }
  const int64_t rows = a.channels_last ? a.n * a.s : a.n;  // what the groups share out
  const int64_t groups = rows < kGroups ? (rows ? rows : 1) : kGroups;
  const Workspace<double> all_sums(groups * 2 * a.c, Workspace<double>::kZeros);
  double* sums = all_sums.get();
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    double *sum_dx = sums + g * 2 * a.c, *sum_d = sum_dx + a.c;
    for (int64_t row = rows * g / groups; row < rows * (g + 1) / groups; ++row) {
      if (a.channels_last) {
        const T *x = at<T>(a.x, row / a.s, 0, row % a.s), *d = at<T>(a.grad_y, row / a.s, 0, row % a.s);
        T* out = dx + row * a.c;
#pragma omp simd
        for (int64_t c = 0; c < a.c; ++c) {
          out[c] = d[c] * mul[c];
          sum_dx[c] += double(d[c]) * double(x[c]);
          sum_d[c] += double(d[c]);
        }
        continue;
      }
      for (int64_t c = 0; c < a.c; ++c) {
        const T *x = at<T>(a.x, row, c, 0), *d = at<T>(a.grad_y, row, c, 0);
        T* out = dx + (row * a.c + c) * a.s;
        const T m = mul[c];
        for (int64_t i = 0; i < a.s;) {  // in T for at most 4096 elements, then in double
          const int64_t end = a.s - i > 4096 ? i + 4096 : a.s;
          T part_dx = 0, part_d = 0;
#pragma omp simd reduction(+ : part_dx, part_d)
          for (int64_t k = i; k < end; ++k) {
            out[k] = d[k] * m;
            part_dx += d[k] * x[k];
            part_d += d[k];
          }
          sum_dx[c] += double(part_dx);
          sum_d[c] += double(part_d);
          i = end;
        }
      }
    }
  }
  double g_logdet = 0;
  for (int64_t n = 0; n < a.n; ++n) g_logdet += double(static_cast<const T*>(a.grad_logdet)[n]);
  g_logdet *= double(a.s);
  for (int64_t c = 0; c < a.c; ++c) {
    double sum_dx = 0, sum_d = 0;
    for (int64_t g = 0; g < groups; ++g) {
      sum_dx += sums[g * 2 * a.c + c];
      sum_d += sums[g * 2 * a.c + a.c + c];
    }
    const double s = a.log_scale ? ::exp(double(scale[c])) : double(scale[c]);
    // Inverse: the sums are over the input y of x = (y - b) / s, so sum d x = (sum d y - b sum d) / s.
    const double dlog = a.inverse ? -((sum_dx - double(bias[c]) * sum_d) / s + g_logdet) : sum_dx * s + g_logdet;
    ds[c] = T(a.log_scale ? dlog : dlog / s);
    db[c] = T(a.inverse ? -sum_d / s : sum_d);
  }
}

}  // namespace

GENFAST_KERNEL(actnorm, ActNormArgs, forward<T>(a))
GENFAST_KERNEL(actnorm_backward, ActNormArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
