// Transposes of strided matrices in registers, a square of vectors at a time.
#pragma once

#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GENFAST_SHUFFLE 1
#endif
#endif

#ifdef GENFAST_SHUFFLE
template <int... I>
struct Indices {};
template <int N, int... I>
struct Counted : Counted<N - 1, N - 1, I...> {};
template <int... I>
struct Counted<0, I...> {
  typedef Indices<I...> type;
};

template <class V, int... I>
GENFAST_INLINE V interleave_low(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * int(sizeof...(I)))...);
}
template <class V, int... I>
GENFAST_INLINE V interleave_high(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + int(sizeof...(I)) / 2 + (I % 2) * int(sizeof...(I)))...);
}

// One square of vectors, by as many perfect shuffles as a lane number has bits.
template <class T>
GENFAST_INLINE void transpose_square(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  constexpr int n = lanes<T>();
  const typename Counted<n>::type lane{};
  Vec<T> v[n], w[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) v[i] = load(src + i * src_stride);
#pragma GCC unroll 4
  for (int width = n; width > 1; width /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      w[2 * i] = interleave_low(v[i], v[i + n / 2], lane);
      w[2 * i + 1] = interleave_high(v[i], v[i + n / 2], lane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) v[i] = w[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store(dst + i * dst_stride, v[i]);
}
#else
template <class T>
GENFAST_INLINE void transpose_square(const T* src, int64_t src_stride, T* dst, int64_t dst_stride) {
  for (int i = 0; i < lanes<T>(); ++i)
    for (int k = 0; k < lanes<T>(); ++k) dst[k * dst_stride + i] = src[i * src_stride + k];
}
#endif

// dst[col * dst_stride + row] = src[row * src_stride + col]
template <class T>
static inline void transpose(const T* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst, int64_t dst_stride) {
  constexpr int n = lanes<T>();
  for (int64_t c = 0; c < cols; c += n)
    for (int64_t r = 0; r < rows; r += n) {
      const T* from = src + r * src_stride + c;
      T* to = dst + c * dst_stride + r;
      if (cols - c >= n && rows - r >= n) {
        transpose_square(from, src_stride, to, dst_stride);
        continue;
      }
      for (int64_t i = 0; i < n && i < rows - r; ++i)
        for (int64_t k = 0; k < n && k < cols - c; ++k) to[k * dst_stride + i] = from[i * src_stride + k];
    }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
