// Upsample, pad, filter, downsample (StyleGAN2 1912.04958; scipy.signal.upfirdn in two dimensions):
//   y[oy, ox] = sum_ij g[i, j] z[oy dy - py + i, ox dx - px + j],  z[k u] = x[k], zero elsewhere;  g is the filter reversed
//
// x (N, C, H, W), y (N, C, OH, OW). One pass: x is read once, y written once (4 (1/u^2 + 1) or 4 (d^2 + 1) bytes an output in
// float), bound by memory bandwidth. Only taps that meet an element of x are multiplied: an output row is the sum of the
// input rows that its phase meets (along the row, in the first cache), and then each output of the row a sum of the columns
// that its own phase meets: 4 + 4 products for 4 x 4 taps and d = 2, 2 + 2 for u = 2. A filter of rank one is split in two;
// any other goes row of taps by row of taps. Channels_last walks along channels where a pixel fills a vector. Narrow images
// in NCHW, whose rows fill too few vectors, are turned to that form a vector of channels at a time, in the second cache.
// Every output is summed by one thread in one order.
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "dtype_switch.h"
#include "transpose.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kCached = 1 << 21;  // bytes of an output that may be found in a cache later

GENFAST_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
GENFAST_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

#if GENFAST_VECTOR_BYTES == 64
GENFAST_INLINE Vec<float> load_first(const float* p, int64_t n) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
}
GENFAST_INLINE Vec<double> load_first(const double* p, int64_t n) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
}
GENFAST_INLINE void store_first(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), reinterpret_cast<__m512>(v));
}
GENFAST_INLINE void store_first(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), reinterpret_cast<__m512d>(v));
}
#else
template <class T>
GENFAST_INLINE Vec<T> load_first(const T* p, int64_t n) {
  return load_part(p, int(n));
}
template <class T>
GENFAST_INLINE void store_first(T* p, Vec<T> v, int64_t n) {
  store_part(p, v, int(n));
}
#endif

enum Store { kStore, kAdd, kPast };  // kPast: past the cache, for outputs too large to be found in it later

// The first n lanes of v to out.
template <class T>
GENFAST_INLINE void put(T* out, Vec<T> v, int64_t n, Store how) {
  if (n < lanes<T>())
    store_first(out, how == kAdd ? load_first(out, n) + v : v, n);
  else if (how == kPast && aligned(out))
    stream(out, v);
  else
    store(out, how == kAdd ? load(out) + v : v);
}

// sum_k weight[k] row[k][i] for a vector of i; COUNT is the number of taps, or 0 where it is `count`
template <class T, int COUNT>
GENFAST_INLINE Vec<T> weighted(const T* const* row, const T* weight, int64_t count, int64_t i) {
  Vec<T> sum{};
  if (COUNT) {
#pragma GCC unroll 4
    for (int k = 0; k < COUNT; ++k) sum += splat(weight[k]) * load(row[k] + i);
  } else {
    for (int64_t k = 0; k < count; ++k) sum += splat(weight[k]) * load(row[k] + i);
  }
  return sum;
}

template <class T, int COUNT>
GENFAST_INLINE void combine_some(const T* const* row, const T* weight, int64_t count, int64_t n, T* out, Store how) {
  constexpr int64_t L = lanes<T>();
  if (COUNT) count = COUNT;
  int64_t i = 0;
  for (; i + 2 * L <= n; i += 2 * L) {
    const Vec<T> a = weighted<T, COUNT>(row, weight, count, i), b = weighted<T, COUNT>(row, weight, count, i + L);
    put(out + i, a, L, how), put(out + i + L, b, L, how);
  }
  for (; i + L <= n; i += L) put(out + i, weighted<T, COUNT>(row, weight, count, i), L, how);
  if (i < n) {
    Vec<T> a{};
    for (int64_t k = 0; k < count; ++k) a += splat(weight[k]) * load_first(row[k] + i, n - i);
    put(out + i, a, n - i, how);
  }
}

// out[i] (+)= sum_k weight[k] row[k][i]
template <class T>
void combine(const T* const* row, const T* weight, int64_t count, int64_t n, T* out, Store how) {
  switch (count) {
    case 1: return combine_some<T, 1>(row, weight, count, n, out, how);
    case 2: return combine_some<T, 2>(row, weight, count, n, out, how);
    case 3: return combine_some<T, 3>(row, weight, count, n, out, how);
    case 4: return combine_some<T, 4>(row, weight, count, n, out, how);
    default: return combine_some<T, 0>(row, weight, count, n, out, how);
  }
}

#ifdef GENFAST_SHUFFLE
template <int FIRST, class V, int... I>
GENFAST_INLINE V every_other(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
}
#endif

// Pixel i of c elements goes to place i / lines of line i % lines; reads and writes up to two vectors beyond.
template <class T>
GENFAST_INLINE void split(const T* flat, int64_t pixels, int64_t c, int64_t lines, T* line, int64_t length) {
#ifdef GENFAST_SHUFFLE
  constexpr int64_t L = lanes<T>();
  if (lines == 2 && c == 1) {
    const typename Counted<int(L)>::type lane{};
    for (int64_t i = 0; i < pixels; i += 2 * L) {
      const Vec<T> a = load(flat + i), b = load(flat + i + L);
      store(line + i / 2, every_other<0>(a, b, lane));
      store(line + length + i / 2, every_other<1>(a, b, lane));
    }
    return;
  }
#endif
  for (int64_t k = 0; k < lines; ++k)
    for (int64_t i = k, to = 0; i < pixels; i += lines, ++to)
      for (int64_t e = 0; e < c; ++e) line[k * length + to * c + e] = flat[i * c + e];
}

// out[2 q] (+)= sum_k w0[k] r0[k][q], out[2 q + 1] (+)= sum_k w1[k] r1[k][q]; reads up to a vector beyond
template <class T, int COUNT>
GENFAST_INLINE void combine_pair_some(
    const T* const* r0, const T* w0, int64_t count0, const T* const* r1, const T* w1, int64_t count1, int64_t n, T* out,
    Store how) {
  constexpr int64_t L = lanes<T>();
  for (int64_t q = 0; 2 * q < n; q += L) {
    const Vec<T> a = weighted<T, COUNT>(r0, w0, count0, q), b = weighted<T, COUNT>(r1, w1, count1, q);
    const int64_t left = n - 2 * q;
#ifdef GENFAST_SHUFFLE
    const typename Counted<int(L)>::type lane{};
    put(out + 2 * q, interleave_low(a, b, lane), left, how);
    if (left > L) put(out + 2 * q + L, interleave_high(a, b, lane), left - L, how);
#else
    T even[L], odd[L];
    store(even, a), store(odd, b);
    for (int64_t i = 0; i < 2 * L && i < left; ++i) {
      const T v = i % 2 ? odd[i / 2] : even[i / 2];
      out[2 * q + i] = how == kAdd ? out[2 * q + i] + v : v;
    }
#endif
  }
}

template <class T>
void combine_pair(
    const T* const* r0, const T* w0, int64_t count0, const T* const* r1, const T* w1, int64_t count1, int64_t n, T* out,
    Store how) {
  if (count0 == 2 && count1 == 2) return combine_pair_some<T, 2>(r0, w0, 2, r1, w1, 2, n, out, how);
  combine_pair_some<T, 0>(r0, w0, count0, r1, w1, count1, n, out, how);
}

// Pixels [first, end) of c >= a vector's elements: out[p to + e] (+)= sum_k weight[k] row[k][p from + e]
template <class T, int COUNT>
GENFAST_INLINE void combine_pixels_some(
    const T* const* row, const T* weight, int64_t taps, int64_t c, int64_t first, int64_t end, int64_t from, int64_t to, T* out,
    Store how) {
  constexpr int64_t L = lanes<T>();
  for (int64_t p = first; p < end; ++p) {
    int64_t e = 0;
    for (; e + L <= c; e += L) put(out + p * to + e, weighted<T, COUNT>(row, weight, taps, p * from + e), L, how);
    if (e < c) put(out + p * to + e, weighted<T, COUNT>(row, weight, taps, p * from + e), c - e, how);
  }
}

template <class T>
void combine_pixels(
    const T* const* row, const T* weight, int64_t taps, int64_t c, int64_t first, int64_t end, int64_t from, int64_t to, T* out,
    Store how) {
  switch (taps) {
    case 1: return combine_pixels_some<T, 1>(row, weight, taps, c, first, end, from, to, out, how);
    case 2: return combine_pixels_some<T, 2>(row, weight, taps, c, first, end, from, to, out, how);
    case 3: return combine_pixels_some<T, 3>(row, weight, taps, c, first, end, from, to, out, how);
    case 4: return combine_pixels_some<T, 4>(row, weight, taps, c, first, end, from, to, out, how);
    default: return combine_pixels_some<T, 0>(row, weight, taps, c, first, end, from, to, out, how);
  }
}

// The filter as a sum of products of a column and a row, reversed for the sum above and with its gain: one product where it
// has rank one, else one for each row of taps.
template <class T>
struct Filter {
  int64_t terms;
  T *column, *row;  // (fh,), one column for all terms but picked by term where there are many; (terms, fw)
};

template <class T>
Filter<T> factor(const Upfirdn2dArgs& a, T* store) {
  const T* f = static_cast<const T*>(a.filter);
  const auto at = [&](int64_t i, int64_t j) {
    return a.flip ? f[i * a.fw + j] : f[(a.fh - 1 - i) * a.fw + a.fw - 1 - j];
  };
  const auto along = [&](int64_t i, int64_t size) { return a.flip ? f[i] : f[size - 1 - i]; };
  Filter<T> r{1, store, store + a.fh};
  if (a.separable) {
    for (int64_t i = 0; i < a.fh; ++i) r.column[i] = T(double(along(i, a.fh)) * a.gain);
    for (int64_t j = 0; j < a.fw; ++j) r.row[j] = along(j, a.fw);
    return r;
  }
  int64_t pi = 0, pj = 0;
  for (int64_t i = 0; i < a.fh; ++i)
    for (int64_t j = 0; j < a.fw; ++j)
      if (fabs(double(at(i, j))) > fabs(double(at(pi, pj)))) pi = i, pj = j;
  const double pivot = double(at(pi, pj)), eps = 4 * (sizeof(T) == 4 ? double(FLT_EPSILON) : DBL_EPSILON);
  bool rank_one = true;
  for (int64_t i = 0; i < a.fh && rank_one; ++i)
    for (int64_t j = 0; j < a.fw && rank_one; ++j)
      rank_one = fabs(double(at(i, j)) * pivot - double(at(i, pj)) * double(at(pi, j))) <= eps * fabs(double(at(i, j)) * pivot);
  if (rank_one) {
    for (int64_t i = 0; i < a.fh; ++i) r.column[i] = pivot != 0 ? T(double(at(i, pj)) / pivot * a.gain) : T(0);
    for (int64_t j = 0; j < a.fw; ++j) r.row[j] = at(pi, j);
    return r;
  }
  r.terms = a.fh;
  for (int64_t i = 0; i < a.fh; ++i) {
    r.column[i] = T(1);
    for (int64_t j = 0; j < a.fw; ++j) r.row[i * a.fw + j] = T(double(at(i, j)) * a.gain);
  }
  return r;
}

// Along one axis, output q U + r meets element q D + offset through tap: U phases, each with its own list of taps.
struct Axis {
  int64_t U, D, *start, *tap, *offset, lowest, highest;  // the lists are in memory of the caller
};

Axis phases(int64_t up, int64_t down, int64_t before, int64_t taps, int64_t* lists) {
  int64_t g = up;
  for (int64_t b = down; b;) {
    const int64_t rest = g % b;
    g = b, b = rest;
  }
  Axis a{up / g, down / g, nullptr, nullptr, nullptr, 0, 0};
  a.start = lists;
  a.tap = a.start + a.U + 1, a.offset = a.tap + a.U * taps;
  int64_t count = 0;
  for (int64_t r = 0; r < a.U; ++r) {
    a.start[r] = count;
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t t = r * down - before + j, at = floor_div(t, up);
      if (at * up != t) continue;
      a.tap[count] = j, a.offset[count++] = at;
      a.lowest = at < a.lowest ? at : a.lowest;
      a.highest = at > a.highest ? at : a.highest;
    }
  }
  a.start[a.U] = count;
  return a;
}

// What all rows share. A row of pixels, c elements each, lies in `lines` lines (pixel i in line i % lines) between zeros, which
// stand for what is outside the image.
template <class T>
struct Plan {
  Filter<T> filter;
  Axis across, down;
  int64_t c, h, w, oh, ow, fh, fw, xh, lines, margin, length, flat, phase;
  Store how;
  bool pixels;  // a pixel fills a vector: its elements are walked, not the row's
};

template <class T>
Plan<T> make_plan(const Upfirdn2dArgs& a, const Filter<T>& filter, const Axis& across, const Axis& down, int64_t c, int64_t xh,
                  Store how) {
  constexpr int64_t L = lanes<T>();
  Plan<T> p{filter, across, down, c, a.h, a.w, a.oh, a.ow, a.fh, a.fw, xh, 1, 0, 0, 0, 0, how, c >= L};
  p.lines = p.pixels ? 1 : across.D;
  const int64_t last = (a.ow + across.U - 1) / across.U * across.D + across.highest;
  p.margin = round_up(floor_div(-across.lowest + p.lines - 1, p.lines), L);
  p.length = (p.margin + ((last > a.w ? last : a.w) + p.lines - 1) / p.lines) * c + 4 * L;
  p.flat = p.lines > 1 ? round_up(a.w * c, 2 * L) + 2 * L : 0;
  p.phase = p.pixels || across.U == 1 ? 0 : round_up((a.ow + across.U - 1) / across.U * c, L);
  return p;
}

// A thread's own memory.
template <class T>
struct Scratch {
  T *line, *flat, *phase, *by_row, *by_column;
  const T **rows, **columns;
};

template <class T>
int64_t taps_of(const Plan<T>& p) {
  return p.across.start[p.across.U];
}

template <class T>
int64_t elements_of(const Plan<T>& p) {
  return p.lines * p.length + p.flat + p.phase + p.fh + taps_of(p);
}

template <class T>
int64_t pointers_of(const Plan<T>& p) {
  return p.fh + taps_of(p);
}

template <class T>
Scratch<T> make_scratch(const Plan<T>& p, T* elements, const T** pointers) {
  const int64_t taps = taps_of(p);
  Scratch<T> s;
  memset(elements, 0, size_t(elements_of(p)) * sizeof(T));
  s.line = elements;
  s.flat = s.line + p.lines * p.length, s.phase = s.flat + p.flat, s.by_row = s.phase + p.phase, s.by_column = s.by_row + p.fh;
  s.rows = pointers;
  s.columns = s.rows + p.fh;
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t place = floor_div(p.across.offset[k], p.lines);
    s.columns[k] = s.line + (p.across.offset[k] - place * p.lines) * p.length + (p.margin + place) * p.c;
    s.by_column[k] = p.filter.row[p.across.tap[k]];
  }
  return s;
}

// out[(i U + phase) c + e] (+)= line[i c + e]; C is c, or 0
template <class T, int C>
GENFAST_INLINE void spread(const T* line, int64_t c, int64_t count, int64_t step, T* out, Store how) {
  if (C) c = C;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t e = 0; e < c; ++e) out[i * step + e] = how == kAdd ? out[i * step + e] + line[i * c + e] : line[i * c + e];
}

// The input rows that the q-th row of phase r meets in this term, and their weights.
template <class T>
GENFAST_INLINE int64_t meet(const Plan<T>& p, Scratch<T>& s, const T* from, int64_t q, int64_t r, int64_t term) {
  const Axis& y = p.down;
  int64_t met = 0;
  for (int64_t k = y.start[r]; k < y.start[r + 1]; ++k) {
    const int64_t h = q * y.D + y.offset[k];
    if (h < 0 || h >= p.h || (p.filter.terms > 1 && y.tap[k] != term)) continue;
    s.rows[met] = from + h * p.xh, s.by_row[met++] = p.filter.column[y.tap[k]];
  }
  return met;
}

// One row of outputs along its pixels' elements, kPiece of them at a time, so that the sum of the input rows stays in the
// first cache.
template <class T>
void row_of_pixels(const Plan<T>& p, Scratch<T>& s, int64_t met, T* out, Store how) {
  constexpr int64_t kPiece = 8192 / sizeof(T);
  const Axis& x = p.across;
  const int64_t all = (p.ow + x.U - 1) / x.U, piece = kPiece / (x.D * p.c) + 1;
  for (int64_t first = 0; first < all; first += piece) {
    const int64_t end = all - first < piece ? all : first + piece;
    int64_t left = first * x.D + x.lowest, right = (end - 1) * x.D + x.highest + 1;
    left = left < 0 ? 0 : left, right = right > p.w ? p.w : right;
    if (left < right) {
      const T** rows = s.rows;
      for (int64_t k = 0; k < met; ++k) rows[k] += left * p.c;
      combine(rows, s.by_row, met, (right - left) * p.c, s.line + (p.margin + left) * p.c, kStore);
      for (int64_t k = 0; k < met; ++k) rows[k] -= left * p.c;
    }
    const int64_t step = x.U > 1 ? 4 : end - first;  // phases take turns, so that memory is written nearly in order
    for (int64_t i = first; i < end; i += step)
      for (int64_t phase = 0; phase < x.U; ++phase) {
        const int64_t k = x.start[phase], count = (p.ow - phase + x.U - 1) / x.U;
        int64_t until = i + step < end ? i + step : end;
        until = until < count ? until : count;
        combine_pixels(
            s.columns + k, s.by_column + k, x.start[phase + 1] - k, p.c, i, until, x.D * p.c, x.U * p.c, out + phase * p.c, how);
      }
  }
}

// One row of outputs along its columns.
template <class T>
void row_of_columns(const Plan<T>& p, Scratch<T>& s, int64_t met, T* out, Store how) {
  const Axis& x = p.across;
  const int64_t c = p.c;
  combine(s.rows, s.by_row, met, p.w * c, p.flat ? s.flat : s.line + p.margin * c, kStore);
  if (p.flat) split(s.flat, p.w, c, p.lines, s.line + p.margin * c, p.length);
  if (x.U == 1) return combine(s.columns, s.by_column, x.start[1], p.ow * c, out, how);
  if (x.U == 2 && c == 1) {
    const int64_t half = x.start[1];
    return combine_pair(s.columns, s.by_column, half, s.columns + half, s.by_column + half, x.start[2] - half, p.ow, out, how);
  }
  for (int64_t phase = 0; phase < x.U; ++phase) {
    const int64_t k = x.start[phase], count = (p.ow - phase + x.U - 1) / x.U, step = x.U * c;
    combine(s.columns + k, s.by_column + k, x.start[phase + 1] - k, count * c, s.phase, kStore);
    T* to = out + phase * c;
    c == 1 ? spread<T, 1>(s.phase, c, count, step, to, how)
           : c == 3 ? spread<T, 3>(s.phase, c, count, step, to, how) : spread<T, 0>(s.phase, c, count, step, to, how);
  }
}

// One row of outputs, the q-th of phase r, of the image at `from`.
template <class T>
void output_row(const Plan<T>& p, Scratch<T>& s, const T* from, int64_t q, int64_t r, T* out) {
  bool some = false;
  for (int64_t term = 0; term < p.filter.terms; ++term) {
    const int64_t met = meet(p, s, from, q, r, term);
    if (!met) continue;
    if (p.filter.terms > 1)
      for (int64_t k = 0; k < p.across.start[p.across.U]; ++k)
        s.by_column[k] = p.filter.row[term * p.fw + p.across.tap[k]];
    const Store how = some ? kAdd : p.filter.terms > 1 ? kStore : p.how;
    p.pixels ? row_of_pixels(p, s, met, out, how) : row_of_columns(p, s, met, out, how);
    some = true;
  }
  if (!some) memset(out, 0, size_t(p.ow * p.c) * sizeof(T));
}

// An image of few columns in NCHW, a vector of channels at a time.
template <class T>
void narrow(const Upfirdn2dArgs& a, const Filter<T>& filter, const Axis& across, const Axis& down, int threads) {
  constexpr int64_t L = lanes<T>();
  const int64_t blocks = (a.c + L - 1) / L, size = a.h * a.w, out_size = a.oh * a.ow;
  const Plan<T> p = make_plan(a, filter, across, down, L, a.w * L, kStore);
  const PerThread<T> elements(threads, elements_of(p)), images(threads, (size + out_size) * L);
  const PerThread<const T*> pointers(threads, pointers_of(p));
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> s = make_scratch(p, elements.get(), pointers.get());
    T *in = images.get(), *out = in + size * L;
    memset(in, 0, size_t((size + out_size) * L) * sizeof(T));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.n * blocks; ++item) {
      const int64_t n = item / blocks, first = item % blocks * L, count = a.c - first < L ? a.c - first : L;
      transpose(static_cast<const T*>(a.x) + n * a.xn + first * a.xc, a.xc, count, size, in, L);
      for (int64_t o = 0, q = 0, r = 0; o < a.oh; ++o) {
        output_row(p, s, in, q, r, out + o * a.ow * L);
        if (++r == down.U) r = 0, ++q;
      }
      transpose(out, L, out_size, count, static_cast<T*>(a.y) + (n * a.c + first) * out_size, out_size);
    }
  }
}

template <class T>
void wide(const Upfirdn2dArgs& a, const Filter<T>& filter, const Axis& across, const Axis& down, int threads) {
  const bool past = a.n * a.c * a.oh * a.ow * int64_t(sizeof(T)) > kCached;
  const Plan<T> p = make_plan(a, filter, across, down, a.channels_last ? a.c : 1, a.xh, past ? kPast : kStore);
  const int64_t planes = a.channels_last ? a.n : a.n * a.c;
  const PerThread<T> elements(threads, elements_of(p));
  const PerThread<const T*> pointers(threads, pointers_of(p));
#pragma omp parallel num_threads(threads)
  {
    Scratch<T> s = make_scratch(p, elements.get(), pointers.get());
#pragma omp for schedule(static)
    for (int64_t item = 0; item < planes * a.oh; ++item) {
      const int64_t plane = item / a.oh, o = item % a.oh;
      const int64_t start = a.channels_last ? plane * a.xn : plane / a.c * a.xn + plane % a.c * a.xc;
      T* out = static_cast<T*>(a.y) + item * a.ow * p.c;
      output_row(p, s, static_cast<const T*>(a.x) + start, o / down.U, o % down.U, out);
    }
  }
}

template <class T>
void run(const Upfirdn2dArgs& a) {
  constexpr int64_t L = lanes<T>();
  const Workspace<T> coefficients(a.fh + a.fh * a.fw);
  const Workspace<int64_t> lists_across(a.upx + 1 + 2 * a.upx * a.fw), lists_down(a.upy + 1 + 2 * a.upy * a.fh);
  const Filter<T> filter = factor<T>(a, coefficients.get());
  const Axis across = phases(a.upx, a.downx, a.padx0, a.fw, lists_across.get());
  const Axis down = phases(a.upy, a.downy, a.pady0, a.fh, lists_down.get());
  const int threads = a.n * a.c * (a.oh * a.ow + a.h * a.w) < kSerial ? 1 : a.threads;
  // Measured: below three vectors a row, and while both images of a vector of channels fit the second cache.
  const bool few = (a.w < 3 * L || a.ow < 3 * L) && a.c >= L / 2 && (a.h * a.w + a.oh * a.ow) * L * int64_t(sizeof(T)) <= 1 << 19;
  if (!a.channels_last && few && (a.xh == a.w || a.h == 1))
    narrow<T>(a, filter, across, down, threads);
  else
    wide<T>(a, filter, across, down, threads);
}

}  // namespace

GENFAST_KERNEL(upfirdn2d, Upfirdn2dArgs, run<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
