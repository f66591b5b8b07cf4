// Minibatch standard deviation (progressive growing 1710.10196 sec. 3; StyleGAN2's layer). The batch is M groups of G members,
// sample n = g M + m; v_i is the variance over g of element i, t[m, f] the mean of (v_i + eps)^(1/2) over the elements of
// feature f, and y = [x | t] has F more channels, constant over the positions and the members of a group.
//
// x (N, C, S), y (N, C + F, S). Fused: the copy of x with both moments in one reading, shifted by the group's first member,
// which keeps v exact to G rounding errors. Backward: dx = d + k (x - mean_g x) / (v + eps)^(1/2), k[m, f] the sum of the
// gradient of the feature's channel over group and positions, divided by G and the number of elements. From memory 8 bytes an
// element in float, backward 12: bound by bandwidth. Sums run in T over at most 64 terms a lane and in double across them, in
// an order that does not depend on the thread count.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kBlock = 4096;  // elements of a sample that one thread takes at a time
constexpr int kTerms = 64;        // of a sum in T

template <class T>
const T* at(const View& v, int64_t n, int64_t c, int64_t s) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
}

template <class T>
struct Line {  // contiguous elements of the G members, a stride apart
  const T *x, *d;
  T* out;
  int64_t group, x_stride, d_stride, out_stride;
  T eps, k;
};

template <class T, bool kBackward>
GENFAST_INLINE void step(const Line<T>& line, int64_t i, int count, Vec<T>& total) {
  constexpr int n = lanes<T>();
  const auto get = [&](const T* p) __attribute__((always_inline)) {
    return count == n ? load(p + i) : load_part(p + i, count);
  };
  const auto put = [&](T* p, Vec<T> v) __attribute__((always_inline)) {
    count == n ? store(p + i, v) : store_part(p + i, v, count);
  };
  const T inverse = T(1) / T(line.group);
  const Vec<T> first = get(line.x);
  Vec<T> once = splat(T(0)), square = once;
  if (!kBackward) put(line.out, first);
  for (int64_t g = 1; g < line.group; ++g) {
    const Vec<T> x = get(line.x + g * line.x_stride), away = x - first;
    once += away;
    square += away * away;
    if (!kBackward) put(line.out + g * line.out_stride, x);
  }
  const Vec<T> mean = once * inverse;
  Vec<T> variance = (square - once * mean) * inverse;
  variance = variance < T(0) ? splat(T(0)) : variance;  // NaN stays
  const Vec<T> deviation = root(variance + line.eps);
  if (!kBackward) {
    if (count == n) {
      total += deviation;
    } else {  // lanes beyond count would add the root of eps
      T lane[n];
      store(lane, deviation);
      total += load_part(lane, count);
    }
    return;
  }
  const Vec<T> factor = line.k / deviation;
  for (int64_t g = 0; g < line.group; ++g) {
    const Vec<T> away = get(line.x + g * line.x_stride) - first;
    put(line.out + g * line.out_stride, get(line.d + g * line.d_stride) + factor * (away - mean));
  }
}

template <class T, bool kBackward>
void run(const MinibatchStddevArgs& a) {
  constexpr int lane = lanes<T>();
  if (a.n * a.c * a.s == 0) return;
  const int64_t groups = a.n / a.group, channels = a.c / a.features, wide = a.c + a.features;
  const int64_t out_c = kBackward ? a.c : wide;
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
  T* out = static_cast<T*>(a.y);
  // The elements of a feature of a sample: lines of contiguous ones, cut into pieces, or several to a block.
  const bool flat = !a.channels_last && a.x.c == a.s && (!kBackward || a.grad.c == a.s);
  const int64_t lines = a.channels_last ? a.s : flat ? 1 : channels;
  const int64_t length = a.channels_last ? channels : flat ? channels * a.s : a.s;
  const int64_t piece = length < kBlock ? length : kBlock, pieces = (length + piece - 1) / piece;
  const int64_t together = pieces > 1 ? 1 : (kBlock + length - 1) / length, blocks = (lines + together - 1) / together * pieces;
  const int64_t cells = groups * a.features;
  const Workspace<double> all_sums(cells * (kBackward ? a.group : blocks + 1), Workspace<double>::kZeros);
  const Workspace<T> values(cells);
  double* sums = all_sums.get();
  T* value = values.get();  // t, or k
  if (kBackward) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < cells * a.group; ++item) {
      const int64_t n = item / a.features, f = item % a.features;
      const T* d = at<T>(a.grad, n, a.c + f, 0);
      double total = 0;
      for (int64_t s = 0; s < a.s; ++s) total += double(d[s * a.grad.s]);
      sums[item] = total;
    }
    for (int64_t cell = 0; cell < cells; ++cell) {
      double total = 0;
      for (int64_t g = 0; g < a.group; ++g) total += sums[g * cells + cell];
      value[cell] = T(total / double(a.group * channels * a.s));
    }
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < cells * blocks; ++item) {
    const int64_t cell = item / blocks, block = item % blocks, m = cell / a.features, f = cell % a.features;
    const int64_t from = block % pieces * piece, count = length - from < piece ? length - from : piece;
    const int64_t begin = block / pieces * together, end = begin + together < lines ? begin + together : lines;
    Line<T> line{};
    line.group = a.group, line.eps = T(a.eps), line.k = kBackward ? value[cell] : T(0);
    line.x_stride = groups * a.x.n, line.d_stride = groups * a.grad.n, line.out_stride = groups * out_c * a.s;
    Vec<T> total = splat(T(0));
    double sum_out = 0;
    int steps = 0;
    for (int64_t l = begin; l < end; ++l) {
      const int64_t c = f * channels + (a.channels_last ? 0 : l), s = a.channels_last ? l : 0;
      line.x = at<T>(a.x, m, c, s) + from;
      if (kBackward) line.d = at<T>(a.grad, m, c, s) + from;
      line.out = out + m * out_c * a.s + (a.channels_last ? s * out_c + c : c * a.s) + from;
      for (int64_t i = 0; i < count; i += lane) {
        if (count - i >= lane) {
          step<T, kBackward>(line, i, lane, total);
        } else {
          step<T, kBackward>(line, i, int(count - i), total);
        }
        if (!kBackward && ++steps == kTerms) {
          sum_out += double(sum<T>(total));
          total = splat(T(0));
          steps = 0;
        }
      }
    }
    if (!kBackward) sums[item] = sum_out + double(sum<T>(total));
  }
  if (!kBackward) {
    for (int64_t cell = 0; cell < cells; ++cell) {
      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) total += sums[cell * blocks + b];
      value[cell] = T(total / double(channels * a.s));
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < a.n; ++n) {
      const T* t = value + n % groups * a.features;
      T* rest = out + n * wide * a.s + (a.channels_last ? a.c : a.c * a.s);
      for (int64_t s = 0; s < a.s; ++s)
        for (int64_t f = 0; f < a.features; ++f) rest[a.channels_last ? s * wide + f : f * a.s + s] = t[f];
    }
  }
}

}  // namespace

GENFAST_KERNEL(minibatch_stddev, MinibatchStddevArgs, run<T, false>(a))
GENFAST_KERNEL(minibatch_stddev_backward, MinibatchStddevArgs, run<T, true>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
