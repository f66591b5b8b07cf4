// Fixed-width vectors and the few functions of them that the kernels need, as GCC/Clang vector extensions: one source for
// AVX-512, AVX2, SSE2 and NEON, chosen by the flags a file is compiled with (see setup.py).
//
// Errors measured in tests/test_vec.py against long double, in ULP of the result:
//   exp 2 (float), 2 (double); denormal results flush to zero.  log1p_unit (0 <= u <= 1) 3.  tanh 3.  sigmoid 4.  log (normal x) 1.
//   erfc_scaled 9 (6 in float).  root 0.5.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef GENFAST_ISA
#define GENFAST_ISA base
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define GENFAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GENFAST_VECTOR_BYTES 32
#else
#define GENFAST_VECTOR_BYTES 16
#endif

#define GENFAST_INLINE static inline __attribute__((always_inline))
#define GENFAST_INLINE_MEMBER inline __attribute__((always_inline))

namespace genfast {
namespace GENFAST_ISA {

template <class T>
struct Types;

template <>
struct Types<float> {
  typedef float V __attribute__((vector_size(GENFAST_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(GENFAST_VECTOR_BYTES)));
  typedef uint8_t B __attribute__((vector_size(GENFAST_VECTOR_BYTES / 4)));
  typedef int32_t Int;
  static constexpr int kMantissa = 23;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr float kExpMax = 88.722839f, kExpMin = -87.336544f;
};

template <>
struct Types<double> {
  typedef double V __attribute__((vector_size(GENFAST_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(GENFAST_VECTOR_BYTES)));
  typedef uint8_t B __attribute__((vector_size(GENFAST_VECTOR_BYTES / 8)));
  typedef int64_t Int;
  static constexpr int kMantissa = 52;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kLn2Hi = 0.693145751953125, kLn2Lo = 1.42860682030941723212e-6;
  static constexpr double kExpMax = 709.782712893384, kExpMin = -708.3964185322641;
};

template <class T>
using Vec = typename Types<T>::V;
template <class T>
using Mask = typename Types<T>::I;
template <class T>
constexpr int lanes() {
  return GENFAST_VECTOR_BYTES / int(sizeof(T));
}

template <class T>
GENFAST_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // minus zero, which compilers leave out; plus zero they may not, for it changes -0
}

template <class T>
GENFAST_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
GENFAST_INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}

// A store that does not read the line into the cache first, where there is one; p is aligned to a vector.
template <class T>
GENFAST_INLINE void stream(T* p, Vec<T> v) {
#if GENFAST_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  store(p, v);
#endif
}

template <class T>
GENFAST_INLINE bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % GENFAST_VECTOR_BYTES == 0;
}

// The first n lanes, the others zero.
template <class T>
GENFAST_INLINE Vec<T> load_part(const T* p, int n) {
  T lane[lanes<T>()] = {};
  for (int i = 0; i < n; ++i) lane[i] = p[i];
  return load(lane);
}

template <class T>
GENFAST_INLINE void store_part(T* p, Vec<T> v, int n) {
  T lane[lanes<T>()];
  store(lane, v);
  for (int i = 0; i < n; ++i) p[i] = lane[i];
}

// The first n elements at p and zeros behind, in the vector `to`; null of null. Rows that do not end with a whole vector
// end in one of these, so that a loop's body is compiled once.
template <class T>
const T* pad(const T* p, int n, T* to) {
  if (!p) return nullptr;
  memset(to, 0, sizeof(Vec<T>));
  memcpy(to, p, size_t(n) * sizeof(T));
  return to;
}

template <class T>
GENFAST_INLINE T sum(Vec<T> v) {
  T lane[lanes<T>()];
  store(lane, v);
  for (int width = lanes<T>() / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

template <class T>
GENFAST_INLINE Mask<T> bits(Vec<T> v) {
  return reinterpret_cast<Mask<T>>(v);
}

template <class T>
GENFAST_INLINE Vec<T> from_bits(Mask<T> m) {
  return reinterpret_cast<Vec<T>>(m);
}

template <class T>
GENFAST_INLINE Vec<T> abs(Vec<T> x) {
  const typename Types<T>::Int sign = typename Types<T>::Int(1) << (sizeof(T) * 8 - 1);
  return from_bits<T>(bits<T>(x) & ~(Mask<T>{} + sign));
}

// The square root, correctly rounded; compilers make one instruction of the loop.
GENFAST_INLINE Vec<float> root(Vec<float> x) {
  float lane[lanes<float>()];
  store(lane, x);
  for (int i = 0; i < lanes<float>(); ++i) lane[i] = __builtin_sqrtf(lane[i]);
  return load(lane);
}

GENFAST_INLINE Vec<double> root(Vec<double> x) {
  double lane[lanes<double>()];
  store(lane, x);
  for (int i = 0; i < lanes<double>(); ++i) lane[i] = __builtin_sqrt(lane[i]);
  return load(lane);
}

// A boolean per lane (all ones where the byte is not zero).
template <class T>
GENFAST_INLINE Mask<T> load_mask(const uint8_t* p) {
  typename Types<T>::B b;
  memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, Mask<T>) != 0;
}

// One bit a lane, lane 0 lowest, of a mask; and back, a boolean per lane of the lowest bits.
template <class T>
GENFAST_INLINE uint64_t collect(Mask<T> m) {
#if GENFAST_VECTOR_BYTES == 64
  return sizeof(T) == 4 ? uint64_t(_mm512_movepi32_mask(reinterpret_cast<__m512i>(m)))
                        : uint64_t(_mm512_movepi64_mask(reinterpret_cast<__m512i>(m)));
#elif defined(__AVX2__)
  return sizeof(T) == 4 ? uint64_t(uint32_t(_mm256_movemask_ps(reinterpret_cast<__m256>(m))))
                        : uint64_t(uint32_t(_mm256_movemask_pd(reinterpret_cast<__m256d>(m))));
#else
  typename Types<T>::Int lane[lanes<T>()];
  memcpy(lane, &m, sizeof m);
  uint64_t found = 0;
  for (int i = 0; i < lanes<T>(); ++i) found |= uint64_t(lane[i] & 1) << i;
  return found;
#endif
}

template <class T>
GENFAST_INLINE Mask<T> spread(uint64_t from) {
#if GENFAST_VECTOR_BYTES == 64
  return sizeof(T) == 4 ? reinterpret_cast<Mask<T>>(_mm512_movm_epi32(__mmask16(from)))
                        : reinterpret_cast<Mask<T>>(_mm512_movm_epi64(__mmask8(from)));
#else
  typedef typename Types<T>::Int Int;
  Mask<T> bit;
  for (int i = 0; i < lanes<T>(); ++i) bit[i] = Int(1) << i;
  return ((Mask<T>{} + Int(from)) & bit) != 0;
#endif
}

// exp(r) - 1 - r over r^2, for |r| <= ln2 / 2.
GENFAST_INLINE Vec<float> exp_tail(Vec<float> r) {
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}

GENFAST_INLINE Vec<double> exp_tail(Vec<double> r) {
  Vec<double> p = r * (1.0 / 6227020800) + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  return p * r + 0.5;
}

// x = n ln2 + r; the integer n is left in the low bits of `rounded`.
template <class T>
GENFAST_INLINE Vec<T> reduce(Vec<T> x, Vec<T>& rounded) {
  rounded = x * T(1.44269504088896340736) + Types<T>::kMagic;
  const Vec<T> n = rounded - Types<T>::kMagic;
  return (x - n * Types<T>::kLn2Hi) - n * Types<T>::kLn2Lo;
}

// exp of kExpMin <= x <= kExpMax; a NaN may give any number.
template <class T>
GENFAST_INLINE Vec<T> exp_in_range(Vec<T> x) {
  Vec<T> rounded;
  const Vec<T> r = reduce<T>(x, rounded);
  const Vec<T> p = exp_tail(r) * (r * r) + (r + T(1));
  return from_bits<T>(bits<T>(p) + (bits<T>(rounded) << Types<T>::kMantissa));
}

template <class T>
GENFAST_INLINE Vec<T> exp(Vec<T> x) {
  Vec<T> c = x > Types<T>::kExpMax ? splat(Types<T>::kExpMax) : x;
  c = c < Types<T>::kExpMin ? splat(Types<T>::kExpMin) : c;
  Vec<T> y = exp_in_range<T>(c);
  y = x > Types<T>::kExpMax ? splat(T(__builtin_inf())) : y;
  y = x < Types<T>::kExpMin ? splat(T(0)) : y;
  return x == x ? y : x;
}

// log(1 + u) for 0 <= u <= 1: 2 atanh(u / (2 + u)).
template <class T>
GENFAST_INLINE Vec<T> log1p_unit(Vec<T> u) {
  const Vec<T> w = u / (u + T(2)), w2 = w * w;
  constexpr int terms = sizeof(T) == 4 ? 8 : 18;
  Vec<T> p = splat(T(1) / T(2 * terms - 1));
#pragma GCC unroll 20
  for (int k = terms - 2; k >= 0; --k) p = p * w2 + T(1) / T(2 * k + 1);
  return T(2) * w * p;
}

// log of a positive, normal x (NaN of NaN) = 2^n y with 1/sqrt2 <= y < sqrt2: n ln2 + 2 atanh((y - 1) / (y + 1)).
template <class T>
GENFAST_INLINE Vec<T> log(Vec<T> x) {
  typedef typename Types<T>::Int Int;
  const Int root_half = sizeof(T) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdLL);
  const Mask<T> n = (bits<T>(x) - root_half) >> Types<T>::kMantissa;
  const Vec<T> y = from_bits<T>(bits<T>(x) - (n << Types<T>::kMantissa)) - T(1), e = __builtin_convertvector(n, Vec<T>);
  const Vec<T> w = y / (y + T(2)), w2 = w * w;
  constexpr int terms = sizeof(T) == 4 ? 5 : 10;
  Vec<T> p = splat(T(2) / T(2 * terms + 1));
#pragma GCC unroll 20
  for (int k = terms - 1; k >= 1; --k) p = p * w2 + T(2) / T(2 * k + 1);
  // y - (y w - w^3 p): the large part of 2 w + w^3 p is y itself, which is exact.
  const Vec<T> l = e * Types<T>::kLn2Hi + (y - (w * (y - w2 * p) - e * Types<T>::kLn2Lo));
  return x == x ? l : x;
}

// e^x - 1, which does not cancel near zero; x within the range of exp.
template <class T>
GENFAST_INLINE Vec<T> exp_minus_one(Vec<T> x) {
  Vec<T> rounded;
  const Vec<T> r = reduce<T>(x, rounded);
  const Vec<T> minus_one = exp_tail(r) * (r * r) + r;
  const Vec<T> power = from_bits<T>(bits<T>(splat(T(1))) + (bits<T>(rounded) << Types<T>::kMantissa));
  return power * minus_one + (power - T(1));
}

template <class T>
GENFAST_INLINE Vec<T> tanh(Vec<T> x) {  // m / (m + 2) with m = e^2|x| - 1
  const T limit = sizeof(T) == 4 ? T(20) : T(44);
  Vec<T> a = abs<T>(x) * T(2);
  a = a > limit ? splat(limit) : a;
  const Vec<T> m = exp_minus_one<T>(a);
  const Vec<T> y = m / (m + T(2));
  const Vec<T> signed_y = x < T(0) ? -y : y;
  return x == x ? signed_y : x;
}

// e^(x^2) erfc(x) for x >= 0, in u = 1 / (1 + c x): u times a polynomial, Chebyshev's to 1e-8 and 1e-16.
GENFAST_INLINE Vec<float> erfc_scaled_series(Vec<float> x) {
  constexpr float c[] = {-0.0298686284891798f, 0.14384106928340988f, -0.24304173183552104f, 0.14680324567174768f,
                         -0.053793166327015024f, 0.087120641642657829f, 0.11809512301367547f, 0.17189057191666254f,
                         0.20760072039703961f, 0.22567631692737903f, 0.22567583145616354f};
  const Vec<float> u = 1.0f / (x * 0.4f + 1.0f);
  Vec<float> p = splat(c[0]);
#pragma GCC unroll 32
  for (size_t i = 1; i < sizeof c / sizeof *c; ++i) p = p * u + c[i];
  return p * u;
}

GENFAST_INLINE Vec<double> erfc_scaled_series(Vec<double> x) {
  constexpr double c[] = {
      0.00064009378007875973, -0.0089152877022006396, 0.055391844702166433, -0.20377478547478403, 0.49537805719380796,
      -0.84150716678219997, 1.0359422053536269, -0.9570859459393422, 0.68750564328504056, -0.38585293370716291,
      0.16624288866605097, -0.065176643396698268, 0.013583240264755127, 0.0022807303742365721, 0.022158459929452361,
      0.043602928237897439, 0.070207634447059977, 0.098232000047182432, 0.1245857745128083, 0.14640719638538003,
      0.16164031569423475, 0.16925687506428251, 0.16925687506432693};
  const Vec<double> u = 1.0 / (x * 0.3 + 1.0);
  Vec<double> p = splat(c[0]);
#pragma GCC unroll 32
  for (size_t i = 1; i < sizeof c / sizeof *c; ++i) p = p * u + c[i];
  return p * u;
}

template <class T>
GENFAST_INLINE Vec<T> erfc_scaled(Vec<T> x) {
  return erfc_scaled_series(x);
}

// sigmoid(z), 1 - sigmoid(z) and log sigmoid(z), none of which cancels or overflows.
template <class T>
GENFAST_INLINE void sigmoid(Vec<T> z, Vec<T>& s, Vec<T>& one_minus_s, Vec<T>& log_s) {
  const Vec<T> e = exp<T>(-abs<T>(z));
  const Vec<T> big = T(1) / (e + T(1)), small = e * big;
  s = z < T(0) ? small : big;
  one_minus_s = z < T(0) ? big : small;
  const Vec<T> l = -log1p_unit<T>(e);
  log_s = z < T(0) ? z + l : l;
}

// sigmoid(z) alone, and e^-z, of |z| up to a bound beyond which nothing changes: e s is 1 - sigmoid(z), uncancelled.
template <class T>
GENFAST_INLINE Vec<T> logistic(Vec<T> z, Vec<T>& e) {
  const T bound = sizeof(T) == 4 ? T(87) : T(708);
  Vec<T> c = z > bound ? splat(bound) : z;
  c = c < -bound ? splat(-bound) : c;
  e = exp_in_range<T>(-c);
  const Vec<T> s = T(1) / (e + T(1));
  return z == z ? s : z;
}

}  // namespace GENFAST_ISA
}  // namespace genfast
