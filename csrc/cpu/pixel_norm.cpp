// Pixel norm (progressive growing 1710.10196 sec. 4.2): y = x r with r = (mean_c x^2 + eps)^(-1/2) of each position.
//
// x (N, C, S). Backward, which recomputes r: dx = r (d - y mean_c(d y)). Fused: the square, the mean, the root and the product.
// Along channels (channels_last, vectors) a row is read twice, the second time from the first-level cache; along positions a
// strip of them is taken through all channels and again, so that the second reading is from a cache too. From memory
// 8 bytes an element in float, backward 12: bound by bandwidth. 4 and 8 FLOPs.
#include <math.h>
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kStrip = 1024;           // positions of a strip at most,
constexpr int64_t kTerms = 64;            // that a sum takes before it is added to the whole, lest its rounding add up
constexpr int64_t kStripBytes = 1 << 20;  // and bytes of x in it

template <class T>
const T* at(const View& v, int64_t n, int64_t c, int64_t s) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
}

// r and mean(d x) r, from the sums of x^2 and d x.
template <class T>
GENFAST_INLINE void finish(T squares, T products, T count, T eps, T& r, T& q) {
  r = T(1) / T(::sqrt(squares / count + eps));
  q = products / count * r;
}

template <class T, bool kBackward>
void along_channels(const PixelNormArgs& a, int64_t p) {
  constexpr int n = lanes<T>();
  const T* x = at<T>(a.x, p / a.s, 0, p % a.s);
  const T* d = kBackward ? at<T>(a.grad, p / a.s, 0, p % a.s) : x;
  T* out = static_cast<T*>(a.y) + p * a.c;
  Vec<T> squares[2] = {splat(T(0)), splat(T(0))}, products[2] = {splat(T(0)), splat(T(0))};
  int64_t c = 0;
  for (; c + 2 * n <= a.c; c += 2 * n) {
    for (int h = 0; h < 2; ++h) {
      const Vec<T> v = load(x + c + h * n);
      squares[h] += v * v;
      if (kBackward) products[h] += v * load(d + c + h * n);
    }
  }
  for (; c < a.c; c += n) {
    const int count = a.c - c < n ? int(a.c - c) : n;
    const Vec<T> v = count == n ? load(x + c) : load_part(x + c, count);
    squares[0] += v * v;
    if (kBackward) products[0] += v * (count == n ? load(d + c) : load_part(d + c, count));
  }
  T r, q;
  finish<T>(sum<T>(squares[0] + squares[1]), kBackward ? sum<T>(products[0] + products[1]) : T(0), T(a.c), T(a.eps), r, q);
#pragma omp simd
  for (int64_t i = 0; i < a.c; ++i) out[i] = kBackward ? r * (d[i] - x[i] * r * q) : x[i] * r;
}

template <class T, bool kBackward>
void along_positions(const PixelNormArgs& a, int64_t n, int64_t from, int64_t length) {
  T squares[kStrip], products[kStrip], all_squares[kStrip], all_products[kStrip];
  for (int64_t i = 0; i < length; ++i) squares[i] = products[i] = all_squares[i] = all_products[i] = T(0);
  for (int64_t c = 0; c < a.c; ++c) {
    if (c && c % kTerms == 0) {
      for (int64_t i = 0; i < length; ++i) {
        all_squares[i] += squares[i];
        all_products[i] += products[i];
        squares[i] = products[i] = T(0);
      }
    }
    const T *x = at<T>(a.x, n, c, from), *d = kBackward ? at<T>(a.grad, n, c, from) : x;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      squares[i] += x[i] * x[i];
      if (kBackward) products[i] += x[i] * d[i];
    }
  }
  const T count = T(a.c), eps = T(a.eps);
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    T r, q;
    finish<T>(squares[i] + all_squares[i], products[i] + all_products[i], count, eps, r, q);
    squares[i] = r;
    products[i] = q;
  }
  for (int64_t c = 0; c < a.c; ++c) {
    const T *x = at<T>(a.x, n, c, from), *d = kBackward ? at<T>(a.grad, n, c, from) : x;
    T* out = static_cast<T*>(a.y) + (n * a.c + c) * a.s + from;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i)
      out[i] = kBackward ? squares[i] * (d[i] - x[i] * squares[i] * products[i]) : x[i] * squares[i];
  }
}

template <class T, bool kBackward>
void run(const PixelNormArgs& a) {
  if (a.n * a.c * a.s == 0) return;
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
  if (a.channels_last) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < a.n * a.s; ++p) along_channels<T, kBackward>(a, p);
    return;
  }
  int64_t strip = kStripBytes / (a.c * int64_t(sizeof(T))) / 64 * 64;
  strip = strip < 64 ? 64 : strip > kStrip ? kStrip : strip;
  const int64_t strips = (a.s + strip - 1) / strip;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * strips; ++item) {
    const int64_t from = item % strips * strip;
    along_positions<T, kBackward>(a, item / strips, from, a.s - from < strip ? a.s - from : strip);
  }
}

}  // namespace

GENFAST_KERNEL(pixel_norm, PixelNormArgs, run<T, false>(a))
GENFAST_KERNEL(pixel_norm_backward, PixelNormArgs, run<T, true>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
