// Spectral normalisation (SN-GAN 1802.05957, algorithm 1): v = n(W^T u), u = n(W v), sigma = u^T W v, W / sigma.
//
// W a dense array (a, h, b), which is the matrix of h rows and a * b columns; u (h,), v (a * b,). W is read twice an
// iteration (sigma is the dot product of u with the W v that u was made of) and once for the scaling, which writes W / sigma:
// 16 bytes an element in float with one iteration. The backward, with u and v constant,
//   dW = G / sigma + (g_sigma - <G, W> / sigma^2) u v^T,
// reads G twice, W once and writes dW (16). 4 FLOPs an element and iteration: bound by bandwidth, of the cache where W fits.
// Each element of a product is summed in an order of its own, whatever the threads; norms and <G, W> in double.
#include <math.h>
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 15;
constexpr int64_t kChunk = 4096;   // elements of one partial sum of <G, W>
constexpr int64_t kColumns = 1024;  // columns whose sums stay in the first cache

GENFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Dot products of K rows with x, in step: as many streams of memory.
template <class T, int K>
GENFAST_INLINE void dot_rows(const T* row, int64_t columns, const T* x, T* y) {
  constexpr int n = lanes<T>();
  Vec<T> even[K] = {}, odd[K] = {};
  int64_t i = 0;
  for (; i + 2 * n <= columns; i += 2 * n) {
    const Vec<T> a = load(x + i), b = load(x + i + n);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      even[k] += load(row + k * columns + i) * a;
      odd[k] += load(row + k * columns + i + n) * b;
    }
  }
  for (; i < columns; i += n) {
    const int count = int(least(n, columns - i));
    const Vec<T> a = load_part(x + i, count);
    for (int k = 0; k < K; ++k) even[k] += load_part(row + k * columns + i, count) * a;
  }
  for (int k = 0; k < K; ++k) y[k] = sum<T>(even[k] + odd[k]);
}

// y[r] = row r . x
template <class T>
void rows_dot(const T* m, int64_t rows, int64_t columns, const T* x, T* y, int threads) {
  const int64_t blocks = (rows + 3) / 4;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t r = 4 * block;
    if (r + 4 <= rows) {
      dot_rows<T, 4>(m + r * columns, columns, x, y + r);
    } else {
      for (; r < rows; ++r) dot_rows<T, 1>(m + r * columns, columns, x, y + r);
    }
  }
}

// y[c] = sum over rows of x[r] m[r][c], for c in [from, to); rows lie `step` apart.
template <class T>
void add_rows(const T* m, int64_t rows, int64_t step, const T* x, T* y, int64_t from, int64_t to) {
  for (int64_t start = from; start < to; start += kColumns) {
    const int64_t size = least(to - start, kColumns);
    T* out = y + start;
    for (int64_t i = 0; i < size; ++i) out[i] = T(0);
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) {
      const T *p = m + r * step + start, *f = x + r;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const T *q = p + i;
        const T low = (f[0] * q[0] + f[1] * q[step]) + (f[2] * q[2 * step] + f[3] * q[3 * step]);
        const T high = (f[4] * q[4 * step] + f[5] * q[5 * step]) + (f[6] * q[6 * step] + f[7] * q[7 * step]);
        out[i] += low + high;
      }
    }
    for (; r < rows; ++r) {
      const T* p = m + r * step + start;
      const T f = x[r];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] += f * p[i];
    }
  }
}

template <class T>
void rows_sum(const T* m, int64_t rows, int64_t columns, const T* x, T* y, int threads) {
  const int64_t parts = least(threads, (columns + 63) / 64);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < parts; ++k) {  // whole cache lines of columns to each
    const int64_t blocks = (columns + 15) / 16;
    add_rows(m, rows, columns, x, y, least(columns, blocks * k / parts * 16), least(columns, blocks * (k + 1) / parts * 16));
  }
}

// t = W v
template <class T>
void times(const SpectralNormArgs& a, const T* w, const T* v, T* t, int threads) {
  if (a.b == 1) return rows_sum(w, a.a, a.h, v, t, threads);  // W^T lies there, (a, h)
  if (a.a == 1) return rows_dot(w, a.h, a.b, v, t, threads);
  constexpr int n = lanes<T>();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t h = 0; h < a.h; ++h) {
    Vec<T> part = splat(T(0));
    for (int64_t k = 0; k < a.a; ++k) {
      const T *row = w + (k * a.h + h) * a.b, *x = v + k * a.b;
      int64_t i = 0;
      for (; i + n <= a.b; i += n) part += load(row + i) * load(x + i);
      if (i < a.b) part += load_part(row + i, int(a.b - i)) * load_part(x + i, int(a.b - i));
    }
    t[h] = sum<T>(part);
  }
}

// s = W^T u
template <class T>
void transposed_times(const SpectralNormArgs& a, const T* w, const T* u, T* s, int threads) {
  if (a.b == 1) return rows_dot(w, a.a, a.h, u, s, threads);
  if (a.a == 1) return rows_sum(w, a.h, a.b, u, s, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < a.a; ++k) add_rows(w + k * a.h * a.b, a.h, a.b, u, s + k * a.b, int64_t(0), a.b);
}

// x / max(|x|, eps)
template <class T>
void normalise(const T* x, int64_t size, double eps, T* out) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += double(x[i]) * double(x[i]);
  const double norm = sqrt(sum), inverse = 1 / (norm > eps ? norm : eps);
  for (int64_t i = 0; i < size; ++i) out[i] = T(double(x[i]) * inverse);
}

template <class T>
double dot(const T* x, const T* y, int64_t size) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

template <class T>
void forward(const SpectralNormArgs& a) {
  const T* w = static_cast<const T*>(a.weight);
  T *u = static_cast<T*>(a.u), *v = static_cast<T*>(a.v);
  const int64_t columns = a.a * a.b, total = columns * a.h;
  const int threads = total < kSerial ? 1 : a.threads;
  const Workspace<T> products(a.h > columns ? a.h : columns);
  T* product = products.get();
  double sigma = 0;
  for (int64_t k = 0; k < a.iterations; ++k) {
    if (a.from_v) {
      times(a, w, v, product, threads);
      normalise(product, a.h, a.eps, u);
    }
    transposed_times(a, w, u, product, threads);
    normalise(product, columns, a.eps, v);
    if (a.from_v) {
      if (k + 1 == a.iterations) sigma = dot(v, product, columns);
    } else {
      times(a, w, v, product, threads);
      normalise(product, a.h, a.eps, u);
      if (k + 1 == a.iterations) sigma = dot(u, product, a.h);
    }
  }
  if (!a.iterations) {
    times(a, w, v, product, threads);
    sigma = dot(u, product, a.h);
  }
  *static_cast<T*>(a.sigma) = T(sigma);
  T* out = static_cast<T*>(a.out);
  const T inverse = T(1 / sigma);
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < total; ++i) out[i] = w[i] * inverse;
}

template <class T>
void backward(const SpectralNormArgs& a) {
  const T *w = static_cast<const T*>(a.weight), *g = static_cast<const T*>(a.grad);
  const T *u = static_cast<const T*>(a.u), *v = static_cast<const T*>(a.v);
  T* out = static_cast<T*>(a.out);
  const int64_t total = a.a * a.h * a.b, chunks = (total + kChunk - 1) / kChunk;
  const int threads = total < kSerial ? 1 : a.threads;
  const double sigma = double(*static_cast<const T*>(a.sigma));
  const Workspace<double> all_sums(chunks);
  double* sums = all_sums.get();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t to = least(total, (k + 1) * kChunk);
    T part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = k * kChunk; i < to; ++i) part += g[i] * w[i];
    sums[k] = double(part);
  }
  double inner = 0;
  for (int64_t k = 0; k < chunks; ++k) inner += sums[k];
  const double along = (a.grad_sigma ? double(*static_cast<const T*>(a.grad_sigma)) : 0.0) - inner / sigma / sigma;
  const T inverse = T(1 / sigma);
  const bool swapped = a.b == 1;  // (a, h): v down the rows and u along them
  const int64_t rows = swapped ? a.a : a.a * a.h, columns = swapped ? a.h : a.b;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T factor = T(along * double(swapped ? v[r] : u[r % a.h]));
    const T *grad = g + r * columns, *vector = swapped ? u : v + r / a.h * a.b;
    T* row = out + r * columns;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) row[i] = grad[i] * inverse + factor * vector[i];
  }
}

}  // namespace

GENFAST_KERNEL(spectral_norm, SpectralNormArgs, forward<T>(a))
GENFAST_KERNEL(spectral_norm_backward, SpectralNormArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
