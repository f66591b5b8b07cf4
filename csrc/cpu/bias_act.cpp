// Bias and activation (StyleGAN2 1912.04958; NVlabs' bias_act): y = clamp(gain f(x + b), -c, c), nine f, b (C,) or none.
//
// Fused: the sum, f, the gain and the clamp; the backward dx = gain f'(v) d, which recomputes v = x + b and what the clamp
// lets through, with db = sum dx; the second order gain f''(v) d e with its sum. One pass each: forward 8 bytes an element in
// float, backward 12, second order 16. At most 60 FLOPs and one division: bound by memory bandwidth.
// The bias is constant along a row (NCHW) or a pattern that repeats (channels_last, vectors, and NCHW with few positions,
// where rows would be shorter than vectors). Sums run in T over at most 64 rows of a pattern or 4096 elements of a row, in
// double across them, in an order that does not depend on the thread count.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kStretch = 1 << 12;  // elements of a row that one thread takes at a time
constexpr int64_t kShort = 64;         // rows below this are walked as a pattern
constexpr int64_t kColumns = 8192;     // the block of a pattern that one thread takes at a time: so much of a row,
constexpr int64_t kFewRows = 16, kRows = 64;  // and fewer rows where they are long

template <class T>
const T* at(const View& v, int64_t n, int64_t c, int64_t s) {
  return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
}

template <class T>
struct Numbers {
  T alpha, gain, clamp;
};

// f, f' and f'' of v; what is not used costs nothing.
template <class T, int kAct>
GENFAST_INLINE void activation(Vec<T> v, T alpha, Vec<T>& f, Vec<T>& slope, Vec<T>& curvature) {
  constexpr T kScale = T(1.0507009873554804934193349852946), kSeluAlpha = T(1.6732632423543772848170429916717);
  const Vec<T> one = splat(T(1)), zero = splat(T(0));
  curvature = zero;
  if (kAct == BiasActArgs::kLinear) {
    f = v;
    slope = one;
  } else if (kAct == BiasActArgs::kRelu) {
    f = v <= T(0) ? zero : v;  // NaN stays
    slope = v > T(0) ? one : zero;
  } else if (kAct == BiasActArgs::kLrelu) {
    f = v > T(0) ? v : v * alpha;
    slope = v > T(0) ? one : splat(alpha);
  } else if (kAct == BiasActArgs::kTanh) {  // m = e^2|v| - 1: tanh |v| = m / (m + 2), its slope 4 (m + 1) / (m + 2)^2
    const T limit = sizeof(T) == 4 ? T(80) : T(700);
    Vec<T> a = abs<T>(v) * T(2);
    a = a > limit ? splat(limit) : a;
    const Vec<T> m = exp_minus_one<T>(a), r = T(1) / (m + T(2)), t = m * r;
    f = v < T(0) ? -t : t;
    f = v == v ? f : v;
    slope = v == v ? ((m + T(1)) * r) * (r * T(4)) : v;
    curvature = T(-2) * f * slope;
  } else if (kAct == BiasActArgs::kElu || kAct == BiasActArgs::kSelu) {
    const T scale = kAct == BiasActArgs::kSelu ? kScale : T(1);
    const T left = kAct == BiasActArgs::kSelu ? kScale * kSeluAlpha : T(1);
    Vec<T> low = v > T(0) ? zero : v;
    low = low < Types<T>::kExpMin ? splat(Types<T>::kExpMin) : low;
    f = v > T(0) ? v * scale : exp_minus_one<T>(low) * left;
    const Vec<T> e = exp<T>(v > T(0) ? zero : v) * left;
    slope = v > T(0) ? splat(scale) : e;
    curvature = v > T(0) ? zero : e;
  } else {
    Vec<T> s, rest, log_rest;  // sigma(v), sigma(-v) and log sigma(-v) = -softplus(v)
    sigmoid<T>(-v, rest, s, log_rest);
    if (kAct == BiasActArgs::kSigmoid) {
      f = s;
      slope = s * rest;
      curvature = slope * (rest - s);
    } else if (kAct == BiasActArgs::kSoftplus) {
      f = -log_rest;
      slope = s;
      curvature = s * rest;
    } else {
      f = v * s;
      slope = s * (one + v * rest);
      curvature = s * rest * (v * (rest - s) + T(2));
    }
  }
}

// kOrder 0: y; 1: dx; 2: what the gradient e of dx gives x. The clamp is infinite where there is none, and NaN passes it.
template <class T, int kAct, int kOrder, bool kClamp>
GENFAST_INLINE Vec<T> result(const Numbers<T>& k, Vec<T> v, Vec<T> d, Vec<T> e) {
  Vec<T> f, slope, curvature;
  activation<T, kAct>(v, k.alpha, f, slope, curvature);
  Vec<T> y = f * k.gain;
  if (kOrder == 0) {
    y = y > k.clamp ? splat(k.clamp) : y;
    return y < -k.clamp ? splat(-k.clamp) : y;
  }
  const Vec<T> out = kOrder == 1 ? d * (slope * k.gain) : d * e * (curvature * k.gain);
  return kClamp ? (abs<T>(y) > k.clamp ? splat(T(0)) : out) : out;
}

template <class T>
struct Row {  // a run of contiguous elements
  const T *x, *bias, *d, *e;  // bias null: the constant
  T constant;
  T *out, *sums;  // sums: null, or one an element
};

template <class T>
using RowKernel = void (*)(Numbers<T>, Row<T>, int64_t length, double* sum);

// Whole vectors, whose results are added to `total`. A function of its own, since calls around the loop would take its
// registers.
template <class T, int kAct, int kOrder, bool kClamp, bool kBias>
__attribute__((noinline)) Vec<T> run_vectors(const Numbers<T> k, const Row<T> row, int64_t length, Vec<T> total) {
  constexpr int n = lanes<T>();
  for (int64_t i = 0; i < length; i += n) {
    const Vec<T> v = load(row.x + i) + (kBias ? load(row.bias + i) : splat(row.constant));
    const Vec<T> y = result<T, kAct, kOrder, kClamp>(k, v, kOrder >= 1 ? load(row.d + i) : v, kOrder == 2 ? load(row.e + i) : v);
    store(row.out + i, y);
    if (kOrder && kBias && row.sums) store(row.sums + i, load(row.sums + i) + y);
    if (kOrder && !kBias) total += y;  // lanes behind the end hold d = 0
  }
  return total;
}

template <class T, int kAct, int kOrder, bool kClamp, bool kBias>
void run_row(const Numbers<T> k, const Row<T> row, int64_t length, double* sum_out) {
  constexpr int n = lanes<T>();
  const int rest = int(length % n);
  const int64_t whole = length - rest;
  Vec<T> total = run_vectors<T, kAct, kOrder, kClamp, kBias>(k, row, whole, splat(T(0)));
  if (rest) {
    T x[n], bias[n], d[n], e[n], sums[n], out[n];
    const auto padded = [&](const T* p, T* to) { return pad(p ? p + whole : p, rest, to); };
    const Row<T> end{padded(row.x, x), padded(row.bias, bias), padded(row.d, d), padded(row.e, e), row.constant, out,
                     const_cast<T*>(padded(row.sums, sums))};
    total = run_vectors<T, kAct, kOrder, kClamp, kBias>(k, end, n, total);
    memcpy(row.out + whole, out, size_t(rest) * sizeof(T));
    if (row.sums) memcpy(row.sums + whole, sums, size_t(rest) * sizeof(T));
  }
  if (kOrder && !kBias && sum_out) *sum_out = double(sum<T>(total));
}

// Over a tensor; `flat` takes rows of one bias, `patterned` those with a bias an element.
template <class T>
void run(const BiasActArgs& a, int order, RowKernel<T> flat, RowKernel<T> patterned) {
  const Numbers<T> k{T(a.alpha), T(a.gain), a.clamp < 0 ? T(__builtin_inf()) : T(a.clamp)};
  const T* bias = static_cast<const T*>(a.bias);
  T* out = static_cast<T*>(a.y);
  const bool summed = order && bias && a.grad_bias;
  const int64_t size = a.n * a.c * a.s;
  const int threads = size < kSerial ? 1 : a.threads;
  const auto is_dense = [&](const View& v) {
    return (a.n == 1 || v.n == a.c * a.s) &&
           (a.channels_last ? a.s == 1 || v.s == a.c : (a.c == 1 || v.c == a.s));
  };
  const bool dense = is_dense(a.x) && (order < 1 || is_dense(a.grad)) && (order < 2 || is_dense(a.grad_dx));
  const auto place = [&](int64_t n, int64_t c, int64_t s, int64_t offset) {
    Row<T> row{};
    row.x = at<T>(a.x, n, c, s) + offset;
    if (order >= 1) row.d = at<T>(a.grad, n, c, s) + offset;
    if (order == 2) row.e = at<T>(a.grad_dx, n, c, s) + offset;
    return row;
  };
  double* partial = nullptr;
  T* sum = static_cast<T*>(a.grad_bias);
  if (dense && !bias) {
    const int64_t items = (size + kStretch - 1) / kStretch;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t from = item * kStretch, length = size - from < kStretch ? size - from : kStretch;
      Row<T> row = place(0, 0, 0, from);
      row.out = out + from;
      flat(k, row, length, nullptr);
    }
  } else if (a.channels_last || (dense && a.s < kShort)) {
    // A pattern of `width` elements: the bias of channels_last, taken several times, or that of a sample.
    const int64_t each = a.channels_last ? 1 : a.s;
    int64_t times = 1;
    if (a.channels_last && dense)  // so often that a row is long enough, and whole vectors
      while (times * a.c < kShort || times * a.c % lanes<T>()) ++times;
    const int64_t width = a.c * each * times, rows = (size + width - 1) / width;
    const int64_t together = width >= kColumns / 2 ? kFewRows : kRows;
    const int64_t chunks = (rows + together - 1) / together, columns = (width + kColumns - 1) / kColumns;
    const Workspace<T> patterns(width);
    const Workspace<double> parts(summed ? chunks * width : 0);
    T* pattern = patterns.get();
    for (int64_t i = 0; i < width; ++i) pattern[i] = bias ? bias[i / each % a.c] : T(0);
    if (summed) partial = parts.get();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < chunks * columns; ++item) {
      const int64_t chunk = item / columns, first = item % columns * kColumns;
      const int64_t wide = width - first < kColumns ? width - first : kColumns;
      const int64_t last = rows < (chunk + 1) * together ? rows : (chunk + 1) * together;
      T sums[kColumns];
      for (int64_t i = 0; i < wide; ++i) sums[i] = T(0);
      for (int64_t r = chunk * together; r < last; ++r) {
        Row<T> row = dense ? place(0, 0, 0, r * width + first) : place(r / a.s, 0, r % a.s, first);
        row.bias = pattern + first;
        row.out = out + r * width + first;
        row.sums = summed ? sums : nullptr;
        const int64_t left = size - r * width - first;  // the last row of a repeated pattern may end early
        if (left > 0) patterned(k, row, left < wide ? left : wide, nullptr);
      }
      if (summed)
        for (int64_t i = 0; i < wide; ++i) partial[chunk * width + first + i] = double(sums[i]);
    }
    if (summed) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < width; ++i) partial[i] += partial[chunk * width + i];
      for (int64_t c = 0; c < a.c; ++c) {
        double total = 0;
        for (int64_t t = 0; t < times; ++t)
          for (int64_t i = 0; i < each; ++i) total += partial[(t * a.c + c) * each + i];
        sum[c] = T(total);
      }
    }
  } else {
    const int64_t stretches = (a.s + kStretch - 1) / kStretch, items = a.n * a.c * stretches;
    const Workspace<double> parts(summed ? items : 0);
    if (summed) partial = parts.get();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t line = item / stretches, from = item % stretches * kStretch;
      const int64_t n = line / a.c, c = line % a.c;
      Row<T> row = place(n, c, 0, from);
      row.constant = bias ? bias[c] : T(0);
      row.out = out + line * a.s + from;
      flat(k, row, a.s - from < kStretch ? a.s - from : kStretch, summed ? partial + item : nullptr);
    }
    if (summed) {
      for (int64_t c = 0; c < a.c; ++c) {
        double total = 0;
        for (int64_t n = 0; n < a.n; ++n)
          for (int64_t i = 0; i < stretches; ++i) total += partial[(n * a.c + c) * stretches + i];
        sum[c] = T(total);
      }
    }
  }
}

// Where f costs more than f' alone, derivatives without a clamp leave it out.
template <class T, int kAct, int kOrder>
void clamped_or_not(const BiasActArgs& a) {
  if constexpr (kOrder && kAct >= BiasActArgs::kElu && kAct <= BiasActArgs::kSoftplus) {
    if (a.clamp < 0) return run<T>(a, kOrder, run_row<T, kAct, kOrder, false, false>, run_row<T, kAct, kOrder, false, true>);
  }
  run<T>(a, kOrder, run_row<T, kAct, kOrder, true, false>, run_row<T, kAct, kOrder, true, true>);
}

template <class T, int kOrder>
void chosen(const BiasActArgs& a) {
  if (a.n * a.c * a.s == 0) {
    if (kOrder && a.grad_bias) memset(a.grad_bias, 0, size_t(a.c) * sizeof(T));
    return;
  }
  switch (a.act) {
    case BiasActArgs::kTanh: return clamped_or_not<T, BiasActArgs::kTanh, kOrder>(a);
    case BiasActArgs::kSigmoid: return clamped_or_not<T, BiasActArgs::kSigmoid, kOrder>(a);
    case BiasActArgs::kElu: return clamped_or_not<T, BiasActArgs::kElu, kOrder>(a);
    case BiasActArgs::kSelu: return clamped_or_not<T, BiasActArgs::kSelu, kOrder>(a);
    case BiasActArgs::kSoftplus: return clamped_or_not<T, BiasActArgs::kSoftplus, kOrder>(a);
    case BiasActArgs::kSwish: return clamped_or_not<T, BiasActArgs::kSwish, kOrder>(a);
    default: break;
  }
  if constexpr (kOrder < 2) {  // the second order of what is linear in pieces is zero, and not asked for
    if (a.act == BiasActArgs::kRelu) return clamped_or_not<T, BiasActArgs::kRelu, kOrder>(a);
    if (a.act == BiasActArgs::kLrelu) return clamped_or_not<T, BiasActArgs::kLrelu, kOrder>(a);
    clamped_or_not<T, BiasActArgs::kLinear, kOrder>(a);
  }
}

}  // namespace

GENFAST_KERNEL(bias_act, BiasActArgs, chosen<T, 0>(a))
GENFAST_KERNEL(bias_act_backward, BiasActArgs, chosen<T, 1>(a))
GENFAST_KERNEL(bias_act_second, BiasActArgs, chosen<T, 2>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
