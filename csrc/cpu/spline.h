// The rational-quadratic spline of one vector of elements (Durkan et al., 1906.04032, equations 4 to 8), forward, inverse and
// backward: parameter p of all lanes is params[p], first K widths, K heights, then the derivatives.
//
// Bin sizes w_j = span (min + (1 - K min) p_j), p the softmax of the logits; starts are their running sums. In bin k of x,
// with theta = (x - x0)/w, t = theta (1 - theta), s = h/w, D = d0 + d1 - 2 s:
//   n = s theta^2 + d0 t,  e = s + D t,  q = d1 theta^2 + 2 s t + d0 (1 - theta)^2
//   y = y0 + h n/e,  logdet = log(q (s/e)^2).
// The inverse solves (r D + s - d0) theta^2 + (d0 - r D) theta - r s = 0, r = (y - y0)/h, by the root that does not cancel.
//
// Backward, gy and gl the cotangents, g = n/e:
//   g_theta = s q/e^2,  g_s = (theta^2 e - n (1 - 2t))/e^2,  g_d0 = t (e - n)/e^2,  g_d1 = -t n/e^2
//   l_theta = q_theta/q - 2 D (1 - 2 theta)/e,  q_theta = 2 (d1 theta + s (1 - 2 theta) - d0 (1 - theta))
//   l_s = 2/s + 2t/q - 2 (1 - 2t)/e,  l_d0 = (1 - theta)^2/q - 2t/e,  l_d1 = theta^2/q - 2t/e
// forward:  G = gy h,                         dx = (G g_theta + gl l_theta)/w, dx0 = -dx, dw = -dx theta, dy0 = gy, dh = gy g
// inverse:  gl -> -gl, G = -(gx w + gl l_theta)/g_theta, dy = -G/h, dy0 = G/h, dh = G r/h, dx0 = gx, dw = gx theta
// both:     ds = G g_s + gl l_s, dw -= ds s/w, dh += ds/w; dd = G g_d + gl l_d.
// A size before bin k moves its start, those after it nothing, so the softmax sees three values: with c = span (1 - K min)/S,
// S the sum of the exponentials e_j and P that before bin k: M = c (dx0 P + dw e_k), dlogit_j = e_j (c v_j - M/S), where v_j is
// dx0 (j < k), dw (j = k) or 0. The bin is found and read by compare-and-blend while summing, without a gather.
#pragma once

#include <math.h>

#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {

constexpr int kSplineBins = 64;

template <class T>
struct SplineOptions {
  int bins, tails;  // 0 linear, 1 none, 2 circular
  bool zuko;        // softly clipped logits, derivatives exp, knots in the bin on their left; else as nflows
  T left, right, bottom, top, min_width, min_height, min_derivative, log_slope, logit_scale;

  int derivatives() const { return bins - 1 + (tails == 0 ? 0 : tails == 1 ? 2 : 1); }
  int params() const { return 2 * bins + derivatives(); }
};

// 2^z for z <= 0, about 2 ULP; a NaN stays, and what is not a normal number is the least one.
template <class T>
GENFAST_INLINE Vec<T> exp2_below(Vec<T> z) {
  const T least = sizeof(T) == 4 ? T(-126) : T(-1022);
  z = z < least ? splat(least) : z;
#if GENFAST_VECTOR_BYTES == 64
  if (sizeof(T) == 4) {
    const __m512 all = reinterpret_cast<__m512>(z), n = _mm512_maskz_roundscale_ps(__mmask16(-1), all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec<float> f = reinterpret_cast<Vec<float>>(all) - reinterpret_cast<Vec<float>>(n);
    Vec<float> p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    return reinterpret_cast<Vec<T>>(_mm512_maskz_scalef_ps(__mmask16(-1), reinterpret_cast<__m512>(p), n));
  }
#endif
  const Vec<T> rounded = z + Types<T>::kMagic, r = (z - (rounded - Types<T>::kMagic)) * T(0.69314718055994530942);
  const Vec<T> p = exp_tail(r) * (r * r) + (r + T(1));
  const Vec<T> y = from_bits<T>(bits<T>(p) + (bits<T>(rounded) << Types<T>::kMantissa));
  return z == z ? y : z;
}

// 1 / d, about 1 ULP, for normal d.
template <class T>
GENFAST_INLINE Vec<T> reciprocal(Vec<T> d) {
#if GENFAST_VECTOR_BYTES == 64
  if (sizeof(T) == 4) {
    const Vec<float> near = reinterpret_cast<Vec<float>>(_mm512_maskz_rcp14_ps(__mmask16(-1), reinterpret_cast<__m512>(d)));
    return reinterpret_cast<Vec<T>>(near * (2.0f - reinterpret_cast<Vec<float>>(d) * near));
  }
#endif
  return T(1) / d;
}

constexpr double kLog2E = 1.44269504088896340736;

// One axis: the exponentials of its logits and what makes sizes of them.
template <class T, int N>
struct SplineAxis {
  Vec<T> e[N], clip[N];  // clip: 1 / (1 + |2 logit / log slope|), zuko alone
  Vec<T> sum, factor;    // size_j = least + factor e_j
  T least, low;
};

template <class T>
struct SplinePoint {
  Vec<T> k, x0, w, y0, h, d0, d1, slope0, slope1;  // slope: of d, by its logit
  Vec<T> before_x, within_x, before_y, within_y;  // exponentials summed before the bin, and of it
  Mask<T> outside;
  Vec<T> theta, part, s, t, n, e, q, inverse_w, inverse_e;
};

template <class T>
GENFAST_INLINE Vec<T> clamp_unit(Vec<T> v) {  // a NaN stays
  v = v < T(0) ? splat(T(0)) : v;
  return v > T(1) ? splat(T(1)) : v;
}

template <class T, int N>
GENFAST_INLINE void spline_axis(const SplineOptions<T>& o, int bins, const Vec<T>* logits, T low, T high, T minimum,
                                SplineAxis<T, N>& a) {
  const T rate = T(kLog2E) * o.logit_scale;
  const Vec<T>* z = logits;
  if (o.zuko) {
    const T steep = -2 * o.logit_scale / o.log_slope;
    for (int j = 0; j < bins; ++j) {
      a.clip[j] = reciprocal<T>(abs<T>(logits[j]) * steep + T(1));
      a.e[j] = logits[j] * a.clip[j];
    }
    z = a.e;
  }
  Vec<T> largest = z[0], sum = Vec<T>{};
#pragma GCC unroll 16
  for (int j = 1; j < bins; ++j) largest = z[j] > largest ? z[j] : largest;
  const Vec<T> shift = largest * rate;
#pragma GCC unroll 8
  for (int j = 0; j < bins; ++j) {
    a.e[j] = exp2_below<T>(z[j] * rate - shift);
    sum += a.e[j];
  }
  a.sum = sum;
  a.least = (high - low) * minimum, a.low = low;
  a.factor = (high - low) * (1 - T(bins) * minimum) / a.sum;
}

// A knot's derivative, and the derivative of that, of its logit.
template <class T>
GENFAST_INLINE Vec<T> spline_derivative(const SplineOptions<T>& o, Vec<T> u, Vec<T>& slope) {
  if (o.zuko) {
    const Vec<T> clip = T(1) / (abs<T>(u) * (-1 / o.log_slope) + T(1)), d = exp<T>(u * clip);
    slope = d * clip * clip;
    return d;
  }
  const Vec<T> small = exp2_below<T>(abs<T>(u) * T(-kLog2E)), positive = u > T(0) ? u : splat(T(0));
  slope = (u > T(0) ? splat(T(1)) : small) / (small + T(1));
  return positive + log1p_unit<T>(small) + o.min_derivative;
}

// Everything that y, logdet and the gradients are made of. N is the number of bins, or kSplineBins with bins below it.
template <class T, int N>
GENFAST_INLINE void spline_solve(const SplineOptions<T>& o, int bins, const Vec<T>* params, Vec<T> x, bool inverse,
                                 SplineAxis<T, N>& ax, SplineAxis<T, N>& ay, SplinePoint<T>& p) {
  spline_axis<T, N>(o, bins, params, o.left, o.right, o.zuko ? T(0) : o.min_width, ax);
  spline_axis<T, N>(o, bins, params + bins, o.bottom, o.top, o.zuko ? T(0) : o.min_height, ay);
  const T low = inverse ? o.bottom : o.left, high = inverse ? o.top : o.right;
  p.outside = o.zuko ? (x <= low) | (x > high) : (x < low) | (x > high);
  x = p.outside ? splat((low + high) / 2) : x;

  const SplineAxis<T, N>&a = inverse ? ay : ax, &b = inverse ? ax : ay;
  const Vec<T>* d = params + 2 * bins;
  const int shift = o.tails == 0 ? 1 : 0;  // the logit of knot j is d[j - shift]
  Vec<T> running = Vec<T>{}, k = Vec<T>{}, before_a = Vec<T>{}, before_b = Vec<T>{}, a_e = a.e[0], b_e = b.e[0];
  Vec<T> u0 = d[0], u1 = d[1 - shift];
#pragma GCC unroll 8
  for (int j = 1; j < bins; ++j) {
    running += a.e[j - 1];
    const Vec<T> start = a.factor * running + (a.least * T(j) + a.low);
    const Mask<T> passed = o.zuko ? x > start : x >= start;
    k = passed ? splat(T(j)) : k;
    before_a = passed ? running : before_a;
    before_b = passed ? before_b + b.e[j - 1] : before_b;
    a_e = passed ? a.e[j] : a_e;
    b_e = passed ? b.e[j] : b_e;
    u0 = passed ? d[j - shift] : u0;
    if (o.tails != 0 || j + 1 < bins) u1 = passed ? d[o.tails == 2 && j + 1 == bins ? 0 : j + 1 - shift] : u1;
  }
  const Vec<T> a0 = a.factor * before_a + (k * a.least + a.low), b0 = b.factor * before_b + (k * b.least + b.low);
  const Vec<T> a_size = a.factor * a_e + a.least, b_size = b.factor * b_e + b.least;
  p.k = k;
  p.d0 = spline_derivative<T>(o, u0, p.slope0), p.d1 = spline_derivative<T>(o, u1, p.slope1);
  if (o.tails == 0) {
    p.d0 = k == T(0) ? splat(T(1)) : p.d0;
    p.d1 = k == T(bins - 1) ? splat(T(1)) : p.d1;
  }
  p.x0 = inverse ? b0 : a0, p.w = inverse ? b_size : a_size, p.y0 = inverse ? a0 : b0, p.h = inverse ? a_size : b_size;
  p.before_x = inverse ? before_b : before_a, p.within_x = inverse ? b_e : a_e;
  p.before_y = inverse ? before_a : before_b, p.within_y = inverse ? a_e : b_e;

  p.inverse_w = T(1) / p.w;
  p.s = p.h * p.inverse_w;
  const Vec<T> bend = p.d0 + p.d1 - T(2) * p.s;
  if (inverse) {
    p.part = clamp_unit<T>((x - p.y0) / p.h);
    const Vec<T> linear = p.d0 - p.part * bend, rs = p.s * p.part;
    const Vec<T> square = linear * linear + T(4) * (p.part * bend + (p.s - p.d0)) * rs;
    p.theta = clamp_unit<T>(T(2) * rs / (linear + root(square < T(0) ? splat(T(0)) : square)));
  } else {
    p.theta = clamp_unit<T>((x - p.x0) * p.inverse_w);
  }
  const Vec<T> rest = T(1) - p.theta;
  p.t = p.theta * rest;
  p.n = p.theta * (p.s * p.theta + p.d0 * rest);
  p.e = bend * p.t + p.s;
  p.q = p.d1 * p.theta * p.theta + (T(2) * p.s * p.t + p.d0 * rest * rest);
  p.inverse_e = T(1) / p.e;
  if (!inverse) p.part = p.n * p.inverse_e;
}

template <class T>
GENFAST_INLINE Vec<T> spline_log_slope(const SplinePoint<T>& p) {
  const T tiny = sizeof(T) == 4 ? T(1.17549435e-38f) : T(2.2250738585072014e-308);
  const Vec<T> ratio = p.s * p.inverse_e;
  Vec<T> slope = p.q * ratio * ratio;
  Vec<T> more = Vec<T>{};
  if (collect<T>(slope < tiny)) {  // a bin so flat that the product leaves the normal numbers
    more = log<T>(ratio < tiny ? splat(tiny) : ratio);
    slope = p.q * ratio;
    slope = slope < tiny ? splat(tiny) : slope;
  }
  return log<T>(slope) + more;
}

template <class T, int N>
GENFAST_INLINE void spline_of(const SplineOptions<T>& o, int bins, const Vec<T>* params, Vec<T> x, bool inverse, Vec<T>& y,
                              Vec<T>& logdet) {
  SplineAxis<T, N> ax, ay;
  SplinePoint<T> p;
  spline_solve<T, N>(o, bins, params, x, inverse, ax, ay, p);
  const Vec<T> l = spline_log_slope<T>(p), inside = inverse ? p.theta * p.w + p.x0 : p.part * p.h + p.y0;
  const Vec<T> beyond = o.tails == 1 ? splat(T(NAN)) : x;
  y = p.outside ? beyond : inside;
  logdet = p.outside ? (o.tails == 1 ? beyond : Vec<T>{}) : inverse ? -l : l;
}

// y and logdet of one vector; outside of a domain without tails they are NaN.
template <class T>
GENFAST_INLINE void spline(const SplineOptions<T>& o, const Vec<T>* params, Vec<T> x, bool inverse, Vec<T>& y, Vec<T>& logdet) {
  spline_of<T, kSplineBins>(o, o.bins, params, x, inverse, y, logdet);
}

// The softmax's three values of an axis: for bins before k, for it, and for those after it.
template <class T>
struct SplineLogits {
  Vec<T> before, within, after;
};

template <class T, int N>
GENFAST_INLINE SplineLogits<T> spline_logits(const SplineOptions<T>& o, const SplineAxis<T, N>& a, Vec<T> before_sum,
                                             Vec<T> within_sum, Vec<T> before, Vec<T> within) {
  const Vec<T> c = a.factor * o.logit_scale, mean = c * (before * before_sum + within * within_sum) / a.sum;
  return {before * c - mean, within * c - mean, -mean};
}

template <class T, int N>
GENFAST_INLINE void spline_backward_of(const SplineOptions<T>& o, int bins, const Vec<T>* params, Vec<T> x, bool inverse,
                                       Vec<T> gy, Vec<T> gl, Vec<T>& dx, Vec<T>* dparams) {
  SplineAxis<T, N> ax, ay;
  SplinePoint<T> p;
  spline_solve<T, N>(o, bins, params, x, inverse, ax, ay, p);
  const Vec<T> dx_outside = o.tails == 1 ? Vec<T>{} : gy;
  gy = p.outside ? Vec<T>{} : gy;
  gl = p.outside ? Vec<T>{} : inverse ? -gl : gl;
  const Vec<T> rest = T(1) - p.theta, turn = T(1) - T(2) * p.theta, bend = p.d0 + p.d1 - T(2) * p.s;
  const Vec<T> inverse_q = T(1) / p.q, ie2 = p.inverse_e * p.inverse_e, te = T(2) * p.t * p.inverse_e;
  const Vec<T> l_theta = T(2) * ((p.d1 * p.theta + p.s * turn - p.d0 * rest) * inverse_q - bend * turn * p.inverse_e);
  const Vec<T> g_theta = p.s * p.q * ie2;
  Vec<T> g, dx0, dw, dy0, dh, d;
  if (inverse) {
    g = -(gy * p.w + gl * l_theta) / g_theta;
    dx0 = gy, dw = gy * p.theta;
    dy0 = g / p.h, dh = dy0 * p.part, d = -dy0;
  } else {
    g = gy * p.h;
    d = (g * g_theta + gl * l_theta) * p.inverse_w;
    dx0 = -d, dw = -d * p.theta, dy0 = gy, dh = gy * p.part;
  }
  const Vec<T> flat = T(1) - T(2) * p.t, ge = g * ie2;
  const Vec<T> l_s = T(2) * (p.w / p.h + p.t * inverse_q - flat * p.inverse_e);
  const Vec<T> ds = (ge * (p.theta * p.theta * p.e - p.n * flat) + gl * l_s) * p.inverse_w;
  dw -= ds * p.s, dh += ds;
  Vec<T> dd0 = ge * p.t * (p.e - p.n) + gl * (rest * rest * inverse_q - te);
  Vec<T> dd1 = gl * (p.theta * p.theta * inverse_q - te) - ge * p.t * p.n;
  dd0 *= p.slope0, dd1 *= p.slope1;

  dx = p.outside ? dx_outside : d;
  const SplineLogits<T> vx = spline_logits<T, N>(o, ax, p.before_x, p.within_x, dx0, dw);
  const SplineLogits<T> vy = spline_logits<T, N>(o, ay, p.before_y, p.within_y, dy0, dh);
#pragma GCC unroll 8
  for (int j = 0; j < bins; ++j) {
    const Mask<T> reached = p.k >= T(j), passed = p.k > T(j);
    Vec<T> x_value = reached ? vx.within : vx.after, y_value = reached ? vy.within : vy.after;
    x_value = passed ? vx.before : x_value, y_value = passed ? vy.before : y_value;
    dparams[j] = ax.e[j] * x_value, dparams[bins + j] = ay.e[j] * y_value;
  }
  if (o.zuko)
    for (int j = 0; j < bins; ++j) {
      dparams[j] *= ax.clip[j] * ax.clip[j];
      dparams[bins + j] *= ay.clip[j] * ay.clip[j];
    }
  Vec<T>* out = dparams + 2 * bins;
  const int count = bins - 1 + (o.tails == 0 ? 0 : o.tails == 1 ? 2 : 1), shift = o.tails == 0 ? 1 : 0;
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {  // knot i + shift is the left one of its bin and the right one of the bin before
    const Vec<T> left = p.k == T(i + shift) ? dd0 : Vec<T>{};
    out[i] = p.k == T(i + shift - 1) ? dd1 : left;
  }
  if (o.tails == 2) out[0] = p.k == T(bins - 1) ? dd1 : out[0];
}

// The gradients of x and of the parameters, from those of y and of logdet.
template <class T>
GENFAST_INLINE void spline_backward(const SplineOptions<T>& o, const Vec<T>* params, Vec<T> x, bool inverse, Vec<T> gy, Vec<T> gl,
                                    Vec<T>& dx, Vec<T>* dparams) {
  spline_backward_of<T, kSplineBins>(o, o.bins, params, x, inverse, gy, gl, dx, dparams);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
