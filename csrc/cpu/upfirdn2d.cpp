// Upsample, pad, filter, downsample (StyleGAN2 1912.04958; scipy.signal.upfirdn in two dimensions):
//   y[oy, ox] = sum_ij g[i, j] z[oy dy - py + i, ox dx - px + j],  z[k u] = x[k], zero elsewhere;  g is the filter reversed
//
// x (N, C, H, W), y (N, C, OH, OW). One pass: x is read once, y written once (4 (1/u^2 + 1) or 4 (d^2 + 1) bytes an output in
// float), bound by memory bandwidth. Only taps that meet an element of x are multiplied: an output row is the sum of the
// input rows that its phase meets (along the row, in the first cache), and then each output of the row a sum of the columns
// that its own phase meets: 4 + 4 products for 4 x 4 taps and d = 2, 2 + 2 for u = 2. A filter of rank one is split in two;
// any other goes row of taps by row of taps. Every output is summed by one thread in one order.
#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "kernels.h"
#include "transpose.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;

GENFAST_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
GENFAST_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class T>
GENFAST_INLINE Vec<T> load_first(const T* p, int64_t n) {
  Vec<T> v{};
  memcpy(&v, p, size_t(n) * sizeof(T));
  return v;
}

// out[i] (+)= the first n lanes of v
template <class T>
GENFAST_INLINE void put(T* out, Vec<T> v, int64_t n, bool add) {
  if (n >= lanes<T>()) {
    store(out, add ? load(out) + v : v);
    return;
  }
  if (add) v += load_first(out, n);
  memcpy(out, &v, size_t(n) * sizeof(T));
}

// out[i] (+)= sum_k weight[k] row[k][i]
template <class T>
GENFAST_INLINE void combine(const T* const* row, const T* weight, int64_t count, int64_t n, T* out, bool add) {
  constexpr int64_t L = lanes<T>();
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    Vec<T> a = splat(weight[0]) * load(row[0] + i), b = splat(weight[0]) * load(row[0] + i + L);
    Vec<T> c = splat(weight[0]) * load(row[0] + i + 2 * L), d = splat(weight[0]) * load(row[0] + i + 3 * L);
    for (int64_t k = 1; k < count; ++k) {
      const Vec<T> w = splat(weight[k]);
      a += w * load(row[k] + i), b += w * load(row[k] + i + L);
      c += w * load(row[k] + i + 2 * L), d += w * load(row[k] + i + 3 * L);
    }
    put(out + i, a, L, add), put(out + i + L, b, L, add), put(out + i + 2 * L, c, L, add), put(out + i + 3 * L, d, L, add);
  }
  for (; i + L <= n; i += L) {
    Vec<T> a = splat(weight[0]) * load(row[0] + i);
    for (int64_t k = 1; k < count; ++k) a += splat(weight[k]) * load(row[k] + i);
    put(out + i, a, L, add);
  }
  if (i < n) {
    Vec<T> a{};
    for (int64_t k = 0; k < count; ++k) a += splat(weight[k]) * load_first(row[k] + i, n - i);
    put(out + i, a, n - i, add);
  }
}

#ifdef GENFAST_SHUFFLE
template <class V, int... I>
GENFAST_INLINE V every_other(V a, V b, int, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <class V, int... I>
GENFAST_INLINE V every_odd(V a, V b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}
#endif

// line[i % lines][i / lines] = flat[i]; reads and writes up to two vectors beyond n
template <class T>
GENFAST_INLINE void split(const T* flat, int64_t n, int64_t lines, T* line, int64_t length) {
#ifdef GENFAST_SHUFFLE
  constexpr int64_t L = lanes<T>();
  if (lines == 2) {
    const typename Counted<int(L)>::type lane{};
    for (int64_t i = 0; i < n; i += 2 * L) {
      const Vec<T> a = load(flat + i), b = load(flat + i + L);
      store(line + i / 2, every_other(a, b, 0, lane));
      store(line + length + i / 2, every_odd(a, b, lane));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) line[i % lines * length + i / lines] = flat[i];
}

// out[2 q] (+)= sum_k w0[k] r0[k][q], out[2 q + 1] (+)= sum_k w1[k] r1[k][q]; reads up to a vector beyond
template <class T>
GENFAST_INLINE void combine_pair(
    const T* const* r0, const T* w0, int64_t count0, const T* const* r1, const T* w1, int64_t count1, int64_t n, T* out,
    bool add) {
  constexpr int64_t L = lanes<T>();
  for (int64_t q = 0; 2 * q < n; q += L) {
    Vec<T> a{}, b{};
    for (int64_t k = 0; k < count0; ++k) a += splat(w0[k]) * load(r0[k] + q);
    for (int64_t k = 0; k < count1; ++k) b += splat(w1[k]) * load(r1[k] + q);
    const int64_t left = n - 2 * q;
#ifdef GENFAST_SHUFFLE
    const typename Counted<int(L)>::type lane{};
    put(out + 2 * q, interleave_low(a, b, lane), left, add);
    if (left > L) put(out + 2 * q + L, interleave_high(a, b, lane), left - L, add);
#else
    T even[L], odd[L];
    store(even, a), store(odd, b);
    for (int64_t i = 0; i < 2 * L && i < left; ++i) {
      const T v = i % 2 ? odd[i / 2] : even[i / 2];
      out[2 * q + i] = add ? out[2 * q + i] + v : v;
    }
#endif
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

template <class T>
void run(const Upfirdn2dArgs& a) {
  constexpr int64_t L = lanes<T>();
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  int64_t g = a.upx;
  for (int64_t b = a.downx; b;) {
    const int64_t rest = g % b;
    g = b, b = rest;
  }
  // Output q U + r of a row meets, through tap j, element q D + offset of it: U phases, each with its own list of taps.
  const int64_t U = a.upx / g, D = a.downx / g, c = a.channels_last ? a.c : 1;
  T* coefficients = static_cast<T*>(malloc(size_t(a.fh + a.fh * a.fw) * sizeof(T)));
  const Filter<T> filter = factor<T>(a, coefficients);
  int64_t* lists = static_cast<int64_t*>(malloc(size_t(U + 1 + 2 * U * a.fw) * sizeof(int64_t)));
  int64_t *start = lists, *tap = lists + U + 1, *offset = tap + U * a.fw;
  int64_t count = 0, lowest = 0, highest = 0;
  for (int64_t r = 0; r < U; ++r) {
    start[r] = count;
    for (int64_t j = 0; j < a.fw; ++j) {
      const int64_t t = r * a.downx - a.padx0 + j;
      if (floor_div(t, a.upx) * a.upx != t) continue;
      tap[count] = j, offset[count] = floor_div(t, a.upx);
      lowest = offset[count] < lowest ? offset[count] : lowest;
      highest = offset[count] > highest ? offset[count] : highest;
      ++count;
    }
  }
  start[U] = count;
  // A row lies in D lines (channels_last: one) between zeros, which stand for what is outside the image.
  const int64_t lines = a.channels_last ? 1 : D, last = (a.ow + U - 1) / U * D + highest;
  const int64_t margin = round_up(floor_div(-lowest + lines - 1, lines), L);
  const int64_t beyond = ((last > a.w ? last : a.w) + lines - 1) / lines;
  const int64_t length = (margin + beyond) * c + 4 * L, flat = a.channels_last || D == 1 ? 0 : round_up(a.w, 2 * L) + 2 * L;
  const int64_t planes = a.channels_last ? a.n : a.n * a.c, width = a.w * c, out_width = a.ow * c;
  const int threads = planes * a.oh * out_width < kSerial ? 1 : a.threads;
#pragma omp parallel num_threads(threads)
  {
    T* line = static_cast<T*>(calloc(size_t(lines * length + flat + a.fh + count + 1), sizeof(T)));
    T *joined = line + lines * length, *by_row = joined + flat, *by_column = by_row + a.fh;
    const T** rows = static_cast<const T**>(malloc(size_t(a.fh + count + 1) * sizeof(T*)));
    const T** columns = rows + a.fh;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < planes * a.oh; ++item) {
      const int64_t plane = item / a.oh, top = item % a.oh * a.downy - a.pady0;
      const T* from = x + (a.channels_last ? plane * a.xn : plane / a.c * a.xn + plane % a.c * a.xc);
      T* out = y + item * out_width;
      bool add = false;
      for (int64_t term = 0; term < filter.terms; ++term) {
        int64_t met = 0;
        const int64_t first = filter.terms > 1 ? term : 0, end = filter.terms > 1 ? term + 1 : a.fh;
        for (int64_t i = first; i < end; ++i) {
          const int64_t h = floor_div(top + i, a.upy);
          if (h * a.upy != top + i || h < 0 || h >= a.h) continue;
          rows[met] = from + h * a.xh, by_row[met++] = filter.column[i];
        }
        if (!met) continue;
        combine(rows, by_row, met, width, flat ? joined : line + margin * c, false);
        if (flat) split(joined, a.w, lines, line + margin, length);
        for (int64_t k = 0; k < count; ++k) {
          by_column[k] = filter.row[term * a.fw + tap[k]];
          columns[k] = a.channels_last ? line + (margin + offset[k]) * c
                                       : line + (offset[k] - floor_div(offset[k], D) * D) * length + margin + floor_div(offset[k], D);
        }
        const auto list = [&](int64_t r) { return start[r + 1] - start[r]; };
        if (U == 1 && (!a.channels_last || D == 1)) {
          if (count)
            combine(columns, by_column, count, out_width, out, add);
          else if (!add)
            memset(out, 0, size_t(out_width) * sizeof(T));
        } else if (U == 2 && !a.channels_last) {
          combine_pair(columns, by_column, list(0), columns + start[1], by_column + start[1], list(1), a.ow, out, add);
        } else {
          for (int64_t o = 0; o < a.ow; ++o) {
            const int64_t r = o % U, q = o / U * (a.channels_last ? D * c : 1);
            for (int64_t i = 0; i < c;) {
              const int64_t n = c - i < L ? c - i : L;
              if (n < L / 2) {
                T sum = 0;
                for (int64_t k = start[r]; k < start[r + 1]; ++k) sum += by_column[k] * columns[k][q + i];
                out[o * c + i] = add ? out[o * c + i] + sum : sum;
                ++i;
                continue;
              }
              Vec<T> sum{};
              for (int64_t k = start[r]; k < start[r + 1]; ++k) sum += splat(by_column[k]) * load(columns[k] + q + i);
              put(out + o * c + i, sum, n, add);
              i += n;
            }
          }
        }
        add = true;
      }
      if (!add) memset(out, 0, size_t(out_width) * sizeof(T));
    }
    free(rows);
    free(line);
  }
  free(lists);
  free(coefficients);
}

}  // namespace

void upfirdn2d(const Upfirdn2dArgs& a) { a.is_double ? run<double>(a) : run<float>(a); }

}  // namespace GENFAST_ISA
}  // namespace genfast
