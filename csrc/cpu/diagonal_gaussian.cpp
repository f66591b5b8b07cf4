// The diagonal Gaussian of a variational autoencoder (Kingma and Welling 1312.6114, section 2.4 and appendix B), sampled and
// compared with its prior N(nu, tau^2) in one pass: with t = log sigma^2 - log tau^2,
//   z = mu + sigma noise,   KL = 1/2 sum_d (e^t - 1 - t) + (mu - nu)^2 / tau^2.
//
// N rows of D dense elements. Fused: both exponentials, the sample, the KL and its sum over each row, and on request over each
// column. Without a prior the forward reads 12 and writes 4 bytes an element in float, the backward reads 16 and writes 8.
// Bound by memory bandwidth, for arrays in the cache by the two exponentials. e^t - 1 - t does not cancel: where |t| < ln2 / 2
// it is t^2 times the exponential's own polynomial, so the KL of a posterior near its prior is right and never negative.
// Rows are cut into chunks and taken in groups that depend on the shape alone; sums over chunks and groups are in double.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 1024;
constexpr int64_t kGroup = 32;

// e^t - 1 and e^t - 1 - t, infinite where e^t is.
template <class T>
GENFAST_INLINE void excess(Vec<T> t, Vec<T>& minus_one, Vec<T>& minus_line) {
  Vec<T> c = t > Types<T>::kExpMax ? splat(Types<T>::kExpMax) : t, rounded;
  c = c < Types<T>::kExpMin ? splat(Types<T>::kExpMin) : c;
  const Vec<T> r = reduce<T>(c, rounded), q = exp_tail(r) * (r * r);
  // Half of 2^n, which is a number also where 2^n is not.
  const Vec<T> half = from_bits<T>(bits<T>(splat(T(0.5))) + (bits<T>(rounded) << Types<T>::kMantissa));
  const Vec<T> infinity = splat(T(__builtin_inf()));
  const Vec<T> m = T(2) * (half * (q + r) + (half - T(0.5)));
  minus_one = t > Types<T>::kExpMax ? infinity : m;
  minus_line = t > Types<T>::kExpMax ? infinity : half == T(0.5) ? q : m - t;
}

template <class T>
GENFAST_INLINE Vec<T> take(const T* p, int64_t i, int count) {
  return !p ? Vec<T>{} : count == lanes<T>() ? load(p + i) : load_part(p + i, count);
}

template <class T>
GENFAST_INLINE void put(T* p, int64_t i, Vec<T> v, int count) {
  if (!p) return;
  if (count == lanes<T>())
    store(p + i, v);
  else
    store_part(p + i, v, count);
}

template <class T>
GENFAST_INLINE const T* row(const DiagonalGaussianArgs::Rows& r, int64_t n) {
  return r.data ? static_cast<const T*>(r.data) + n * r.stride : nullptr;
}

template <class T>
GENFAST_INLINE T* row(void* p, int64_t n, int64_t d) {
  return p ? static_cast<T*>(p) + n * d : nullptr;
}

template <class T, bool kNoise, bool kPrior>
void forward(const DiagonalGaussianArgs& a) {
  constexpr int width = lanes<T>();
  const int64_t chunks = (a.d + kChunk - 1) / kChunk, groups = (a.n + kGroup - 1) / kGroup;
  const int threads = a.n * a.d < kSerial ? 1 : a.threads;
  const Workspace<double> all_sums(a.n * chunks);
  const Workspace<T> all_columns(a.dimension ? groups * a.d : 0);
  double* sums = all_sums.get();
  T* columns = a.dimension ? all_columns.get() : nullptr;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < groups * chunks; ++item) {
    const int64_t first = item / chunks * kGroup, last = first + kGroup < a.n ? first + kGroup : a.n;
    const int64_t from = item % chunks * kChunk, to = from + kChunk < a.d ? from + kChunk : a.d;
    T* column = columns ? columns + item / chunks * a.d : nullptr;
    for (int64_t n = first; n < last; ++n) {
      const T *mean = row<T>(a.mean, n), *log_variance = row<T>(a.log_variance, n), *noise = row<T>(a.noise, n);
      const T *prior_mean = row<T>(a.prior_mean, n), *prior_log_variance = row<T>(a.prior_log_variance, n);
      T* z = row<T>(a.z, n, a.d);
      Vec<T> part[2] = {};
      const auto step = [&](int64_t i, int count, Vec<T>& total) __attribute__((always_inline)) {
        const Vec<T> m = take(mean, i, count), v = take(log_variance, i, count);
        if (kNoise) put(z, i, m + exp<T>(v * T(0.5)) * take(noise, i, count), count);
        Vec<T> delta = m, t = v, minus_one, kl;
        if (kPrior) {
          const Vec<T> q = take(prior_log_variance, i, count);
          delta -= take(prior_mean, i, count), t -= q;
          excess<T>(t, minus_one, kl);
          kl = T(0.5) * (kl + delta * delta * exp<T>(-q));
        } else {
          excess<T>(t, minus_one, kl);
          kl = T(0.5) * (kl + delta * delta);
        }
        total += kl;  // beyond `count` all is zero, the KL too
        if (column) put(column, i, n == first ? kl : take<T>(column, i, count) + kl, count);
      };
      int64_t i = from;
      for (; i + 2 * width <= to; i += 2 * width) {
        step(i, width, part[0]);
        step(i + width, width, part[1]);
      }
      for (; i < to; i += width) step(i, to - i < width ? int(to - i) : width, part[0]);
      sums[n * chunks + item % chunks] = double(sum<T>(part[0] + part[1]));
    }
  }
  for (int64_t n = 0; n < a.n; ++n) {
    double total = 0;
    for (int64_t k = 0; k < chunks; ++k) total += sums[n * chunks + k];
    static_cast<T*>(a.kl)[n] = T(total);
  }
  if (columns) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a.d; ++i) {
      double total = 0;
      for (int64_t g = 0; g < groups; ++g) total += double(columns[g * a.d + i]);
      static_cast<T*>(a.dimension)[i] = T(total);
    }
  }
}

template <class T, bool kSample, bool kPrior>
void backward(const DiagonalGaussianArgs& a) {
  constexpr int width = lanes<T>();
  const int64_t chunks = (a.d + kChunk - 1) / kChunk;
  const int threads = a.n * a.d < kSerial ? 1 : a.threads;
  const bool has_kl = a.grad_kl || a.grad_dimension;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * chunks; ++item) {
    const int64_t n = item / chunks, from = item % chunks * kChunk, to = from + kChunk < a.d ? from + kChunk : a.d;
    const T *mean = row<T>(a.mean, n), *log_variance = row<T>(a.log_variance, n), *noise = row<T>(a.noise, n);
    const T *prior_mean = row<T>(a.prior_mean, n), *prior_log_variance = row<T>(a.prior_log_variance, n);
    const T *grad_z = row<T>(a.grad_z, n), *by_dimension = static_cast<const T*>(a.grad_dimension);
    const Vec<T> by_row = splat(a.grad_kl ? static_cast<const T*>(a.grad_kl)[n] : T(0));
    T *dmean = row<T>(a.grad_mean, n, a.d), *dlog_variance = row<T>(a.grad_log_variance, n, a.d);
    T *dnoise = row<T>(a.grad_noise, n, a.d), *dprior_mean = row<T>(a.grad_prior_mean, n, a.d);
    T* dprior_log_variance = row<T>(a.grad_prior_log_variance, n, a.d);
    const auto step = [&](int64_t i, int count) __attribute__((always_inline)) {
      const Vec<T> v = take(log_variance, i, count);
      Vec<T> by_mean{}, by_t{}, gz{}, by_sigma{};
      if (has_kl) {
        const Vec<T> g = by_row + take(by_dimension, i, count);
        Vec<T> delta = take(mean, i, count), t = v, minus_line;
        if (kPrior) {
          const Vec<T> q = take(prior_log_variance, i, count);
          delta -= take(prior_mean, i, count), t -= q;
          by_mean = g * delta * exp<T>(-q);
        } else {
          by_mean = g * delta;
        }
        excess<T>(t, by_t, minus_line);
        by_t *= g;
        if (kPrior) {
          put(dprior_mean, i, -by_mean, count);
          put(dprior_log_variance, i, T(-0.5) * (by_t + by_mean * delta), count);
        }
      } else if (kPrior) {
        put(dprior_mean, i, Vec<T>{}, count);
        put(dprior_log_variance, i, Vec<T>{}, count);
      }
      if (kSample) {
        gz = take(grad_z, i, count);
        const Vec<T> pull = gz * exp<T>(v * T(0.5));
        by_sigma = pull * take(noise, i, count);
        put(dnoise, i, pull, count);
      } else {
        put(dnoise, i, Vec<T>{}, count);
      }
      put(dmean, i, by_mean + gz, count);
      put(dlog_variance, i, T(0.5) * (by_t + by_sigma), count);
    };
    for (int64_t i = from; i < to; i += width) step(i, to - i < width ? int(to - i) : width);
  }
}

template <class T>
void forward(const DiagonalGaussianArgs& a) {
  const bool prior = a.prior_mean.data || a.prior_log_variance.data;
  if (a.noise.data)
    prior ? forward<T, true, true>(a) : forward<T, true, false>(a);
  else
    prior ? forward<T, false, true>(a) : forward<T, false, false>(a);
}

template <class T>
void backward(const DiagonalGaussianArgs& a) {
  const bool prior = a.prior_mean.data || a.prior_log_variance.data;
  if (a.noise.data && a.grad_z.data)
    prior ? backward<T, true, true>(a) : backward<T, true, false>(a);
  else
    prior ? backward<T, false, true>(a) : backward<T, false, false>(a);
}

}  // namespace

GENFAST_KERNEL(diagonal_gaussian, DiagonalGaussianArgs, forward<T>(a))
GENFAST_KERNEL(diagonal_gaussian_backward, DiagonalGaussianArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
