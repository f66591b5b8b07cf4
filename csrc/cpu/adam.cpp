// One step of Adam over many tensors (Kingma and Ba, arXiv:1412.6980, algorithm 1; AdamW, 1711.05101, algorithm 2), in the order
// of operations of torch.optim.Adam:
//
//   m += (1 - beta1)(g - m),  v = beta2 v + (1 - beta2) g^2,  p -= lr / c1  m / (sqrt(v) / sqrt(c2) + eps)
//
// with c1 = 1 - beta1^t and c2 = 1 - beta2^t. Fused: all of it, for all tensors of a group in one call. Bytes: p, m and v read and
// written, g read: 28 bytes a float32 weight. Bound by memory, and for the small networks of flows by the call itself.
#include <algorithm>

#include "dtype_switch.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 17;  // weights below which a second thread does not pay

template <class T>
struct Step {
  T rate1, beta2, rate2, size, root, eps, decay, shrink;
  bool maximize;

  template <class V>
  GENFAST_INLINE_MEMBER V gradient(V g, V p) const {
    g = maximize ? -g : g;
    return decay != 0 ? g + p * decay : g;
  }
};

template <class T>
void update(const Step<T>& s, T* p, const T* g, T* m, T* v, int64_t n) {
  constexpr int w = lanes<T>();
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    Vec<T> x = load(p + i);
    const Vec<T> d = s.gradient(load(g + i), x), before = load(m + i), mean = before + (d - before) * s.rate1;
    const Vec<T> square = load(v + i) * s.beta2 + d * d * s.rate2;
    x *= s.shrink;
    store(m + i, mean);
    store(v + i, square);
    store(p + i, x - mean / (root(square) / s.root + s.eps) * s.size);
  }
  for (; i < n; ++i) {
    const T d = s.gradient(g[i], p[i]);
    m[i] += (d - m[i]) * s.rate1;
    v[i] = v[i] * s.beta2 + d * d * s.rate2;
    const T square = sizeof(T) == 4 ? T(__builtin_sqrtf(float(v[i]))) : T(__builtin_sqrt(double(v[i])));
    p[i] = p[i] * s.shrink - m[i] / (square / s.root + s.eps) * s.size;
  }
}

template <class T>
void step(const AdamArgs& a) {
  const Step<T> s{T(1 - a.beta1), T(a.beta2), T(1 - a.beta2), T(a.lr / a.correction1), T(a.root_correction2), T(a.eps),
                  T(a.decoupled ? 0 : a.weight_decay), T(a.decoupled ? 1 - a.lr * a.weight_decay : 1), a.maximize};
  int64_t total = 0;
  for (int64_t i = 0; i < a.count; ++i) total += a.sizes[i];
  const int threads = total < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = total * t / threads, end = total * (t + 1) / threads;
    int64_t start = 0;  // of the tensor, among all weights
    for (int64_t i = 0; i < a.count && start < end; start += a.sizes[i++]) {
      const int64_t from = std::max(begin - start, int64_t(0)), to = std::min(end - start, a.sizes[i]);
      if (from >= to) continue;
      T* const* of = reinterpret_cast<T* const*>(a.addresses) + 4 * i;
      update<T>(s, of[0] + from, of[1] + from, of[2] + from, of[3] + from, to - from);
    }
  }
}

}  // namespace

GENFAST_KERNEL(adam, AdamArgs, step<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
