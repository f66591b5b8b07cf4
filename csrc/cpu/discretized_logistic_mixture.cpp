// Discretised mixture of logistics (PixelCNN++ 1701.05517 sec. 2.1, 2.2): the negative log-likelihood, its gradient, samples.
//
// params (N, P, S), P = 10 K for 3 channels and 3 K for 1, levels x (N, C, S), nll (N, S). Fused: the split into logits,
// means, log-scales and coefficients, the conditioning on the colours before, K C logistic bins and both sums over K. The
// forward reads params and x once and writes nll; the backward reads params and x once, keeps one vector of positions of all
// P gradients in the first cache, and writes the gradient of params. 3 exponentials a bin and a tanh a coefficient: with
// 512-bit vectors near the bound of memory bandwidth, below it bound by arithmetic.
//
// A bin, in units of bins: d = v - (L-1)/2 (1 + mean), t = 2 / ((L-1) s), m = d t and w = t/2; with r = e^-|m|, q = e^-w
//   sigma(m + w) - sigma(m - w) = (1 - q^2) r / ((r + q) (1 + q r)),
// written in e^-||m| - w|, e^-(|m| + w) and e^-t, so that nothing overflows or cancels; log t is added apart where t is small.
#include <stdlib.h>

#include <algorithm>

#include "dtype_switch.h"
#include "mixture.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 8;  // positions

int64_t level_at(const LogisticMixtureArgs& a, int64_t n, int64_t c, int64_t s) {
  const int64_t i = n * a.x.n + c * a.x.c + s * a.x.s;
  switch (a.x_bytes) {
    case 1: return a.x_signed ? int64_t(static_cast<const int8_t*>(a.x.data)[i]) : static_cast<const uint8_t*>(a.x.data)[i];
    case 2: return static_cast<const int16_t*>(a.x.data)[i];
    case 4: return static_cast<const int32_t*>(a.x.data)[i];
    default: return static_cast<const int64_t*>(a.x.data)[i];
  }
}

template <class T>
GENFAST_INLINE Vec<T> choose(Mask<T> mask, Vec<T> a, Vec<T> b) {
  return from_bits<T>((bits<T>(a) & mask) | (bits<T>(b) & ~mask));
}

// 1 - e^-y over y, for 0 <= y <= ln2 / 2.
template <class T>
GENFAST_INLINE Vec<T> decay(Vec<T> y) {
  return T(1) - y * exp_tail(-y);
}

template <class T>
struct Levels {  // of one colour: d before the mean is taken off, and which bins are open
  Vec<T> u;
  Mask<T> first, last;
};

template <class T>
struct Bin {
  Vec<T> linear, factor;      // log p = linear + log factor, factor in [0.07, 1]
  Vec<T> by_d, by_log_scale;  // derivatives of log p
};

constexpr double kSmall = 0.3465735902799726;  // ln2 / 2, as far as exp_tail reaches

template <class T, bool kBackward>
GENFAST_INLINE Bin<T> bin(Vec<T> d, Vec<T> raw_log_scale, const Levels<T>& x, T half, T log_half) {
  const Vec<T> log_scale = raw_log_scale < T(-7) ? splat(T(-7)) : raw_log_scale;
  const Vec<T> t = exp<T>(-log_scale) * (T(1) / half), ad = abs<T>(d);
  const Vec<T> m = ad * t, w = t * T(0.5);
  const Vec<T> near = (ad - T(0.5)) * t;
  const Mask<T> outside = ad >= T(0.5), small = t < T(kSmall), open = x.first | x.last;
  const Vec<T> e_near = exp<T>(-abs<T>(near)), twice = exp<T>(T(-2) * choose<T>(outside, w, m));
  const Vec<T> e_far = e_near * twice, other = e_near * e_far;
  const Vec<T> e_t = choose<T>(outside, twice, other), phi = decay<T>(t);
  // The open bins: log sigma(z), where |z| is one of the two distances above.
  const Vec<T> inward = choose<T>(x.first, d, -d);
  const Mask<T> away = inward >= T(0);
  const Vec<T> z = (inward + T(0.5)) * t, e_z = choose<T>(away, e_far, e_near);
  const Mask<T> z_positive = z >= T(0);
  const Vec<T> up_near = e_near + T(1), up_far = e_far + T(1), up_z = e_z + T(1);
  const Vec<T> inverse = T(1) / choose<T>(open, up_z, up_near * up_far);
  const Vec<T> gap = choose<T>(small, phi, T(1) - e_t), zero = splat(T(0));
  const Vec<T> between = choose<T>(outside, -near, zero) + choose<T>(small, T(-1) * log_scale - log_half, zero);
  Bin<T> b;
  b.linear = choose<T>(open, choose<T>(z_positive, zero, z), between);
  b.factor = choose<T>(open, inverse, gap * inverse);
  if (kBackward) {
    const Vec<T> y = m * T(2);
    const Vec<T> spread = choose<T>(Mask<T>(y < T(kSmall)), y * decay<T>(y), T(1) - choose<T>(outside, other, twice));
    const Vec<T> high = choose<T>(outside, splat(T(1)), e_near);
    const Vec<T> slope = spread * high * inverse;  // -d log p / d|m|
    const Vec<T> tail = (e_far * up_near + high * up_far) * inverse;
    const Vec<T> by_w = w * tail + e_t * choose<T>(small, splat(T(1)), t) / gap;
    const Vec<T> beyond = choose<T>(z_positive, e_z, splat(T(1))) * inverse;  // sigma(-z)
    const Mask<T> negative = d < T(0);
    b.by_d = t * choose<T>(open, choose<T>(x.first, beyond, -beyond), choose<T>(negative, slope, -slope));
    const Vec<T> by_log_t = choose<T>(open, z * beyond, by_w - m * slope);
    b.by_log_scale = choose<T>(Mask<T>(raw_log_scale < T(-7)), zero, -by_log_t);
  }
  return b;
}

template <class T>
GENFAST_INLINE Vec<T> log_sum_exp(const T* values, int64_t stride, int64_t k, Vec<T>& top, Vec<T>& sum) {
  top = load(values);
  for (int64_t i = 1; i < k; ++i) {
    const Vec<T> v = load(values + i * stride);
    top = v > top ? v : top;
  }
  sum = splat(T(0));
  for (int64_t i = 0; i < k; ++i) sum += exp<T>(load(values + i * stride) - top);
  return top + log<T>(sum);
}

// One vector of positions. Parameter j of them stands at p + j * stride. scratch holds P + K vectors. Returns the nll;
// backward, dp + j * dstride takes the gradients.
template <class T, int kChannels, bool kBackward>
Vec<T> block(const T* p, int64_t stride, int64_t k, const Levels<T>* x, T half, T log_half, T* scratch, Vec<T> g, T* dp,
             int64_t dstride, bool past_cache) {
  constexpr int64_t kEach = kChannels == 3 ? 3 : 2, kLanes = lanes<T>();
  T *joint = scratch, *grads = scratch + k * kLanes;
  for (int64_t i = 0; i < k; ++i) {
    Vec<T> linear = load(p + i * stride), product = splat(T(1));
    for (int c = 0; c < kChannels; ++c) {
      const int64_t at = k + c * kEach * k + i;
      // u - half mean, where also without fused products nothing is lost: L/2 mean is exact for L a power of two.
      const Vec<T> mean = load(p + at * stride);
      Vec<T> d = (x[c].u - mean * (half + T(0.5))) + mean * T(0.5), a = splat(T(0)), b = a;
      if (c >= 1) {
        a = tanh<T>(load(p + (k + (c == 1 ? 2 : 5) * k + i) * stride));
        d -= a * x[0].u;
      }
      if (c == 2) {
        b = tanh<T>(load(p + (k + 8 * k + i) * stride));
        d -= b * x[1].u;
      }
      const Bin<T> found = bin<T, kBackward>(d, load(p + (at + k) * stride), x[c], half, log_half);
      linear += found.linear;
      product *= found.factor;
      if (kBackward) {  // of -log p, but for the responsibility
        store(grads + (c * kEach * k + i) * kLanes, half * found.by_d);
        store(grads + ((c * kEach + 1) * k + i) * kLanes, -found.by_log_scale);
        if (c >= 1) store(grads + ((c == 1 ? 2 : 5) * k + i) * kLanes, found.by_d * x[0].u * (T(1) - a * a));
        if (c == 2) store(grads + (8 * k + i) * kLanes, found.by_d * x[1].u * (T(1) - b * b));
      }
    }
    store(joint + i * kLanes, linear + log<T>(product));
  }
  Vec<T> top_pi, sum_pi, top, sum;
  const Vec<T> nll = log_sum_exp<T>(p, stride, k, top_pi, sum_pi) - log_sum_exp<T>(joint, kLanes, k, top, sum);
  if (kBackward) {
    const Vec<T> weight_pi = g / sum_pi, weight = g / sum;
    auto put = [&](int64_t j, Vec<T> v) {
      if (past_cache)
        stream(dp + j * dstride, v);
      else
        store(dp + j * dstride, v);
    };
    for (int64_t i = 0; i < k; ++i) {
      const Vec<T> r = exp<T>(load(joint + i * kLanes) - top) * weight;
      put(i, exp<T>(load(p + i * stride) - top_pi) * weight_pi - r);
      store(joint + i * kLanes, r);
    }
    for (int64_t j = 0; j < kChannels * kEach; ++j)
      for (int64_t i = 0; i < k; ++i)
        put(k + j * k + i, load(grads + (j * k + i) * kLanes) * load(joint + i * kLanes));
  }
  return nll;
}

// A square of vectors, its rows and columns exchanged.
template <class T>
GENFAST_INLINE void transpose(Vec<T>* v) {
  constexpr int n = lanes<T>();
#pragma GCC unroll 4
  for (int h = 1; h < n; h *= 2) {
    Mask<T> low, high;
    for (int l = 0; l < n; ++l) {
      low[l] = l & h ? n + l - h : l;
      high[l] = l & h ? n + l : l + h;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & h) continue;
      const Vec<T> a = v[i], b = v[i + h];
#ifdef __clang__
      for (int l = 0; l < n; ++l) {
        v[i][l] = low[l] < n ? a[low[l]] : b[low[l] - n];
        v[i + h][l] = high[l] < n ? a[high[l]] : b[high[l] - n];
      }
#else
      v[i] = __builtin_shuffle(a, b, low);
      v[i + h] = __builtin_shuffle(a, b, high);
#endif
    }
  }
}

// Rows of `width` contiguous elements, one a position, to columns of kLanes positions; and back.
template <class T>
void gather_rows(const T* const* rows, int count, int64_t width, T* to) {
  constexpr int n = lanes<T>();
  int64_t j = 0;
  if (count == n) {
    for (; j + n <= width; j += n) {
      Vec<T> v[n];
      for (int i = 0; i < n; ++i) v[i] = load(rows[i] + j);
      transpose<T>(v);
      for (int i = 0; i < n; ++i) store(to + (j + i) * n, v[i]);
    }
  }
  for (; j < width; ++j)
    for (int i = 0; i < n; ++i) to[j * n + i] = i < count ? rows[i][j] : T(0);
}

template <class T>
void scatter_rows(const T* from, int count, int64_t width, T* to) {
  constexpr int n = lanes<T>();
  int64_t j = 0;
  if (count == n) {
    for (; j + n <= width; j += n) {
      Vec<T> v[n];
      for (int i = 0; i < n; ++i) v[i] = load(from + (j + i) * n);
      transpose<T>(v);
      for (int i = 0; i < n; ++i) store(to + i * width + j, v[i]);
    }
  }
  for (; j < width; ++j)
    for (int i = 0; i < count; ++i) to[i * width + j] = from[j * n + i];
}

template <class T, int kChannels, bool kBackward>
void run(const LogisticMixtureArgs& a) {
  constexpr int kLanes = lanes<T>();
  const int64_t k = a.mixtures, width = k * (kChannels == 3 ? 10 : 3);
  const T half = T(a.levels - 1) / 2, log_half = T(::log(double(a.levels - 1) / 2));
  const int64_t positions = a.channels_last ? a.n * a.s : a.s;  // in a row of blocks
  const int64_t per_row = (positions + kLanes - 1) / kLanes, blocks = a.channels_last ? per_row : a.n * per_row;
  const int threads = a.n * a.s < kSerial ? 1 : a.threads;
  const PerThread<T> memory(threads, (2 * width + k) * kLanes);
#pragma omp parallel num_threads(threads)
  {
    T *scratch = memory.get(), *columns = scratch + (width + k) * kLanes;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < blocks; ++item) {
      const int64_t row = a.channels_last ? 0 : item / per_row, start = (item - row * per_row) * kLanes;
      const int count = positions - start < kLanes ? int(positions - start) : kLanes;
      const int64_t index = row * positions + start;  // among all N S positions
      T u[3][kLanes] = {}, weights[kLanes] = {};
      for (int i = 0; i < count; ++i) {
        const int64_t n = (index + i) / a.s, s = (index + i) - n * a.s;
        for (int c = 0; c < kChannels; ++c) u[c][i] = T(level_at(a, n, c, s)) - half;
        if (kBackward) weights[i] = static_cast<const T*>(a.grad)[index + i];
      }
      Levels<T> x[3];
      for (int c = 0; c < kChannels; ++c) {
        x[c].u = load(u[c]);
        x[c].first = x[c].u <= -half;
        x[c].last = x[c].u >= half;
      }
      const T* from = columns;
      int64_t stride = kLanes, dstride = kLanes;
      T* to = columns;  // a column is read before its gradient is known, and not again after
      bool direct = false;
      if (a.channels_last) {
        const T* rows[kLanes];
        for (int i = 0; i < count; ++i) {
          const int64_t n = (index + i) / a.s, s = (index + i) - n * a.s;
          rows[i] = static_cast<const T*>(a.params.data) + n * a.params.n + s * a.params.s;
        }
        gather_rows(rows, count, width, columns);
      } else {
        const T* base = static_cast<const T*>(a.params.data) + row * a.params.n + start;
        if (count == kLanes) {
          from = base, stride = a.params.c, direct = true;
          to = static_cast<T*>(a.grad_params) + row * width * a.s + start, dstride = a.s;
        } else {
          for (int64_t j = 0; j < width; ++j) store(columns + j * kLanes, load_part(base + j * a.params.c, count));
        }
      }
      const bool past_cache = direct && kBackward && a.stream && dstride % kLanes == 0 && aligned(to);
      const Vec<T> nll = block<T, kChannels, kBackward>(from, stride, k, x, half, log_half, scratch, load(weights), to, dstride,
                                                        past_cache);
      if (!kBackward) {
        store_part(static_cast<T*>(a.nll) + index, nll, count);
      } else if (a.channels_last) {
        scatter_rows(to, count, width, static_cast<T*>(a.grad_params) + index * width);
      } else if (!direct) {
        T* out = static_cast<T*>(a.grad_params) + row * width * a.s + start;
        for (int64_t j = 0; j < width; ++j) store_part(out + j * a.s, load(to + j * kLanes), count);
      }
    }
  }
}

template <class T>
void sample(const LogisticMixtureArgs& a) {
  const int threads = a.n * a.s < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < a.n * a.s; ++i) {
    const int64_t n = i / a.s, s = i - n * a.s;
    sample_mixture<T>(static_cast<const T*>(a.params.data) + n * a.params.n + s * a.params.s, a.params.c, a.mixtures,
                      a.channels, a.levels, T(a.temperature), a.uniforms + n * (1 + a.channels) * a.s + s, a.s,
                      a.samples + n * a.channels * a.s + s, a.s);
  }
  const int64_t *first = a.samples, *end = first + a.n * a.channels * a.s;
  const int64_t* fault = std::find_if(first, end, [](int64_t level) { return level < 0; });
  *a.fault = fault == end ? -1 : fault - first;
}

template <class T>
void nll(const LogisticMixtureArgs& a) {
  a.channels == 3 ? run<T, 3, false>(a) : run<T, 1, false>(a);
}

template <class T>
void nll_backward(const LogisticMixtureArgs& a) {
  a.channels == 3 ? run<T, 3, true>(a) : run<T, 1, true>(a);
}

}  // namespace

GENFAST_KERNEL(logistic_mixture_nll, LogisticMixtureArgs, nll<T>(a))
GENFAST_KERNEL(logistic_mixture_nll_backward, LogisticMixtureArgs, nll_backward<T>(a))
GENFAST_KERNEL(logistic_mixture_sample, LogisticMixtureArgs, sample<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
