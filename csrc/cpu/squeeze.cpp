// Squeezing (RealNVP 1605.08803 sec. 3.6): f x f blocks of positions to channels and back, in both channel orders.
//
// (N, C, H, W) <-> (N, f^2 C, H/f, W/f). A pure move: each element is read once and written once (8 bytes in float), bound
// by memory bandwidth. NCHW: a row of the wide image is split over f rows of the narrow one.
#include "dtype_switch.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;

// wide[w * f + j] <-> narrow[w]
template <class T>
GENFAST_INLINE void move_row(T* wide, T* narrow, int64_t count, int64_t f, bool inverse) {
  if (inverse) {
#pragma omp simd
    for (int64_t w = 0; w < count; ++w) wide[w * f] = narrow[w];
  } else {
#pragma omp simd
    for (int64_t w = 0; w < count; ++w) narrow[w] = wide[w * f];
  }
}

// f = 2, by far the most common: both rows in one sweep, which the compiler turns into shuffles.
template <class T>
GENFAST_INLINE void move_pair(T* wide, T* a, T* b, int64_t count, bool inverse) {
  if (inverse) {
#pragma omp simd
    for (int64_t w = 0; w < count; ++w) wide[2 * w] = a[w], wide[2 * w + 1] = b[w];
  } else {
#pragma omp simd
    for (int64_t w = 0; w < count; ++w) a[w] = wide[2 * w], b[w] = wide[2 * w + 1];
  }
}

template <class T>
void run(const SqueezeArgs& a) {
  const int64_t f = a.factor, h = a.h / f, w = a.w / f, channels = a.c * f * f;
  T* wide = static_cast<T*>(a.inverse ? a.y : const_cast<void*>(a.x));
  T* narrow = static_cast<T*>(a.inverse ? const_cast<void*>(a.x) : a.y);
  const auto channel = [&](int64_t c, int64_t i, int64_t j) {
    return a.space_to_depth ? (i * f + j) * a.c + c : (c * f + i) * f + j;
  };
  const int threads = a.n * a.c * a.h * a.w < kSerial ? 1 : a.threads;
  if (a.channels_last) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < a.n * h; ++row)
      for (int64_t i = 0; i < f; ++i)
        for (int64_t v = 0; v < w; ++v)
          for (int64_t j = 0; j < f; ++j) {
            T* p = wide + ((row * f + i) * a.w + v * f + j) * a.c;
            T* q = narrow + (row * w + v) * channels + channel(0, i, j);
            const int64_t step = a.space_to_depth ? 1 : f * f;
            for (int64_t c = 0; c < a.c; ++c) a.inverse ? p[c] = q[c * step] : q[c * step] = p[c];
          }
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * a.c; ++item) {
    const int64_t n = item / a.c, c = item % a.c;
    for (int64_t i = 0; i < f; ++i)
      for (int64_t u = 0; u < h; ++u) {
        T* p = wide + (item * a.h + u * f + i) * a.w;
        const auto target = [&](int64_t j) { return narrow + ((n * channels + channel(c, i, j)) * h + u) * w; };
        if (f == 2)
          move_pair(p, target(0), target(1), w, a.inverse);
        else
          for (int64_t j = 0; j < f; ++j) move_row(p + j, target(j), w, f, a.inverse);
      }
  }
}

}  // namespace

GENFAST_KERNEL(squeeze, SqueezeArgs, run<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
