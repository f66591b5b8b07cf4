// What a modulated convolution (StyleGAN2 1912.04958 sec. 2.2, eq. 1-3) needs beside its convolution.
//
// channel_scale_backward, of y[n, c, s] = a[n, c] x[n, c, s] (+ noise[n, s]), s the position: dx = a d, da = sum_s d x and
//   dnoise = sum_c d in one pass, which reads d and x and writes dx (12 bytes an element in float). Bound by memory bandwidth.
//   The forward is one call of the library, which a kernel did not beat.
// tap_energy: q[r] = sum_k w[r, k]^2 over the taps of each pair of channels: one pass over w (4 bytes an element), which the
//   demodulation 1 / sqrt(sum_i a_i^2 q_oi + eps) needs in place of a weight for every sample.
// Sums run in T along at most kChunk elements and in double across them, over groups that do not depend on the thread count.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 4096;

template <class T>
const T* at(const View& v, int64_t n, int64_t c, int64_t s) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
}

// One chunk of the positions of one sample: its dx, its sums over channels, and its part of the sums over positions.
template <class T>
void backward_chunk(const ChannelScaleArgs& a, int64_t n, int64_t from, int64_t count, T* dnoise, double* sum) {
  const T* scale = static_cast<const T*>(a.scale) + n * a.c;
  T* dx = static_cast<T*>(a.dx);
  if (a.channels_last) {
    for (int64_t i = 0; i < count; ++i) {
      const T *x = at<T>(a.x, n, 0, from + i), *d = at<T>(a.grad, n, 0, from + i);
      T* out = dx + (n * a.s + from + i) * a.c;
      T across = 0;
#pragma omp simd reduction(+ : across)
      for (int64_t c = 0; c < a.c; ++c) {
        out[c] = d[c] * scale[c];
        sum[c] += double(d[c]) * double(x[c]);
        across += d[c];
      }
      if (dnoise) dnoise[i] = across;
    }
    return;
  }
  if (dnoise) memset(dnoise, 0, size_t(count) * sizeof(T));
  for (int64_t c = 0; c < a.c; ++c) {
    const T *x = at<T>(a.x, n, c, from), *d = at<T>(a.grad, n, c, from);
    T* out = dx + (n * a.c + c) * a.s + from;
    const T m = scale[c];
    T part = 0;
    if (dnoise) {
#pragma omp simd reduction(+ : part)
      for (int64_t i = 0; i < count; ++i) out[i] = d[i] * m, part += d[i] * x[i], dnoise[i] += d[i];
    } else {
#pragma omp simd reduction(+ : part)
      for (int64_t i = 0; i < count; ++i) out[i] = d[i] * m, part += d[i] * x[i];
    }
    sum[c] = double(part);
  }
}

template <class T>
void backward(const ChannelScaleArgs& a) {
  const int64_t chunk = a.channels_last ? (kChunk + a.c - 1) / (a.c ? a.c : 1) * 4 : kChunk;
  const int64_t chunks = (a.s + chunk - 1) / chunk, items = a.n * chunks;
  const Workspace<double> all_sums(items * a.c, Workspace<double>::kZeros);
  double* sums = all_sums.get();
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t n = item / chunks, from = item % chunks * chunk, count = a.s - from < chunk ? a.s - from : chunk;
    T* dnoise = a.grad_noise ? static_cast<T*>(a.grad_noise) + n * a.s + from : nullptr;
    backward_chunk<T>(a, n, from, count, dnoise, sums + item * a.c);
  }
  T* da = static_cast<T*>(a.grad_scale);
  for (int64_t n = 0; n < a.n; ++n)
    for (int64_t c = 0; c < a.c; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < chunks; ++k) sum += sums[(n * chunks + k) * a.c + c];
      da[n * a.c + c] = T(sum);
    }
}

template <class T, int TAPS>
GENFAST_INLINE void energy(const T* w, int64_t rows, int64_t taps, T* out) {
  const int64_t count = TAPS ? TAPS : taps;
#pragma omp simd
  for (int64_t r = 0; r < rows; ++r) {
    T sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += w[r * count + k] * w[r * count + k];
    out[r] = sum;
  }
}

template <class T>
void energies(const TapEnergyArgs& a) {
  constexpr int64_t kRows = 256;
  const T* w = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out);
  const int threads = a.rows * a.taps < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t from = 0; from < a.rows; from += kRows) {
    const int64_t rows = a.rows - from < kRows ? a.rows - from : kRows;
    if (a.taps == 9)
      energy<T, 9>(w + from * 9, rows, 9, out + from);
    else if (a.taps == 1)
      energy<T, 1>(w + from, rows, 1, out + from);
    else
      energy<T, 0>(w + from * a.taps, rows, a.taps, out + from);
  }
}

}  // namespace

GENFAST_KERNEL(channel_scale_backward, ChannelScaleArgs, backward<T>(a))
GENFAST_KERNEL(tap_energy, TapEnergyArgs, energies<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
