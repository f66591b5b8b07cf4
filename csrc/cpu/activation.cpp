// Pointwise activations between the layers of a critic, and what a gradient penalty needs of them (DESIGN section 8).
//
// leaky relu: y = x where x > 0, s x elsewhere, and the signs as one bit an element, which is all that its backward and its
//   tangent need: y = x where the bit is set, s x elsewhere. In float 8.125 bytes an element each.
// smooth maps s: chain = grad s'(x) (12 bytes), second = cotangent s'(x) + grad tangent s''(x) (16 to 20), both slopes from one
//   exponential and at most two divisions.
// One pass each; bound by memory bandwidth once the data leaves the caches.
#include "kernels.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 4096;  // elements of a task; a multiple of 64, so that no two share a byte of bits

template <class T, bool kApply>
GENFAST_INLINE void leaky_block(const T* x, T* y, uint8_t* bits, T slope, int count) {  // at most 64 elements
  constexpr int n = lanes<T>();
  uint64_t signs = 0;
  if (kApply) {
    if (count == 64)
      memcpy(&signs, bits, 8);
    else
      for (int i = 0; i < (count + 7) / 8; ++i) signs |= uint64_t(bits[i]) << (8 * i);
  }
  for (int i = 0; i < count; i += n) {
    const int part = count - i < n ? count - i : n;
    const Vec<T> v = part == n ? load(x + i) : load_part(x + i, part);
    const Mask<T> on = kApply ? spread<T>(signs >> i) : Mask<T>(v > T(0));
    if (!kApply) signs |= collect<T>(on) << i;
    // Slope 0 is relu: 0 even of infinity; a NaN, which has no sign, stays one where the sign is x's own.
    const Vec<T> rest = slope != T(0) ? v * slope : kApply ? Vec<T>{} : (v == v ? Vec<T>{} : v);
    const Vec<T> out = on ? v : rest;
    part == n ? store(y + i, out) : store_part(y + i, out, part);
  }
  if (kApply) return;
  if (count == 64)
    memcpy(bits, &signs, 8);
  else
    for (int i = 0; i < (count + 7) / 8; ++i) bits[i] = uint8_t(signs >> (8 * i));
}

template <class T, bool kApply>
void leaky(const LeakyReluArgs& a) {
  const int64_t chunks = (a.columns + kChunk - 1) / kChunk, bytes = (a.columns + 7) / 8;
  const int threads = a.rows * a.columns < kSerial ? 1 : a.threads;
  const T slope = T(a.slope);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.rows * chunks; ++item) {
    const int64_t row = item / chunks, from = item % chunks * kChunk;
    const int64_t to = a.columns - from < kChunk ? a.columns : from + kChunk;
    const T* x = static_cast<const T*>(a.x) + row * a.columns;
    T* y = static_cast<T*>(a.y) + row * a.columns;
    uint8_t* bits = a.bits + row * bytes;
    int64_t i = from;
    for (; i + 64 <= to; i += 64) leaky_block<T, kApply>(x + i, y + i, bits + i / 8, slope, 64);
    if (i < to) leaky_block<T, kApply>(x + i, y + i, bits + i / 8, slope, int(to - i));
  }
}

template <class T>
GENFAST_INLINE Vec<T> at_most(Vec<T> x, T limit) {  // keeps NaN
  return x > limit ? splat(limit) : x;
}

// x and q(x) = x for silu; for s = x sigmoid(q): s' = p + x p (1 - p) q', s'' = p (1 - p) (2 q' + x (q'' + q'^2 (1 - 2 p))).
template <class T>
GENFAST_INLINE void gated_slopes(Vec<T> x, Vec<T> q, Vec<T> q1, Vec<T> q2, Vec<T>& first, Vec<T>& second) {
  Vec<T> p, rest, unused;
  sigmoid<T>(q, p, rest, unused);
  const Vec<T> slope = p * rest;
  first = p + x * slope * q1;
  second = slope * (q1 * T(2) + x * (q2 + q1 * q1 * (rest - p)));
}

template <class T, int kKind>
GENFAST_INLINE void slopes(Vec<T> x, Vec<T>& first, Vec<T>& second) {
  const Vec<T> zero = splat(T(0)), one = splat(T(1));
  if (kKind == ActivationArgs::kSilu) {
    gated_slopes<T>(x, x, one, zero, first, second);
  } else if (kKind == ActivationArgs::kGelu) {  // s = x P, P the normal distribution, whose tail is half of erfc(|x| / sqrt 2)
    const Vec<T> density = exp<T>(x * x * T(-0.5));
    const Vec<T> tail = density * T(0.5) * erfc_scaled<T>(abs<T>(x) * T(0.70710678118654752440));
    const Vec<T> phi = density * T(0.39894228040143267794);
    first = (x < T(0) ? tail : one - tail) + x * phi;
    second = (T(2) - x * x) * phi;
    second = density == T(0) ? zero : second;  // where x^2 may be infinite
  } else if (kKind == ActivationArgs::kGeluTanh) {  // (1 + tanh u) / 2 = sigmoid(2 u), u = k (x + c x^3); flat beyond 30
    const T k2 = T(2 * 0.79788456080286535588), c = T(0.044715);
    Vec<T> z = at_most<T>(x, T(30));
    z = z < T(-30) ? splat(T(-30)) : z;
    gated_slopes<T>(z, k2 * z * (z * z * c + T(1)), k2 * (z * z * (3 * c) + T(1)), k2 * (6 * c) * z, first, second);
  } else if (kKind == ActivationArgs::kTanh) {  // tanh = m / (m + 2), s' = 4 (m + 1) / (m + 2)^2 with m = e^2|x| - 1
    const Vec<T> m = exp_minus_one<T>(at_most<T>(abs<T>(x) * T(2), sizeof(T) == 4 ? T(80) : T(700)));
    const Vec<T> r = one / (m + T(2)), t = m * r;
    first = (m + T(1)) * r * (r * T(4));
    second = first * t * (x < T(0) ? T(2) * one : T(-2) * one);
    first = x == x ? first : x;
    second = x == x ? second : x;
  } else if (kKind == ActivationArgs::kSigmoid || kKind == ActivationArgs::kSoftplus) {
    Vec<T> p, rest, unused;
    sigmoid<T>(x, p, rest, unused);
    if (kKind == ActivationArgs::kSigmoid) {
      first = p * rest;
      second = first * (rest - p);
    } else {
      first = x > T(20) ? one : p;
      second = x > T(20) ? zero : p * rest;
    }
  } else if (kKind == ActivationArgs::kElu || kKind == ActivationArgs::kSelu) {
    const bool scaled = kKind == ActivationArgs::kSelu;
    const T scale = scaled ? T(1.0507009873554804934193349852946) : T(1);
    const T alpha = scaled ? T(1.7580993408473768599402175208123) : T(1);  // scale times alpha
    const Vec<T> e = alpha * exp<T>(x);
    first = x > T(0) ? scale * one : e;
    second = x > T(0) ? zero : e;
  } else {  // mish = x w, w = tanh(softplus(x)) = n / (n + 2), n = e (e + 2), e = e^x; w' = (1 - w^2) p, p the sigmoid
    const Vec<T> z = at_most<T>(x, T(40)), e = exp<T>(at_most<T>(z, sizeof(T) == 4 ? T(20) : T(40)));
    const Vec<T> n = e * (e + T(2)), r = one / (n + T(2)), w = n * r, rest = one / (e + T(1)), p = e * rest;
    const Vec<T> slope = T(2) * r * (w + T(1)) * p;
    const Vec<T> low = z < T(-100) && slope == T(0) ? zero : z;  // minus infinity times 0
    first = w + low * slope;
    second = slope * (T(2) + low * (rest - T(2) * w * p));
  }
}

template <class T, int kKind, bool kSecond, bool kCotangent>
GENFAST_INLINE Vec<T> element(Vec<T> x, Vec<T> grad, Vec<T> tangent, Vec<T> cotangent) {
  Vec<T> first, second;
  slopes<T, kKind>(x, first, second);
  if (!kSecond) return grad * first;
  const Vec<T> curved = grad * tangent * second;
  return kCotangent ? cotangent * first + curved : curved;
}

template <class T, int kKind, bool kSecond, bool kCotangent>
void pass(const ActivationArgs& a) {
  constexpr int n = lanes<T>();
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  const T *tangent = static_cast<const T*>(kSecond ? a.tangent : a.x), *cotangent = static_cast<const T*>(kCotangent ? a.cotangent : a.x);
  T* y = static_cast<T*>(a.y);
  const int threads = a.size < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < (a.size + kChunk - 1) / kChunk; ++chunk) {
    int64_t i = chunk * kChunk;
    const int64_t to = a.size - i < kChunk ? a.size : i + kChunk;
    for (; i + n <= to; i += n)
      store(y + i, element<T, kKind, kSecond, kCotangent>(load(x + i), load(grad + i), load(tangent + i), load(cotangent + i)));
    if (i < to) {
      const int part = int(to - i);
      const Vec<T> out = element<T, kKind, kSecond, kCotangent>(load_part(x + i, part), load_part(grad + i, part),
                                                                load_part(tangent + i, part), load_part(cotangent + i, part));
      store_part(y + i, out, part);
    }
  }
}

template <class T, int kKind>
void of_kind(const ActivationArgs& a) {
  if (!a.second) return pass<T, kKind, false, false>(a);
  if (a.cotangent) return pass<T, kKind, true, true>(a);
  pass<T, kKind, true, false>(a);
}

template <class T>
void any(const ActivationArgs& a) {
  switch (a.kind) {
    case ActivationArgs::kSilu: return of_kind<T, ActivationArgs::kSilu>(a);
    case ActivationArgs::kGelu: return of_kind<T, ActivationArgs::kGelu>(a);
    case ActivationArgs::kGeluTanh: return of_kind<T, ActivationArgs::kGeluTanh>(a);
    case ActivationArgs::kTanh: return of_kind<T, ActivationArgs::kTanh>(a);
    case ActivationArgs::kSigmoid: return of_kind<T, ActivationArgs::kSigmoid>(a);
    case ActivationArgs::kSoftplus: return of_kind<T, ActivationArgs::kSoftplus>(a);
    case ActivationArgs::kElu: return of_kind<T, ActivationArgs::kElu>(a);
    case ActivationArgs::kSelu: return of_kind<T, ActivationArgs::kSelu>(a);
    default: return of_kind<T, ActivationArgs::kMish>(a);
  }
}

}  // namespace

void leaky_relu_bits(const LeakyReluArgs& a) {
  if (a.apply)
    a.is_double ? leaky<double, true>(a) : leaky<float, true>(a);
  else
    a.is_double ? leaky<double, false>(a) : leaky<float, false>(a);
}

void activation(const ActivationArgs& a) { a.is_double ? any<double>(a) : any<float>(a); }

}  // namespace GENFAST_ISA
}  // namespace genfast
