// The activations of a program's units and their derivatives, for autoregressive_inverse.cpp and flow_program.cpp.
#pragma once

#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

enum Activation { kNone, kRelu, kLeakyRelu, kElu, kTanh, kSigmoid, kSoftplus, kSilu, kGelu };

template <class T>
GENFAST_INLINE Vec<T> logistic(Vec<T> x) {
  const Vec<T> e = exp<T>(-abs<T>(x)), big = T(1) / (e + T(1));
  return x < T(0) ? e * big : big;
}

template <class T>
GENFAST_INLINE Vec<T> softplus(Vec<T> x) {
  return (x < T(0) ? Vec<T>{} : x) + log1p_unit<T>(exp<T>(-abs<T>(x)));
}

// The normal distribution's tail beyond |x| and its density.
template <class T>
GENFAST_INLINE void normal(Vec<T> x, Vec<T>& tail, Vec<T>& density) {
  const Vec<T> e = exp<T>(x * x * T(-0.5));
  tail = e * T(0.5) * erfc_scaled<T>(abs<T>(x) * T(0.70710678118654752440));
  density = e * T(0.39894228040143267794);
}

// The activations that take longer than a call.
template <class T>
__attribute__((noinline)) Vec<T> smooth(int64_t kind, Vec<T> x) {
  switch (kind) {
    case kElu: {
      const Vec<T> low = x < Types<T>::kExpMin ? splat(Types<T>::kExpMin) : x;
      return x > T(0) ? x : exp_minus_one<T>(low > T(0) ? Vec<T>{} : low);
    }
    case kTanh: return tanh<T>(x);
    case kSigmoid: return logistic<T>(x);
    case kSoftplus: return softplus<T>(x);
    case kSilu: return x * logistic<T>(x);
    case kGelu: {
      Vec<T> tail, density;
      normal<T>(x, tail, density);
      return x * (x < T(0) ? tail : T(1) - tail);
    }
    default: return x;
  }
}

template <class T>
GENFAST_INLINE Vec<T> activated(int64_t kind, Vec<T> x) {
  switch (kind) {
    case kNone: return x;
    case kRelu: return x < T(0) ? Vec<T>{} : x;
    case kLeakyRelu: return x > T(0) ? x : x * T(0.01);
    default: return smooth<T>(kind, x);
  }
}

// The derivative, from the value where the value gives it, else (silu, gelu) from the argument.
template <class T>
GENFAST_INLINE Vec<T> slope_of_value(int64_t kind, Vec<T> y) {
  const Vec<T> one = splat(T(1));
  switch (kind) {
    case kRelu: return y > T(0) ? one : Vec<T>{};
    case kLeakyRelu: return y > T(0) ? one : splat(T(0.01));
    case kElu: return y > T(0) ? one : y + T(1);
    case kTanh: return T(1) - y * y;
    case kSigmoid: return y * (T(1) - y);
    case kSoftplus: return -exp_minus_one<T>(y > T(80) ? splat(T(-80)) : -y);
    default: return one;
  }
}

template <class T>
GENFAST_INLINE Vec<T> slope(int64_t kind, Vec<T> x) {
  if (kind == kSilu) {
    const Vec<T> p = logistic<T>(x), rest = logistic<T>(-x);
    return p + x * p * rest;
  }
  if (kind == kGelu) {
    Vec<T> tail, density;
    normal<T>(x, tail, density);
    return (x < T(0) ? tail : T(1) - tail) + x * density;
  }
  if (kind == kSoftplus) return logistic<T>(x);
  return slope_of_value<T>(kind, activated<T>(kind, x));
}

}  // namespace
}  // namespace GENFAST_ISA
}  // namespace genfast
