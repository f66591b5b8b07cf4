// Monotonic splines, elementwise, forward, inverse and backward (spline.h has the equations).
//
// x (n), parameters as rows of K widths, K heights and the derivatives, in one tensor or in three. One pass: the forward reads
// x and a row and writes y and logdet, the backward reads those and two cotangents and writes dx and a row; nothing else is
// kept. In float with 8 bins and linear tails 104 and 200 bytes an element, and about 40 and 60 vector instructions: bound by
// memory where the rows do not fit a cache. Rows of as many elements as a vector has lanes are turned in registers.
#include <stdlib.h>

#include "dtype_switch.h"
#include "spline.h"
#include "transpose.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1024;        // elements below which threads do not pay
constexpr int64_t kStreamBytes = 8 << 20;  // outputs from here on go past the caches

// Columns [0, 8) of lanes<T>() rows, one a lane, and back.
#if GENFAST_VECTOR_BYTES == 64
typedef Vec<float> Quads;
typedef Mask<float> Order;

GENFAST_INLINE void turn_quads(Quads* v) {  // 4x4 within each 128-bit quarter
  const Order low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  const Order low_pairs = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  const Quads a = __builtin_shuffle(v[0], v[1], low), b = __builtin_shuffle(v[0], v[1], low + 2);
  const Quads c = __builtin_shuffle(v[2], v[3], low), d = __builtin_shuffle(v[2], v[3], low + 2);
  v[0] = __builtin_shuffle(a, c, low_pairs), v[1] = __builtin_shuffle(a, c, low_pairs + 2);
  v[2] = __builtin_shuffle(b, d, low_pairs), v[3] = __builtin_shuffle(b, d, low_pairs + 2);
}

GENFAST_INLINE void gather_eight(const float* src, int64_t stride, int columns, Quads* dst) {
  const Order even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const __mmask8 some = __mmask8((1 << columns) - 1);
  Quads v[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // rows 0-3 | 4-7, then 8-11 | 12-15
    const float* row = src + ((i & 3) + (i & 4) * 2) * stride;
    const __m512 near = _mm512_castps256_ps512(_mm256_maskz_loadu_ps(some, row));
    v[i] = reinterpret_cast<Quads>(_mm512_insertf32x8(near, _mm256_maskz_loadu_ps(some, row + 4 * stride), 1));
  }
  turn_quads(v);
  turn_quads(v + 4);
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    dst[c] = __builtin_shuffle(v[c], v[c + 4], even);
    dst[c + 4] = __builtin_shuffle(v[c], v[c + 4], even + 4);
  }
}

GENFAST_INLINE void scatter_eight(const Quads* src, float* dst, int64_t stride) {
  const Order low = {0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23};
  Quads v[8];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c] = __builtin_shuffle(src[c], src[c + 4], low);
    v[c + 4] = __builtin_shuffle(src[c], src[c + 4], low + 8);
  }
  turn_quads(v);
  turn_quads(v + 4);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {  // ascending, so that a row's excess is overwritten by the next
    const __m512 from = reinterpret_cast<__m512>(v[(r & 3) + (r & 8) / 2]);
    _mm256_storeu_ps(dst + r * stride, r & 4 ? _mm512_extractf32x8_ps(from, 1) : _mm512_extractf32x8_ps(from, 0));
  }
}

// dst[c] holds column c of lanes<T>() rows.
GENFAST_INLINE void gather_rows(const float* src, int64_t stride, int64_t count, Vec<float>* dst) {
  if (count < 8) {
    Vec<float> some[8];
    gather_eight(src, stride, int(count), some);
    for (int64_t c = 0; c < count; ++c) dst[c] = some[c];
    return;
  }
  for (int64_t c = 0; c < count; c += 8) {
    const int64_t from = c + 8 <= count ? c : count - 8;
    gather_eight(src + from, stride, 8, dst + from);
  }
}

// The inverse, to rows `count` apart; up to 8 more elements are written behind the last.
GENFAST_INLINE void scatter_rows(const Vec<float>* src, int64_t count, float* dst) {
  if (count < 8) {
    Vec<float> some[8] = {};
    for (int64_t c = 0; c < count; ++c) some[c] = src[c];
    scatter_eight(some, dst, count);
    return;
  }
  for (int64_t c = 0; c < count; c += 8) {
    const int64_t from = c + 8 <= count ? c : count - 8;
    scatter_eight(src + from, dst + from, count);
  }
}
#endif

template <class T>
GENFAST_INLINE void gather_rows(const T* src, int64_t stride, int64_t count, Vec<T>* dst) {
  constexpr int n = lanes<T>();
  T* out = reinterpret_cast<T*>(dst);
  if (count < n) {
    transpose(src, stride, n, count, out, n);
    return;
  }
  for (int64_t c = 0; c < count; c += n) {
    const int64_t from = c + n <= count ? c : count - n;
    transpose_square(src + from, stride, out + from * n, n);
  }
}

template <class T>
GENFAST_INLINE void scatter_rows(const Vec<T>* src, int64_t count, T* dst) {
  constexpr int n = lanes<T>();
  const T* in = reinterpret_cast<const T*>(src);
  if (count < n) {
    transpose(in, n, count, n, dst, count);
    return;
  }
  for (int64_t c = 0; c < count; c += n) {
    const int64_t from = c + n <= count ? c : count - n;
    transpose_square(in + from * n, n, dst + from, count);
  }
}

template <class T>
GENFAST_INLINE void put(T* p, Vec<T> v, int64_t live, bool past) {
  if (live < lanes<T>())
    store_part(p, v, int(live));
  else if (past)
    stream(p, v);
  else
    store(p, v);
}

// A cotangent: none, one number for all, or one an element.
template <class T>
GENFAST_INLINE Vec<T> cotangent(const void* data, int64_t step, int64_t i, int64_t live) {
  const T* p = static_cast<const T*>(data);
  if (!p) return Vec<T>{};
  if (!step) return splat(*p);
  return live < lanes<T>() ? load_part(p + i, int(live)) : load(p + i);
}

// Bins: the number of bins, or where it is negative at most that many, or where it is zero any number.
template <class T, int Bins, bool Backward>
void run(const SplineArgs& a, int64_t begin, int64_t end, bool past, bool& outside) {
  constexpr int n = lanes<T>();
  constexpr int N = Bins > 0 ? Bins : Bins ? -Bins : kSplineBins;
  const SplineOptions<T> o{Bins > 0 ? Bins : a.bins, a.tails, a.zuko, T(a.left), T(a.right), T(a.bottom), T(a.top), T(a.min_width),
                           T(a.min_height), T(a.min_derivative), T(a.log_slope), T(a.logit_scale)};
  constexpr int room = 3 * N + 1;
  Vec<T> params[room + 8], grads[Backward ? room + 8 : 1];
  alignas(64) T rows[n * (room + 8) + 16];  // the last rows, so that no load passes a tensor's end; and the gradients' rows
  const T* xs = static_cast<const T*>(a.x);
  for (int64_t i = begin; i < end; i += n) {
    const int64_t live = end - i < n ? end - i : n;
    Vec<T>* at = params;
    for (int part = 0; part < a.part_count; ++part) {
      const SplineArgs::Part& p = a.parts[part];
      const T* from = static_cast<const T*>(p.data) + i * p.stride;
      int64_t stride = p.stride;
      if (live < n) {
        for (int64_t r = 0; r < n; ++r)
          for (int64_t c = 0; c < p.count; ++c) rows[r * p.count + c] = r < live ? from[r * stride + c] : T(0);
        from = rows, stride = p.count;
      }
      gather_rows(from, stride, p.count, at);
      at += p.count;
    }
    const Vec<T> x = live < n ? load_part(xs + i, int(live)) : load(xs + i);
    if (!Backward) {
      Vec<T> y, logdet;
      spline_of<T, N>(o, o.bins, params, x, a.inverse, y, logdet);
      if (a.tails == 1) {
        const T low = a.inverse ? o.bottom : o.left, high = a.inverse ? o.top : o.right;
        const uint64_t lanes_in = live < n ? (uint64_t(1) << live) - 1 : ~uint64_t(0);
        const Mask<T> beyond = o.zuko ? (x <= low) | (x > high) : (x < low) | (x > high);
        outside |= (collect<T>(beyond) & lanes_in) != 0;
      }
      put(static_cast<T*>(a.y) + i, y, live, past);
      put(static_cast<T*>(a.logdet) + i, logdet, live, past);
      continue;
    }
    Vec<T> dx;
    spline_backward_of<T, N>(o, o.bins, params, x, a.inverse, cotangent<T>(a.grad_y, a.grad_y_step, i, live),
                                               cotangent<T>(a.grad_logdet, a.grad_logdet_step, i, live), dx, grads);
    put(static_cast<T*>(a.dx) + i, dx, live, past);
    const Vec<T>* found = grads;
    for (int part = 0; part < a.part_count; ++part) {
      const SplineArgs::Part& p = a.parts[part];
      T* to = static_cast<T*>(p.grad) + i * p.count;
      scatter_rows(found, p.count, rows);
      for (int64_t c = 0; c < p.count * live; c += n) put(to + c, load(rows + c), p.count * live - c, past);
      found += p.count;
    }
  }
}

template <class T, bool Backward>
void each(const SplineArgs& a) {
  constexpr int64_t chunk = 64 * lanes<T>();
  int64_t width = 1;
  bool dense = aligned(static_cast<const T*>(Backward ? a.dx : a.y)) && (Backward || aligned(static_cast<const T*>(a.logdet)));
  for (int p = 0; p < a.part_count; ++p) {
    width += a.parts[p].count;
    dense = dense && (!Backward || aligned(static_cast<const T*>(a.parts[p].grad)));
  }
  const bool past = dense && a.n * width * int64_t(sizeof(T)) >= kStreamBytes;
  const auto work = a.bins == 8 ? run<T, 8, Backward> : a.bins <= 16 ? run<T, -16, Backward> : run<T, 0, Backward>;
  const int threads = a.n < kSerial ? 1 : a.threads;
  bool outside = false;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(|| : outside)
  for (int64_t i = 0; i < a.n; i += chunk) {
    bool found = false;
    work(a, i, a.n - i < chunk ? a.n : i + chunk, past, found);
    outside = outside || found;
  }
  *a.outside = outside;
}

template <class T>
void both(const SplineArgs& a) {
  a.backward ? each<T, true>(a) : each<T, false>(a);
}

}  // namespace

GENFAST_KERNEL(spline, SplineArgs, both<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
