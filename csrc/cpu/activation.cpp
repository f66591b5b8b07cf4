// Pointwise activations between the layers of a critic, and what a gradient penalty needs of them (DESIGN section 8).
//
// leaky relu: y = x where x > 0, s x elsewhere, and the signs as one bit an element, which is all that its backward and its
//   tangent need: y = x where the bit is set, s x elsewhere. In float 8.125 bytes an element each.
// smooth maps s: chain = grad s'(x) (12 bytes), second = cotangent s'(x) + grad tangent s''(x) (16 to 20), both slopes from one
//   exponential and at most two divisions.
// One pass each; bound by memory bandwidth once the data leaves the caches.
#include "dtype_switch.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kChunk = 4096;  // elements of a task; a multiple of 64, so that no two share a byte of bits
constexpr int64_t kCache = 16 << 20;  // bytes from which an output will not be found in the cache by who reads it next

template <class T>
bool beyond_cache(const T* y, int64_t size) {
  return size * int64_t(sizeof(T)) >= kCache && aligned(y);
}

// x where `on`, slope x elsewhere. Slope 0 is relu: 0 even of infinity; a NaN, which has no sign, stays one where `on` is x's own.
template <class T, bool kApply, bool kRelu>
GENFAST_INLINE Vec<T> leaky_vector(Vec<T> x, Mask<T> on, T slope) {
  if (!kRelu) return on ? x : x * slope;
  return on ? x : kApply ? Vec<T>{} : (x == x ? Vec<T>{} : x);
}

template <class T, bool kApply, bool kRelu, bool kStream>
GENFAST_INLINE void leaky_block(const T* x, T* y, uint8_t* bits, T slope) {  // 64 elements
  constexpr int n = lanes<T>();
  uint64_t signs = 0;
  if (kApply) memcpy(&signs, bits, 8);
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += n) {
    const Vec<T> v = load(x + i);
    const Mask<T> on = kApply ? spread<T>(signs >> i) : Mask<T>(v > T(0));
    if (!kApply) signs |= collect<T>(on) << i;
    const Vec<T> out = leaky_vector<T, kApply, kRelu>(v, on, slope);
    kStream ? stream(y + i, out) : store(y + i, out);
  }
  if (!kApply) memcpy(bits, &signs, 8);
}

template <class T, bool kApply, bool kRelu>
void leaky_rest(const T* x, T* y, uint8_t* bits, T slope, int count) {  // fewer than 64
  constexpr int n = lanes<T>();
  uint64_t signs = 0;
  if (kApply)
    for (int i = 0; i < (count + 7) / 8; ++i) signs |= uint64_t(bits[i]) << (8 * i);
  for (int i = 0; i < count; i += n) {
    const int part = count - i < n ? count - i : n;
    const Vec<T> v = load_part(x + i, part);
    const Mask<T> on = kApply ? spread<T>(signs >> i) : Mask<T>(v > T(0));
    if (!kApply) signs |= collect<T>(on) << i;
    store_part(y + i, leaky_vector<T, kApply, kRelu>(v, on, slope), part);
  }
  if (!kApply)
    for (int i = 0; i < (count + 7) / 8; ++i) bits[i] = uint8_t(signs >> (8 * i));
}

template <class T, bool kApply, bool kRelu, bool kStream>
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
    for (; i + 64 <= to; i += 64) leaky_block<T, kApply, kRelu, kStream>(x + i, y + i, bits + i / 8, slope);
    if (i < to) leaky_rest<T, kApply, kRelu>(x + i, y + i, bits + i / 8, slope, int(to - i));
  }
}

template <class T, bool kApply>
void leaky_any(const LeakyReluArgs& a) {
  const bool streams = a.x != a.y && a.rows == 1 && beyond_cache<T>(static_cast<const T*>(a.y), a.columns);
  if (a.slope == 0)
    streams ? leaky<T, kApply, true, true>(a) : leaky<T, kApply, true, false>(a);
  else
    streams ? leaky<T, kApply, false, true>(a) : leaky<T, kApply, false, false>(a);
}

// x cut off where e^-|x| leaves the normal numbers; keeps NaN.
template <class T>
GENFAST_INLINE Vec<T> limited(Vec<T> x, T limit = sizeof(T) == 4 ? T(87) : T(700)) {
  x = x > limit ? splat(limit) : x;
  return x < -limit ? splat(-limit) : x;
}

// p = sigmoid(z) and 1 - p for limited z; any number for NaN.
template <class T>
GENFAST_INLINE void logistic(Vec<T> z, Vec<T>& p, Vec<T>& rest) {
  const Vec<T> e = exp_in_range<T>(-abs<T>(z)), big = T(1) / (e + T(1)), small = e * big;
  p = z < T(0) ? small : big;
  rest = z < T(0) ? big : small;
}

// For s = x p, p = sigmoid(q(x)): s' = p + x p (1 - p) q', s'' = p (1 - p) (2 q' + x (q'' + q'^2 (1 - 2 p))).
template <class T>
GENFAST_INLINE void gated_slopes(Vec<T> x, Vec<T> q, Vec<T> q1, Vec<T> q2, Vec<T>& first, Vec<T>& second) {
  Vec<T> p, rest;
  logistic<T>(q, p, rest);
  const Vec<T> slope = p * rest;
  first = p + x * slope * q1;
  second = slope * (q1 * T(2) + x * (q2 + q1 * q1 * (rest - p)));
}

// s'(x) and s''(x); beyond the limit of an argument they are what they are there, flat to 1e-35.
template <class T, int kKind>
GENFAST_INLINE void slopes(Vec<T> x, Vec<T>& first, Vec<T>& second) {
  const Vec<T> zero = splat(T(0)), one = splat(T(1));
  if (kKind == ActivationArgs::kSilu) {
    const Vec<T> z = limited<T>(x);
    gated_slopes<T>(z, z, one, zero, first, second);
  } else if (kKind == ActivationArgs::kGelu) {  // s = x P, P the normal distribution, whose tail is half of erfc(|x| / sqrt 2)
    const Vec<T> z = limited<T>(x, sizeof(T) == 4 ? T(13) : T(37)), density = exp_in_range<T>(z * z * T(-0.5));
    const Vec<T> tail = density * T(0.5) * erfc_scaled<T>(abs<T>(z) * T(0.70710678118654752440));
    const Vec<T> phi = density * T(0.39894228040143267794);
    first = (z < T(0) ? tail : one - tail) + z * phi;
    second = (T(2) - z * z) * phi;
  } else if (kKind == ActivationArgs::kGeluTanh) {  // (1 + tanh u) / 2 = sigmoid(2 u), u = k (x + c x^3)
    const T k2 = T(2 * 0.79788456080286535588), c = T(0.044715);
    const Vec<T> z = limited<T>(x, sizeof(T) == 4 ? T(9.9) : T(20)), w = z * z;  // 2 u is within its limit
    gated_slopes<T>(z, k2 * z * (w * c + T(1)), k2 * (w * (3 * c) + T(1)), k2 * (6 * c) * z, first, second);
  } else if (kKind == ActivationArgs::kTanh) {  // tanh |x| = -m / (m + 2), s' = 4 e / (m + 2)^2 with e = e^-2|x|, m = e - 1
    Vec<T> rounded;
    const Vec<T> z = reduce<T>(limited<T>(abs<T>(x) * T(-2)), rounded), tail = exp_tail(z) * (z * z) + z;
    const Vec<T> power = from_bits<T>(bits<T>(one) + (bits<T>(rounded) << Types<T>::kMantissa));
    // Of one series, e and m each without cancelling: m + 1 has lost the digits of e in the tail, e - 1 those of m near zero.
    const Vec<T> e = power * tail + power, m = power * tail + (power - one), r = T(1) / (m + T(2));
    first = e * r * (r * T(4));
    second = first * m * r * (x < T(0) ? T(-2) * one : T(2) * one);
    first = x == x ? first : x;
    second = x == x ? second : x;
  } else if (kKind == ActivationArgs::kSigmoid || kKind == ActivationArgs::kSoftplus) {
    Vec<T> p, rest;
    logistic<T>(limited<T>(x), p, rest);
    const Vec<T> slope = p * rest;
    if (kKind == ActivationArgs::kSigmoid) {
      first = x == x ? slope : x;
      second = slope * (rest - p);
      second = x == x ? second : x;
    } else {
      first = x > T(20) ? one : (x == x ? p : x);
      second = x > T(20) ? zero : (x == x ? slope : x);
    }
  } else if (kKind == ActivationArgs::kElu || kKind == ActivationArgs::kSelu) {
    const bool scaled = kKind == ActivationArgs::kSelu;
    const T scale = scaled ? T(1.0507009873554804934193349852946) : T(1);
    const T alpha = scaled ? T(1.7580993408473768599402175208123) : T(1);  // scale times alpha
    const Vec<T> e = alpha * exp_in_range<T>(limited<T>(x));
    first = x > T(0) ? scale * one : (x == x ? e : x);
    second = x > T(0) ? zero : (x == x ? e : x);
  } else {  // mish = x w, w = tanh(softplus(x)) = n / (n + 2), n = e (e + 2), e = e^x; w' = (1 - w^2) p, p the sigmoid
    const Vec<T> z = x > T(40) ? splat(T(40)) : limited<T>(x);
    const Vec<T> e = exp_in_range<T>(z), n = e * (e + T(2)), r = T(1) / (n + T(2)), w = n * r;
    const Vec<T> rest = T(1) / (e + T(1)), p = e * rest, slope = T(2) * r * (w + T(1)) * p;
    first = w + z * slope;
    second = slope * (T(2) + z * (rest - T(2) * w * p));
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

// Whole vectors. A function of its own, since calls around the loop would take its registers.
template <class T, int kKind, bool kSecond, bool kCotangent>
__attribute__((noinline)) void run_vectors(const T* x, const T* grad, const T* tangent, const T* cotangent, T* y, int64_t length,
                                           bool streams) {
  for (int64_t i = 0; i < length; i += lanes<T>()) {
    const Vec<T> out = element<T, kKind, kSecond, kCotangent>(load(x + i), load(grad + i), load(tangent + i), load(cotangent + i));
    streams ? stream(y + i, out) : store(y + i, out);
  }
}

template <class T, int kKind, bool kSecond, bool kCotangent>
void pass(const ActivationArgs& a) {
  constexpr int n = lanes<T>();
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  const T *tangent = static_cast<const T*>(kSecond ? a.tangent : a.x), *cotangent = static_cast<const T*>(kCotangent ? a.cotangent : a.x);
  T* y = static_cast<T*>(a.y);
  const int threads = a.size < kSerial ? 1 : a.threads;
  const bool streams = beyond_cache<T>(y, a.size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < (a.size + kChunk - 1) / kChunk; ++chunk) {
    const int64_t start = chunk * kChunk, length = a.size - start < kChunk ? a.size - start : kChunk;
    const int64_t whole = start + length / n * n;
    const int rest = int(length % n);
    run_vectors<T, kKind, kSecond, kCotangent>(x + start, grad + start, tangent + start, cotangent + start, y + start,
                                               length - rest, streams);
    if (rest) {
      T lane[5][n];
      run_vectors<T, kKind, kSecond, kCotangent>(pad(x + whole, rest, lane[0]), pad(grad + whole, rest, lane[1]),
                                                 pad(tangent + whole, rest, lane[2]), pad(cotangent + whole, rest, lane[3]),
                                                 lane[4], n, false);
      memcpy(y + whole, lane[4], size_t(rest) * sizeof(T));
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

GENFAST_KERNEL(leaky_relu_bits, LeakyReluArgs, a.apply ? leaky_any<T, true>(a) : leaky_any<T, false>(a))
GENFAST_KERNEL(activation, ActivationArgs, any<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
