// Affine coupling with log-determinant (NICE 1410.8516 sec. 3.2, RealNVP 1605.08803 eq. 6-9, Glow 1807.03039 table 1).
//
//   forward  y_a = s(r) x_a + t, y_b = x_b, logdet[n] = sum log s;   inverse  x_a = (y_a - t) / s
//   backward with l = log s, d = grad_y, g = grad_logdet:  dx = s d, dt = d, dr = l'(r) (s x d + g), s x = y - t
// With the shift first (OpenAI's Glow) y_a = s (x_a + t), x_a = y_a / s - t, and dt = s d, dr = l'(r) (y d + g).
//
// x (N, C, S), params (N, 2C', S), logdet (N,). Everything from the conditioner's output to y and logdet is one pass:
// split, scale map, product, shift, concatenation and reduction. Per transformed element the forward reads x, r, t and
// writes y (16 bytes in float), the backward reads d, x, r and writes dx, dr, dt (24; 28 from the output, which needs t);
// a passed element costs 8 each way. About 20 FLOPs per element (the exponential): bound by memory bandwidth.
//
// Walks along S (NCHW), along C (channels_last, packed into tiles of positions so that few channels fill the vectors), or
// across samples (short vectors). Sums go to double every row; chunks do not depend on the thread count, so bits do not either.
#include <stdlib.h>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

enum Scale { kExp, kSigmoid, kTanh, kSoftclamp, kAdditive };
constexpr int64_t kTile = 1024;         // elements in a packed tile
constexpr int64_t kChunks = 64;         // a batch is cut into about this many pieces of work
constexpr int64_t kSerial = 1 << 14;    // elements below which one thread is faster
constexpr int64_t kFlush = 1 << 12;     // elements summed in T before they go to double
constexpr int64_t kStream = 1 << 21;   // bytes of an output from which it is written past the cache

template <class T>
struct Row {  // n elements of one call to a row kernel
  const T *x, *d, *r, *t;
  const T *alpha, *g;  // per element, or null for the one value
  T alpha_value, g_value;
  const uint8_t* mask;
  T *y, *dr, *dt, *dalpha, *logdet;  // dalpha and logdet: per element, or null
  bool stream;                       // whether y, dr and dt go past the cache; they are aligned then
  bool shift_first;
};

// tanh r and 1 - tanh^2, whose difference would have no digits left in the tail: of e = e^-2|r| and m = e - 1, both from one series.
template <class T>
GENFAST_INLINE void tanh_and_slope(Vec<T> r, Vec<T>& th, Vec<T>& slope) {
  const T limit = sizeof(T) == 4 ? T(-87) : T(-700);
  Vec<T> z = abs<T>(r) * T(-2), rounded;
  z = z < limit ? splat(limit) : z;
  const Vec<T> part = reduce<T>(z, rounded), tail = exp_tail(part) * (part * part) + part;
  const Vec<T> power = from_bits<T>(bits<T>(splat(T(1))) + (bits<T>(rounded) << Types<T>::kMantissa));
  const Vec<T> e = power * tail + power, m = power * tail + (power - T(1)), q = T(1) / (m + T(2));
  const Vec<T> positive = -m * q;
  th = r < T(0) ? -positive : positive;
  th = r == r ? th : r;
  slope = r == r ? e * q * (q * T(4)) : r;
}

// log s, s (or 1/s for the inverse), d log s / dr and tanh r.
template <class T, int kScale, bool kInverse>
GENFAST_INLINE void scale_map(Vec<T> r, Vec<T> alpha, Vec<T>& l, Vec<T>& s, Vec<T>& slope, Vec<T>& th) {
  const Vec<T> one = splat(T(1));
  slope = one;
  th = one;
  if (kScale == kSigmoid) {
    Vec<T> sig;
    sigmoid<T>(r + T(2), sig, slope, l);
    s = kInverse ? exp<T>(-l) : sig;
    return;
  }
  if (kScale == kAdditive) {
    l = Vec<T>{};
    s = one;
    return;
  }
  l = r;
  if (kScale == kTanh) {
    tanh_and_slope<T>(r, th, slope);
    l = alpha * th;
    slope = alpha * slope;
  } else if (kScale == kSoftclamp) {
    const Vec<T> q = one / (one + abs<T>(r) * T(1.0 / 6.907755278982137));  // log 1000
    l = r * q;
    slope = q * q;
  }
  s = exp<T>(kInverse ? -l : l);
}

// Stores past the cache where the row asks for it.
template <class T>
GENFAST_INLINE void put(const Row<T>& a, T* p, Vec<T> v) {
  a.stream ? stream(p, v) : store(p, v);
}

// A row's last elements in vectors of their own, whose mask leaves the lanes behind the end out.
template <class T>
class Rest {
 public:
  Rest(const Row<T>& a, int64_t start, int count) : from_(a), start_(start), count_(count), row_(a) {
    for (int i = 0; i < lanes<T>(); ++i) mask_[i] = i >= count || (a.mask && a.mask[start + i]);
    row_.mask = mask_;
    row_.stream = false;
    const T** const read[] = {&row_.x, &row_.d, &row_.r, &row_.t, &row_.alpha, &row_.g};
    T** const written[] = {&row_.y, &row_.dr, &row_.dt, &row_.dalpha, &row_.logdet};
    T(*buffer)[lanes<T>()] = buffer_;
    for (const T** p : read) *p = pad(*p ? *p + start : *p, count, *buffer++);
    for (T** p : written) {
      if (*p) *p = const_cast<T*>(pad<T>(*p + start, p == &row_.logdet ? count : 0, *buffer));
      ++buffer;
    }
  }
  const Row<T>& row() const { return row_; }
  void write_back() const {
    const size_t bytes = size_t(count_) * sizeof(T);
    const auto copy = [&](T* to, const T* from) {
      if (to) memcpy(to + start_, from, bytes);
    };
    copy(from_.y, row_.y), copy(from_.dr, row_.dr), copy(from_.dt, row_.dt);
    copy(from_.dalpha, row_.dalpha), copy(from_.logdet, row_.logdet);
  }

 private:
  const Row<T>& from_;
  int64_t start_;
  int count_;
  Row<T> row_;
  uint8_t mask_[lanes<T>()];
  T buffer_[11][lanes<T>()];
};

template <class T, int kScale, bool kInverse, bool kMasked>
GENFAST_INLINE Vec<T> forward_step(const Row<T>& a, int64_t i) {
  const Vec<T> zero{}, x = load(a.x + i), t = load(a.t + i);
  const Vec<T> r = kScale == kAdditive ? zero : load(a.r + i);
  const Vec<T> alpha = kScale == kTanh && a.alpha ? load(a.alpha + i) : splat(a.alpha_value);
  Vec<T> l, s, slope, th;
  scale_map<T, kScale, kInverse>(r, alpha, l, s, slope, th);
  const Vec<T> before = a.shift_first ? t : zero, behind = a.shift_first ? zero : t;  // the scale; one of them is zero
  Vec<T> y = kInverse ? (x - behind) * s - before : s * (x + before) + behind;
  if (kMasked) {
    const Mask<T> live = ~load_mask<T>(a.mask + i);
    y = live ? y : x;
    l = live ? l : zero;
  }
  put(a, a.y + i, y);
  l = kInverse ? -l : l;
  if (a.logdet) store(a.logdet + i, load(a.logdet + i) + l);
  return l;
}

// Returns the sum of the log-determinant over the row.
template <class T, int kScale, bool kInverse, bool kMasked>
__attribute__((noinline)) double forward_row(const Row<T>& a, int64_t n) {
  constexpr int w = lanes<T>();
  double total = 0;
  int64_t i = 0;
  while (i + w <= n) {
    const int64_t end = n - i > kFlush ? i + kFlush : n;
    Vec<T> acc{};
    for (; i + w <= end; i += w) acc += forward_step<T, kScale, kInverse, kMasked>(a, i);
    total += sum<T>(acc);
  }
  if (i < n) {
    const Rest<T> rest(a, i, int(n - i));
    total += forward_row<T, kScale, kInverse, true>(rest.row(), w);
    rest.write_back();
  }
  return total;
}

template <class T, int kScale, bool kInverse, bool kOutput, bool kMasked>
GENFAST_INLINE Vec<T> backward_step(const Row<T>& a, int64_t i) {
  const Vec<T> zero{}, d = load(a.d + i);
  const Vec<T> r = kScale == kAdditive ? zero : load(a.r + i);
  const Vec<T> alpha = kScale == kTanh && a.alpha ? load(a.alpha + i) : splat(a.alpha_value);
  Vec<T> l, s, slope, th;
  scale_map<T, kScale, kInverse>(r, alpha, l, s, slope, th);
  Vec<T> dx = s * d, dl = zero;
  const Vec<T> shifted = a.shift_first != kInverse ? dx : d;
  Vec<T> dt = kInverse ? -shifted : shifted;
  if (kScale != kAdditive) {
    constexpr bool kShift = kInverse != kOutput;  // the kept tensor stands on t's side of the affine map
    const Vec<T> x = load(a.x + i), g = a.g ? load(a.g + i) : splat(a.g_value);
    Vec<T> centred = x;  // in x's units where it is the input, in y's where it is the output, and without the shift
    if (a.shift_first != kShift) {
      const Vec<T> t = load(a.t + i);
      centred = a.shift_first ? x + t : x - t;
    }
    if (kInverse)
      dl = -((kOutput ? centred : centred * s) * d + g);
    else
      dl = (kOutput ? centred : centred * s) * d + g;
  }
  Vec<T> dr = dl * slope;
  if (kMasked) {
    const Mask<T> live = ~load_mask<T>(a.mask + i);
    dx = live ? dx : d;
    dt = live ? dt : zero;
    dr = live ? dr : zero;
    dl = live ? dl : zero;
    th = live ? th : zero;
  }
  put(a, a.y + i, dx);
  put(a, a.dt + i, dt);
  if (kScale != kAdditive) put(a, a.dr + i, dr);
  const Vec<T> da = dl * th;
  if (kScale == kTanh && a.dalpha) store(a.dalpha + i, da);
  return da;
}

// Returns the sum of grad alpha over the row (tanh only).
template <class T, int kScale, bool kInverse, bool kOutput, bool kMasked>
__attribute__((noinline)) double backward_row(const Row<T>& a, int64_t n) {
  constexpr int w = lanes<T>();
  double total = 0;
  int64_t i = 0;
  while (i + w <= n) {
    const int64_t end = n - i > kFlush ? i + kFlush : n;
    Vec<T> acc{};
    for (; i + w <= end; i += w) {
      const Vec<T> da = backward_step<T, kScale, kInverse, kOutput, kMasked>(a, i);
      if (kScale == kTanh) acc += da;
    }
    if (kScale == kTanh) total += sum<T>(acc);
  }
  if (i < n) {
    const Rest<T> rest(a, i, int(n - i));
    total += backward_row<T, kScale, kInverse, kOutput, true>(rest.row(), w);
    rest.write_back();
  }
  return total;
}

template <class T>
using RowKernel = double (*)(const Row<T>&, int64_t);

template <class T, int kScale>
RowKernel<T> pick_scale(const AffineCouplingArgs& a, bool backward) {
  const bool m = a.mask != nullptr;
  if (!backward) {
    if (a.inverse) return m ? forward_row<T, kScale, true, true> : forward_row<T, kScale, true, false>;
    return m ? forward_row<T, kScale, false, true> : forward_row<T, kScale, false, false>;
  }
  if (a.inverse) {
    if (a.keep_output) return m ? backward_row<T, kScale, true, true, true> : backward_row<T, kScale, true, true, false>;
    return m ? backward_row<T, kScale, true, false, true> : backward_row<T, kScale, true, false, false>;
  }
  if (a.keep_output) return m ? backward_row<T, kScale, false, true, true> : backward_row<T, kScale, false, true, false>;
  return m ? backward_row<T, kScale, false, false, true> : backward_row<T, kScale, false, false, false>;
}

template <class T>
RowKernel<T> pick(const AffineCouplingArgs& a, bool backward) {
  switch (a.scale) {
    case kExp: return pick_scale<T, kExp>(a, backward);
    case kSigmoid: return pick_scale<T, kSigmoid>(a, backward);
    case kTanh: return pick_scale<T, kTanh>(a, backward);
    case kSoftclamp: return pick_scale<T, kSoftclamp>(a, backward);
    default: return pick_scale<T, kAdditive>(a, backward);
  }
}

template <class T>
struct Problem {
  const AffineCouplingArgs& a;
  RowKernel<T> kernel;
  bool backward;
  int64_t first_moved, width_out;  // first transformed channel, channels of params
  bool stream;                     // outputs too large to be found in a cache later
  const T* at(const View& v, int64_t n, int64_t c, int64_t s) const {
    return static_cast<const T*>(v.data) + n * v.n + c * v.c + s * v.s;
  }
  const View& source() const { return backward ? a.grad_y : a.x; }  // what passes through unchanged
  T* y() const { return static_cast<T*>(a.y); }
  T* grads() const { return static_cast<T*>(a.params_out); }
  Row<T> row(int64_t n) const {
    Row<T> row{};
    row.alpha_value = T(1);
    row.g_value = backward ? static_cast<const T*>(a.grad_logdet)[n] : T(0);
    row.shift_first = a.shift_first;
    return row;
  }
};

// A run that passes through unchanged.
template <class T>
void pass(const T* from, T* to, int64_t n, bool past_cache) {
  int64_t i = 0;
  if (past_cache)
    for (; i + lanes<T>() <= n; i += lanes<T>()) stream(to + i, load(from + i));
  memcpy(to + i, from + i, size_t(n - i) * sizeof(T));
}

// Channels [from, to) of sample n, each a row of S positions.
template <class T>
double run_channels(const Problem<T>& p, int64_t n, int64_t from, int64_t to) {
  const AffineCouplingArgs& a = p.a;
  double total = 0;
  for (int64_t c = from; c < to; ++c) {
    const int64_t j = c - p.first_moved;
    T* y = p.y() + (n * a.c + c) * a.s;
    if (j < 0 || j >= a.width) {
      pass(p.at(p.source(), n, c, 0), y, a.s, p.stream && aligned(y));
      continue;
    }
    const int64_t rc = a.r_offset + j * a.step, tc = a.t_offset + j * a.step;
    Row<T> row = p.row(n);
    row.x = p.at(a.x, n, c, 0);
    row.y = y;
    row.r = a.scale == kAdditive ? nullptr : p.at(a.params, n, rc, 0);
    row.t = p.at(a.params, n, a.scale == kAdditive ? j : tc, 0);
    if (a.mask) row.mask = a.mask + c * a.s;
    if (a.alpha) row.alpha_value = static_cast<const T*>(a.alpha)[j];
    if (p.backward) {
      row.d = p.at(a.grad_y, n, c, 0);
      row.dr = p.grads() + (n * p.width_out + rc) * a.s;
      row.dt = p.grads() + (n * p.width_out + (a.scale == kAdditive ? j : tc)) * a.s;
    }
    row.stream = p.stream && aligned(row.y) && (!p.backward || (aligned(row.dt) && aligned(row.dr)));
    const double value = p.kernel(row, a.s);
    if (p.backward && a.grad_alpha) static_cast<T*>(a.grad_alpha)[n * a.width + j] = T(value);
    total += value;
  }
  return total;
}

// Moves `width` elements a vector at a time, and so up to a vector more: only where what lies behind may be touched.
template <class T>
GENFAST_INLINE void move(const T* from, T* to, int64_t width) {
  for (int64_t c = 0; c < width; c += lanes<T>()) store(to + c, load(from + c));
}

// `count` rows of `width` elements, `step` apart and `stride` between rows, as one flat run. The first `fast` rows may be
// read a vector past their end; the buffer has a vector to spare.
template <class T>
const T* pack(const T* from, int64_t count, int64_t fast, int64_t width, int64_t step, int64_t stride, T* buffer) {
  if (step == 1 && (stride == width || count == 1)) return from;
  T* to = buffer;
  int64_t p = 0;
  if (step == 1)
    for (; p < fast; ++p, from += stride, to += width) move(from, to, width);
  for (; p < count; ++p, from += stride)
    for (int64_t c = 0; c < width; ++c) *to++ = from[c * step];
  return buffer;
}

const uint8_t* pack_bytes(const uint8_t* from, int64_t count, int64_t width, int64_t stride, uint8_t* buffer) {
  if (stride == width || count == 1) return from;
  for (int64_t p = 0; p < count; ++p) memcpy(buffer + p * width, from + p * stride, size_t(width));
  return buffer;
}

template <class T>
struct Segment {  // a run of channels on its way into an output row
  const T* from;
  int64_t stride, width;
};

// Rows of `pitch` elements made of two runs that stand one behind the other. Written front to back, so that what a fast
// row writes past its end is overwritten by the next.
template <class T>
void write_rows(Segment<T> a, Segment<T> b, int64_t count, int64_t fast, int64_t pitch, T* to) {
  int64_t p = 0;
  for (; p < fast; ++p, to += pitch) {
    move(a.from + p * a.stride, to, a.width);
    move(b.from + p * b.stride, to + a.width, b.width);
  }
  for (; p < count; ++p, to += pitch) {
    for (int64_t c = 0; c < a.width; ++c) to[c] = a.from[p * a.stride + c];
    for (int64_t c = 0; c < b.width; ++c) to[a.width + c] = b.from[p * b.stride + c];
  }
}

template <class T>
void unpack(const T* from, int64_t count, int64_t width, int64_t step, int64_t stride, T* to) {
  for (int64_t p = 0; p < count; ++p, to += stride)
    for (int64_t c = 0; c < width; ++c) to[c * step] = *from++;
}

// Channels [c0, c0 + width) of the transformed ones at the positions [from, to) of sample n, in tiles.
template <class T>
double run_tiles(const Problem<T>& p, int64_t n, int64_t from, int64_t to, int64_t c0, int64_t width) {
  const AffineCouplingArgs& a = p.a;
  constexpr int64_t kBuffer = kTile + lanes<T>();
  T xb[kBuffer], db[kBuffer], rb[kBuffer], tb[kBuffer], ab[kBuffer], yb[kBuffer], drb[kBuffer], dtb[kBuffer], dab[kBuffer];
  uint8_t mask_buffer[kTile];
  const bool additive = a.scale == kAdditive, alpha_grad = p.backward && a.grad_alpha;
  const int64_t rows = kTile / width;
  const int64_t step = additive ? 1 : a.step, tc = additive ? c0 : a.t_offset + c0 * step;
  const int64_t rc = a.r_offset + c0 * step, channel = p.first_moved + c0;
  const bool whole = width == a.width;          // one pass over the channels writes whole rows
  const int64_t passed = whole ? a.c - width : 0;  // the channels before or behind the transformed ones
  // Rows near the end of the sample are moved element by element, since a vector would reach past the tensor.
  const int64_t shortest = width < a.c ? width : a.c;
  const int64_t safe = whole ? to - lanes<T>() / shortest - 2 : from;
  double total = 0;
  if (a.alpha)
    for (int64_t q = 0; q < rows; ++q)
      memcpy(ab + q * width, static_cast<const T*>(a.alpha) + c0, size_t(width) * sizeof(T));
  for (int64_t s = from; s < to; s += rows) {
    const int64_t count = to - s < rows ? to - s : rows;
    const int64_t fast = safe <= s ? 0 : safe - s < count ? safe - s : count;
    Row<T> row = p.row(n);
    row.x = pack(p.at(a.x, n, channel, s), count, fast, width, 1, a.x.s, xb);
    row.t = pack(p.at(a.params, n, tc, s), count, fast, width, step, a.params.s, tb);
    row.r = additive ? nullptr : pack(p.at(a.params, n, rc, s), count, fast, width, step, a.params.s, rb);
    row.alpha = a.alpha ? ab : nullptr;
    if (a.mask) row.mask = pack_bytes(a.mask + s * a.c + channel, count, width, a.c, mask_buffer);
    T* y = p.y() + (n * a.s + s) * a.c;
    const bool direct = width == a.c;
    row.y = direct ? y : yb;
    T* grads = p.grads() + (n * a.s + s) * p.width_out;
    const bool direct_grads = additive && width == a.width;
    if (p.backward) {
      row.d = pack(p.at(a.grad_y, n, channel, s), count, fast, width, 1, a.grad_y.s, db);
      row.dr = drb;
      row.dt = direct_grads ? grads : dtb;
      row.dalpha = alpha_grad ? dab : nullptr;
    }
    total += p.kernel(row, count * width);
    if (passed) {
      const Segment<T> moved{yb, width, width};
      const Segment<T> kept{p.at(p.source(), n, p.first_moved ? 0 : width, s), p.source().s, passed};
      p.first_moved ? write_rows(kept, moved, count, fast, a.c, y) : write_rows(moved, kept, count, fast, a.c, y);
    } else if (!direct) {
      unpack(yb, count, width, 1, a.c, y + channel);
    }
    if (p.backward && !direct_grads) {
      if (whole && step == 1 && !additive) {
        const Segment<T> r{drb, width, width}, t{dtb, width, width};
        rc < tc ? write_rows(r, t, count, fast, p.width_out, grads) : write_rows(t, r, count, fast, p.width_out, grads);
      } else {
        unpack(dtb, count, width, step, p.width_out, grads + tc);
        if (!additive) unpack(drb, count, width, step, p.width_out, grads + rc);
      }
    }
    if (alpha_grad) {
      T* out = static_cast<T*>(a.grad_alpha) + n * a.width + c0;
      for (int64_t q = 0; q < count; ++q)
        for (int64_t c = 0; c < width; ++c) out[c] += dab[q * width + c];
    }
  }
  return total;
}

// Positions [from, to) of sample n in channels_last order.
template <class T>
double run_positions(const Problem<T>& p, int64_t n, int64_t from, int64_t to) {
  const AffineCouplingArgs& a = p.a;
  double total = 0;
  if (p.backward && a.grad_alpha)
    for (int64_t c = 0; c < a.width; ++c) static_cast<T*>(a.grad_alpha)[n * a.width + c] = 0;
  for (int64_t c0 = 0; c0 < a.width; c0 += kTile)
    total += run_tiles(p, n, from, to, c0, a.width - c0 < kTile ? a.width - c0 : kTile);
  const int64_t passed = a.c - a.width;
  if (passed && a.width > kTile) {  // else run_tiles has written them
    const int64_t start = p.first_moved ? 0 : a.width;
    for (int64_t s = from; s < to; ++s)
      memcpy(p.y() + (n * a.s + s) * a.c + start, p.at(p.source(), n, start, s), size_t(passed) * sizeof(T));
  }
  return total;
}

// Samples [from, to) of short vectors: transposed, so that the vectors run across samples.
template <class T>
void run_samples(const Problem<T>& p, int64_t from, int64_t to) {
  const AffineCouplingArgs& a = p.a;
  constexpr int64_t kSamples = 128;
  T xb[kSamples], db[kSamples], rb[kSamples], tb[kSamples], yb[kSamples], drb[kSamples], dtb[kSamples], dab[kSamples];
  T logdet[kSamples];
  uint8_t mask[kSamples];
  const bool additive = a.scale == kAdditive;
  for (int64_t n = from; n < to; n += kSamples) {
    const int64_t count = to - n < kSamples ? to - n : kSamples;
    for (int64_t i = 0; i < count; ++i) logdet[i] = 0;
    for (int64_t c = 0; c < a.c; ++c) {
      const int64_t j = c - p.first_moved;
      T* y = p.y() + n * a.c + c;
      if (j < 0 || j >= a.width) {
        const View& source = p.source();
        const T* in = p.at(source, n, c, 0);
        for (int64_t i = 0; i < count; ++i) y[i * a.c] = in[i * source.n];
        continue;
      }
      const int64_t rc = a.r_offset + j * a.step, tc = additive ? j : a.t_offset + j * a.step;
      Row<T> row = p.row(n);
      row.x = pack(p.at(a.x, n, c, 0), count, 0, 1, 1, a.x.n, xb);
      row.t = pack(p.at(a.params, n, tc, 0), count, 0, 1, 1, a.params.n, tb);
      row.r = additive ? nullptr : pack(p.at(a.params, n, rc, 0), count, 0, 1, 1, a.params.n, rb);
      if (a.alpha) row.alpha_value = static_cast<const T*>(a.alpha)[j];
      if (a.mask) {
        memset(mask, a.mask[c], size_t(count));
        row.mask = mask;
      }
      row.y = yb;
      if (p.backward) {
        row.d = pack(p.at(a.grad_y, n, c, 0), count, 0, 1, 1, a.grad_y.n, db);
        row.dr = drb;
        row.dt = dtb;
        row.dalpha = a.grad_alpha ? dab : nullptr;
        row.g = static_cast<const T*>(a.grad_logdet) + n;
      } else {
        row.logdet = logdet;
      }
      p.kernel(row, count);
      unpack(yb, count, 1, 1, a.c, y);
      if (p.backward) unpack(dtb, count, 1, 1, p.width_out, p.grads() + n * p.width_out + tc);
      if (p.backward && !additive) unpack(drb, count, 1, 1, p.width_out, p.grads() + n * p.width_out + rc);
      if (p.backward && a.grad_alpha) unpack(dab, count, 1, 1, a.width, static_cast<T*>(a.grad_alpha) + n * a.width + j);
    }
    if (!p.backward)
      for (int64_t i = 0; i < count; ++i) static_cast<T*>(a.logdet)[n + i] = logdet[i];
  }
}

template <class T>
void run(const AffineCouplingArgs& a, bool backward) {
  if (!a.n || !a.s) {  // nothing to move; the sums are empty
    if (a.logdet) memset(a.logdet, 0, size_t(a.n) * sizeof(T));
    if (a.grad_alpha) memset(a.grad_alpha, 0, size_t(a.n * a.width) * sizeof(T));
    return;
  }
  const int64_t params = a.scale == kAdditive ? a.width : 2 * a.width;
  const Problem<T> p{a, pick<T>(a, backward), backward, a.last ? a.c - a.width : 0, params,
                     a.n * a.c * a.s * int64_t(sizeof(T)) > kStream};
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
  if (a.channels_last && a.s == 1 && a.width < lanes<T>()) {
    constexpr int64_t kBlock = 1024;
    const int64_t blocks = (a.n + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) run_samples(p, b * kBlock, (b + 1) * kBlock < a.n ? (b + 1) * kBlock : a.n);
    return;
  }
  // A sample is cut into chunks when there are few of them; grad alpha is summed per sample and is not.
  const int64_t units = a.channels_last ? a.s : a.c;
  int64_t chunks = a.grad_alpha && a.channels_last ? 1 : (kChunks + a.n - 1) / a.n;
  chunks = chunks < units ? chunks : units;
  const int64_t items = a.n * chunks;
  const Workspace<double> parts(backward ? 0 : items);
  double* partial = backward ? nullptr : parts.get();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t n = item / chunks, k = item % chunks;
    const int64_t from = units * k / chunks, to = units * (k + 1) / chunks;
    const double value = a.channels_last ? run_positions(p, n, from, to) : run_channels(p, n, from, to);
    if (partial) partial[item] = value;
  }
  if (!partial) return;
  for (int64_t n = 0; n < a.n; ++n) {
    double total = 0;
    for (int64_t k = 0; k < chunks; ++k) total += partial[n * chunks + k];
    static_cast<T*>(a.logdet)[n] = T(total);
  }
}

}  // namespace

GENFAST_KERNEL(affine_coupling, AffineCouplingArgs, run<T>(a, false))
GENFAST_KERNEL(affine_coupling_backward, AffineCouplingArgs, run<T>(a, true))

}  // namespace GENFAST_ISA
}  // namespace genfast
