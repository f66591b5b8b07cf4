// A normalising flow as one call: log |det dz/dx| and z of x, and the gradients to x, context and every weight.
// Source: the flows of genfast/models (MAF arXiv:1705.07057, NSF 1906.04032, NICE 1410.8516, RealNVP 1605.08803); the program's
// format stands at the head of genfast/programs/flow_program.py.
//
// Fused: all layers of all conditioners, their activations, the transforms and the base density, for a tile of samples at a
// time. Values lie [unit][sample of the tile], so that every step works on whole vectors of samples; a product takes its weights
// by broadcast, up to 12 units by two vectors at once, and only those inputs that the mask leaves to one of these units.
// Bytes: x, z and the weights once each (packed once a call); with a gradient each value is written once and read once, 4 bytes
// a unit and sample. FLOPs: 2 a live weight and sample forward, 4 backward. Bound by multiply-adds: a tile of 32 samples and
// 600 units takes 77 kB, which the second-level cache holds.
//
// Backward: one sweep in reverse order. A step finds the complete cotangents of what it made and adds to those of what it read.
// Each thread sums the weights' gradients of its tiles; the threads' sums are added in their order.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "dtype_switch.h"
#include "gemm.h"
#include "spline.h"
#include "transpose.h"
#include "unit_activation.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int kBlockRows = GENFAST_VECTOR_BYTES == 64 ? 12 : 6;  // with two vectors of samples these fill the registers
constexpr int kWide = 2;                                         // vectors of samples in a block

enum Operation { kProduct, kPoint, kAffine, kSplineMap, kScale, kConstant, kBase };
enum ScaleKind { kExp, kSoftclamp, kSigmoidShifted, kSoftplusScale, kAdditive, kGiven };
enum Mode { kScaleThenShift, kInverseOfThat, kShiftThenScale, kInverseOfShiftFirst };
enum BaseKind { kNormal, kLogistic };

struct Step {
  int64_t operation, first, units, kind;
  int64_t f[10];
};
static_assert(sizeof(Step) == 14 * sizeof(int64_t), "the program is read in place");

struct Program {
  const int64_t* code;
  int64_t inputs, contexts, rows, weights, count;
  const int64_t* outputs;
  const Step* steps;

  explicit Program(const int64_t* c) : code(c) {
    inputs = c[0], contexts = c[1], rows = c[2], weights = c[3], count = c[4];
    outputs = c + c[5];
    steps = reinterpret_cast<const Step*>(c + 8);
  }
  const int64_t* table(int64_t offset) const { return offset < 0 ? nullptr : code + offset; }
};

// The fields of a product: v[first + r] = act(sum over j < live[r] of w(r, j) v[sources[j]] + bias + v[added[r]]), where
// w(r, j) = weights[weight + out[r] stride + columns[j]].
struct Product {
  int64_t first, units, activation, weight, stride, bias, inputs;
  const int64_t *sources, *columns, *out, *live, *added;

  Product(const Program& p, const Step& s)
      : first(s.first), units(s.units), activation(s.kind), weight(s.f[0]), stride(s.f[1]), bias(s.f[2]), inputs(s.f[3]),
        sources(p.table(s.f[4])), columns(p.table(s.f[5])), out(p.table(s.f[6])), live(p.table(s.f[7])), added(p.table(s.f[8])) {}
  int64_t live_of(int64_t r) const { return live ? live[r] : inputs; }
  int64_t blocks() const { return (units + kBlockRows - 1) / kBlockRows; }
};

// Where block b of `count` rows in `blocks` blocks of nearly equal size begins.
inline int64_t block_start(int64_t b, int64_t blocks, int64_t count) { return b * count / blocks; }

// ---- packing: for each block of rows [input][row], zero where the mask is ----

template <class T>
int64_t packed_size(const Program& p, const Step& s) {
  const Product m(p, s);
  return m.units * m.inputs;
}

template <class T>
void pack_forward(const Product& m, const T* weights, T* panel) {
  const int64_t blocks = m.blocks();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r0 = block_start(b, blocks, m.units), r1 = block_start(b + 1, blocks, m.units), rows = r1 - r0;
    const int64_t most = m.live_of(r1 - 1);
    const T* w[kBlockRows];
    for (int64_t r = 0; r < rows; ++r) w[r] = weights + m.weight + m.out[r0 + r] * m.stride;
    const int64_t all = m.live_of(r0);  // the least
    T* to = panel;
    for (int64_t j = 0; j < all; ++j) {
      const int64_t column = m.columns[j];
      for (int64_t r = 0; r < rows; ++r) *to++ = w[r][column];
    }
    for (int64_t j = all; j < most; ++j)
      for (int64_t r = 0; r < rows; ++r) *to++ = j < m.live_of(r0 + r) ? w[r][m.columns[j]] : T(0);
    panel += rows * m.inputs;
  }
}

// The first unit that input j reaches.
inline int64_t first_reached(const Product& m, int64_t j) {
  if (!m.live) return 0;
  return std::upper_bound(m.live, m.live + m.units, j) - m.live;
}

template <class T>
void pack_backward(const Product& m, const T* weights, T* panel) {
  const int64_t blocks = (m.inputs + kBlockRows - 1) / kBlockRows;
  // Some blocks at a time, so that each row of weights is read once for all of them.
  constexpr int64_t kTogether = 64;
  for (int64_t b0 = 0; b0 < blocks; b0 += kTogether) {
    const int64_t b1 = std::min(blocks, b0 + kTogether);
    T* to[kTogether];
    int64_t start[kTogether], first[kTogether + 1];
    bool run[kTogether];
    for (int64_t b = b0; b <= b1; ++b) first[b - b0] = block_start(b, blocks, m.inputs);
    for (int64_t b = 0; b < b1 - b0; ++b) {
      start[b] = first_reached(m, first[b]), to[b] = panel, run[b] = true;
      for (int64_t j = first[b] + 1; j < first[b + 1]; ++j) run[b] = run[b] && m.columns[j] == m.columns[j - 1] + 1;
      panel += (first[b + 1] - first[b]) * m.units;
    }
    for (int64_t r = start[0]; r < m.units; ++r) {
      const T* w = weights + m.weight + m.out[r] * m.stride;
      const int64_t live = m.live_of(r);
      for (int64_t b = 0; b < b1 - b0 && start[b] <= r; ++b) {
        const int64_t rows = first[b + 1] - first[b], j0 = first[b];
        T* row = to[b];
        to[b] += rows;
        if (run[b] && j0 + rows <= live) {
          const T* from = w + m.columns[j0];
          for (int64_t k = 0; k < rows; ++k) row[k] = from[k];
          continue;
        }
        for (int64_t k = 0; k < rows; ++k) row[k] = j0 + k < live ? w[m.columns[j0 + k]] : T(0);
      }
    }
  }
}

// ---- products ----

// out[r][.] (+)= sum over k < count of panel[k][r] in(k)[.], in(k) = values + sources[k] * tile, or k * tile without sources.
template <class T, int R>
void block_product(const T* panel, int64_t count, const T* in, const int64_t* sources, T* const* out, const T* const* added,
                   const T* bias, bool accumulate, bool relu, int64_t tile) {
  constexpr int n = lanes<T>();
  for (int64_t s = 0; s < tile; s += kWide * n) {
    Vec<T> acc[R][kWide];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) acc[r][v] = accumulate ? load(out[r] + s + v * n) : splat(bias[r]);
    const T* w = panel;
    for (int64_t k = 0; k < count; ++k, w += R) {
      const T* h = in + (sources ? sources[k] : k) * tile + s;
      Vec<T> x[kWide];
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) x[v] = load(h + v * n);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec<T> c = splat(w[r]);
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) acc[r][v] += c * x[v];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        Vec<T> y = acc[r][v];
        if (added) y += load(added[r] + s + v * n);
        if (relu) y = y < T(0) ? Vec<T>{} : y;
        store(out[r] + s + v * n, y);
      }
  }
}

template <class T>
using BlockProduct = void (*)(const T*, int64_t, const T*, const int64_t*, T* const*, const T* const*, const T*, bool, bool,
                              int64_t);

template <class T, int... R>
BlockProduct<T> block_product_of(int64_t rows, std::integer_sequence<int, R...>) {
  static constexpr BlockProduct<T> all[] = {block_product<T, R + 1>...};
  return all[rows - 1];
}

template <class T>
BlockProduct<T> block_product_of(int64_t rows) {
  return block_product_of<T>(rows, std::make_integer_sequence<int, kBlockRows>());
}

template <class T>
void product_forward(const Product& m, const T* weights, const T* panel, T* values, int64_t tile) {
  const int64_t blocks = m.blocks();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r0 = block_start(b, blocks, m.units), r1 = block_start(b + 1, blocks, m.units), rows = r1 - r0;
    T* out[kBlockRows];
    const T* added[kBlockRows];
    T bias[kBlockRows] = {};
    for (int64_t r = 0; r < rows; ++r) {
      out[r] = values + (m.first + r0 + r) * tile;
      if (m.added) added[r] = values + m.added[r0 + r] * tile;
      if (m.bias >= 0) bias[r] = weights[m.bias + m.out[r0 + r]];
    }
    block_product_of<T>(rows)(panel, m.live_of(r1 - 1), values, m.sources, out, m.added ? added : nullptr, bias, false,
                              m.activation == kRelu, tile);
    if (m.activation != kNone && m.activation != kRelu) {
      T* h = out[0];
      for (int64_t i = 0; i < rows * tile; i += lanes<T>()) store(h + i, activated<T>(m.activation, load(h + i)));
    }
    panel += rows * m.inputs;
  }
}

// acc[r][j] += sum over the tile of d[r][.] h[.][j], MR rows by NV vectors.
template <class T, int MR, int NV>
GENFAST_INLINE void outer_tile(const T* d, int64_t tile, const T* h, int64_t ld, T* acc, int64_t ld_acc, bool fresh) {
  const Segment all{0, 0, tile};
  Vec<T> sum[MR][NV];
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[r][v] = fresh ? Vec<T>{} : load(acc + r * ld_acc + v * lanes<T>());
  multiply<T, MR, NV>(d, tile, 1, &all, 1, h, ld, sum);
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(acc + r * ld_acc + v * lanes<T>(), sum[r][v]);
}

template <class T, int MR>
void outer_rows(const T* d, int64_t tile, const T* h, int64_t ld, int64_t columns, T* acc, int64_t ld_acc, bool fresh) {
  constexpr int n = lanes<T>();
  int64_t j = 0;
  for (; j + kMaxVectors * n <= columns; j += kMaxVectors * n)
    outer_tile<T, MR, kMaxVectors>(d, tile, h + j, ld, acc + j, ld_acc, fresh);
  if (kMaxVectors > 2 && j + 2 * n <= columns) outer_tile<T, MR, 2>(d, tile, h + j, ld, acc + j, ld_acc, fresh), j += 2 * n;
  if (j < columns) outer_tile<T, MR, 1>(d, tile, h + j, ld, acc + j, ld_acc, fresh);
}

// The weights' gradients of one thread: for each product [unit][input] and the units' bias as whole vectors; for each scale
// its factors' and shifts', and for a constant its own, as whole vectors too.
template <class T>
int64_t sums_size(const Program& p, const Step& s) {
  if (s.operation == kProduct) return s.units * (padded<T>(s.f[3]) + lanes<T>());
  if (s.operation == kScale) return 2 * s.units * lanes<T>();
  return s.operation == kConstant ? lanes<T>() : 0;
}

template <class T, int... MR>
void outer_block(int64_t rows, const T* d, int64_t tile, const T* h, int64_t ld, int64_t columns, T* acc, bool fresh,
                 std::integer_sequence<int, MR...>) {
  static constexpr decltype(&outer_rows<T, 1>) all[] = {outer_rows<T, MR + 1>...};
  all[rows - 1](d, tile, h, ld, columns, acc, ld, fresh);
}

template <class T>
void product_weights(const Product& m, const T* values, const T* deltas, T* transposed, T* sums, bool fresh,
                     int64_t tile) {
  constexpr int n = lanes<T>();
  const int64_t ld = padded<T>(m.inputs);
  alignas(64) T square[n * n];
  for (int64_t j = 0; j < m.inputs; j += n) {
    bool run = j + n <= m.inputs;
    for (int i = 1; run && i < n; ++i) run = m.sources[j + i] == m.sources[j] + i;
    for (int64_t s = 0; s < tile; s += n) {
      if (run) {
        transpose_square(values + m.sources[j] * tile + s, tile, transposed + s * ld + j, ld);
        continue;
      }
      for (int64_t i = 0; i < n; ++i)
        store(square + i * n, j + i < m.inputs ? load(values + m.sources[j + i] * tile + s) : Vec<T>{});
      transpose_square(static_cast<const T*>(square), n, transposed + s * ld + j, ld);
    }
  }
  const T* d = deltas + m.first * tile;
  const int64_t blocks = (m.units + kMaxRows - 1) / kMaxRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t r0 = block_start(b, blocks, m.units), r1 = block_start(b + 1, blocks, m.units);
    outer_block<T>(r1 - r0, d + r0 * tile, tile, transposed, ld, padded<T>(m.live_of(r1 - 1)), sums + r0 * ld, fresh,
                   std::make_integer_sequence<int, kMaxRows>());
  }
  if (m.bias < 0) return;
  T* bias = sums + m.units * ld;
  for (int64_t r = 0; r < m.units; ++r) {
    Vec<T> sum = fresh ? Vec<T>{} : load(bias + r * n);
    for (int64_t s = 0; s < tile; s += n) sum += load(d + r * tile + s);
    store(bias + r * n, sum);
  }
}

// `skipped`: rows below it are inputs whose gradients nobody asked for.
template <class T>
void product_inputs(const Product& m, const T* panel, T* deltas, int64_t skipped, int64_t tile) {
  const int64_t blocks = (m.inputs + kBlockRows - 1) / kBlockRows;
  const T no_bias[kBlockRows] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t j0 = block_start(b, blocks, m.inputs), j1 = block_start(b + 1, blocks, m.inputs), rows = j1 - j0;
    const int64_t start = first_reached(m, j0);
    T* out[kBlockRows];
    bool wanted = start < m.units;
    if (wanted) {
      wanted = false;
      for (int64_t j = j0; j < j1; ++j) {
        out[j - j0] = deltas + m.sources[j] * tile;
        wanted = wanted || m.sources[j] >= skipped;
      }
    }
    if (wanted)
      block_product_of<T>(rows)(panel, m.units - start, deltas + (m.first + start) * tile, nullptr, out, nullptr, no_bias, true,
                                false, tile);
    panel += rows * m.units;
  }
}

// ---- transforms ----

template <class T>
struct LogScale {
  Vec<T> s, log_s, slope;  // slope: the derivative of log s by a
};

template <class T>
LogScale<T> log_scale_of(int64_t kind, T constant, Vec<T> a) {
  if (kind == kExp) return {exp<T>(a), a, splat(T(1))};
  if (kind == kSoftclamp) {
    const Vec<T> r = T(1) / (abs<T>(a / constant) + T(1)), log_s = a * r;
    return {exp<T>(log_s), log_s, r * r};
  }
  if (kind == kGiven) {  // s itself, of either sign
    const Vec<T> size = abs<T>(a);
    return {a, size > T(0) ? log<T>(size) : size == size ? splat(T(-__builtin_inf())) : size, T(1) / a};
  }
  const bool shifted = kind == kSigmoidShifted;
  const Vec<T> p = logistic<T>(shifted ? a + T(2) : a), s = (shifted ? p : softplus<T>(a)) + constant;
  Vec<T> log_s = s > T(0) ? log<T>(s) : splat(T(-__builtin_inf()));
  log_s = s == s ? log_s : s;
  return {s, log_s, (shifted ? p * logistic<T>(-(a + T(2))) : p) / s};
}

template <class T>
GENFAST_INLINE Vec<T> affine_forward(int64_t mode, const LogScale<T>& l, Vec<T> x, Vec<T> t, Vec<T>& total) {
  const bool grows = mode == kScaleThenShift || mode == kShiftThenScale;
  total += grows ? l.log_s : -l.log_s;
  if (mode == kScaleThenShift) return l.s * x + t;
  if (mode == kInverseOfThat) return (x - t) / l.s;
  if (mode == kShiftThenScale) return l.s * (x + t);
  return x / l.s - t;
}

// From dz and g, the cotangents of z and of the total, those of x, t and a.
template <class T>
GENFAST_INLINE void affine_backward(int64_t mode, const LogScale<T>& l, Vec<T> x, Vec<T> t, Vec<T> dz, Vec<T> g, Vec<T>& dx,
                                    Vec<T>& dt, Vec<T>& da) {
  if (mode == kScaleThenShift) {
    dx = dz * l.s, dt = dz, da = (dx * x + g) * l.slope;
  } else if (mode == kShiftThenScale) {
    dx = dz * l.s, dt = dx, da = (dx * (x + t) + g) * l.slope;
  } else if (mode == kInverseOfThat) {
    dx = dz / l.s, dt = -dx, da = -(dx * (x - t) + g) * l.slope;
  } else {
    dx = dz / l.s, dt = -dz, da = -(dx * x + g) * l.slope;
  }
}

template <class T>
SplineOptions<T> spline_options(const Step& s, const double* o) {
  return {int(s.f[2]), int(s.kind), s.f[3] != 0, T(o[0]), T(o[1]), T(o[2]), T(o[3]), T(o[4]), T(o[5]), T(o[6]),
          T(std::log(o[7])), T(o[8])};
}

template <class T, int N>
__attribute__((noinline)) void spline_step(const Program& p, const Step& s, const SplineOptions<T>& o, T* values, T* deltas,
                                           int64_t tile) {
  constexpr int n = lanes<T>();
  const int64_t *xs = p.table(s.f[0]), *params = p.table(s.f[1]);
  const int width = o.params();
  const bool inverse = s.f[4] != 0;
  Vec<T> v[3 * N + 1], d[3 * N + 1];
  for (int64_t i = 0; i < s.units; ++i, params += width)
    for (int64_t at = 0; at < tile; at += n) {
      for (int k = 0; k < width; ++k) v[k] = load(values + params[k] * tile + at);
      const Vec<T> x = load(values + xs[i] * tile + at);
      T* total = (deltas ? deltas : values) + p.rows * tile + at;
      if (!deltas) {
        Vec<T> y, l;
        spline_of<T, N>(o, o.bins, v, x, inverse, y, l);
        store(values + (s.first + i) * tile + at, y);
        store(total, load(total) + l);
        continue;
      }
      Vec<T> dx;
      spline_backward_of<T, N>(o, o.bins, v, x, inverse, load(deltas + (s.first + i) * tile + at), load(total), dx, d);
      T* to = deltas + xs[i] * tile + at;
      store(to, load(to) + dx);
      for (int k = 0; k < width; ++k) {
        to = deltas + params[k] * tile + at;
        store(to, load(to) + d[k]);
      }
    }
}

// Forward without deltas, backward with them.
template <class T>
void spline_any(const Program& p, const Step& s, const double* options, T* values, T* deltas, int64_t tile) {
  const SplineOptions<T> o = spline_options<T>(s, options + s.f[5]);
  (o.bins == 8 ? spline_step<T, 8> : o.bins <= 16 ? spline_step<T, 16> : spline_step<T, kSplineBins>)(p, s, o, values, deltas, tile);
}

template <class T>
void affine_any(const Program& p, const Step& s, const double* options, T* values, T* deltas, int64_t tile) {
  constexpr int n = lanes<T>();
  const int64_t *xs = p.table(s.f[0]), *as = p.table(s.f[1]), *ts = p.table(s.f[2]), mode = s.f[3];
  const T constant = T(s.f[4] < 0 ? 0 : options[s.f[4]]);
  for (int64_t i = 0; i < s.units; ++i)
    for (int64_t at = 0; at < tile; at += n) {
      const Vec<T> x = load(values + xs[i] * tile + at), t = ts ? load(values + ts[i] * tile + at) : Vec<T>{};
      const LogScale<T> l = as ? log_scale_of<T>(s.kind, constant, load(values + as[i] * tile + at))
                               : LogScale<T>{splat(T(1)), Vec<T>{}, Vec<T>{}};
      T* z = (deltas ? deltas : values) + (s.first + i) * tile + at;
      T* total = (deltas ? deltas : values) + p.rows * tile + at;
      if (!deltas) {
        Vec<T> sum = load(total);
        store(z, affine_forward<T>(mode, l, x, t, sum));
        store(total, sum);
        continue;
      }
      Vec<T> dx, dt, da;
      affine_backward<T>(mode, l, x, t, load(z), load(total), dx, dt, da);
      T* to = deltas + xs[i] * tile + at;
      store(to, load(to) + dx);
      if (ts) to = deltas + ts[i] * tile + at, store(to, load(to) + dt);
      if (as) to = deltas + as[i] * tile + at, store(to, load(to) + da);
    }
}

// One factor and one shift for each feature, of the weights.
template <class T>
void scale_any(const Program& p, const Step& s, const double* options, const T* weights, T* values, T* deltas, T* sums,
               bool fresh, int64_t tile) {
  constexpr int n = lanes<T>();
  const int64_t *xs = p.table(s.f[0]), *index = p.table(s.f[4]), mode = s.f[3];
  const bool counts = !s.f[5];
  if (fresh) std::fill(sums, sums + 2 * s.units * n, T(0));
  for (int64_t i = 0; i < s.units; ++i) {
    const Vec<T> t = splat(s.f[2] < 0 ? T(0) : weights[s.f[2] + index[i]]);
    const LogScale<T> l = s.f[1] < 0 ? LogScale<T>{splat(T(1)), Vec<T>{}, Vec<T>{}}
                                     : log_scale_of<T>(s.kind, T(0), splat(weights[s.f[1] + index[i]]));
    for (int64_t at = 0; at < tile; at += n) {
      const Vec<T> x = load(values + xs[i] * tile + at);
      T* z = (deltas ? deltas : values) + (s.first + i) * tile + at;
      T* total = (deltas ? deltas : values) + p.rows * tile + at;
      if (!deltas) {
        Vec<T> sum = load(total);
        store(z, affine_forward<T>(mode, l, x, t, sum));
        if (counts) store(total, sum);
        continue;
      }
      Vec<T> dx, dt, da;
      affine_backward<T>(mode, l, x, t, load(z), counts ? load(total) : Vec<T>{}, dx, dt, da);
      T* to = deltas + xs[i] * tile + at;
      store(to, load(to) + dx);
      T* sum = sums + 2 * i * n;
      store(sum, load(sum) + da);
      store(sum + n, load(sum + n) + dt);
    }
  }
}

template <class T>
void base_any(const Program& p, const Step& s, T* values, T* deltas, int64_t tile) {
  constexpr int n = lanes<T>();
  const int64_t* xs = p.table(s.f[0]);
  for (int64_t at = 0; at < tile; at += n) {
    T* place = (deltas ? deltas : values) + p.rows * tile + at;
    const Vec<T> before = load(place);
    Vec<T> total = before;
    for (int64_t i = 0; i < s.units; ++i) {
      const Vec<T> x = load(values + xs[i] * tile + at);
      if (deltas) {
        T* to = deltas + xs[i] * tile + at;
        store(to, load(to) - before * (s.kind == kNormal ? x : tanh<T>(x * T(0.5))));
      } else if (s.kind == kNormal) {
        total -= x * x * T(0.5) + T(0.91893853320467274178);
      } else {
        total -= softplus<T>(x) + softplus<T>(-x);
      }
    }
    if (!deltas) store(place, total);
  }
}

template <class T>
void point_any(const Program& p, const Step& s, T* values, T* deltas, int64_t tile) {
  constexpr int n = lanes<T>();
  const int64_t *from = p.table(s.f[0]), *gate = p.table(s.f[1]), *added = p.table(s.f[2]);
  for (int64_t i = 0; i < s.units; ++i)
    for (int64_t at = 0; at < tile; at += n) {
      const Vec<T> x = load(values + from[i] * tile + at), y = activated<T>(s.kind, x);
      if (!deltas) {
        Vec<T> v = gate ? y * load(values + gate[i] * tile + at) : y;
        if (added) v += load(values + added[i] * tile + at);
        store(values + (s.first + i) * tile + at, v);
        continue;
      }
      const Vec<T> d = load(deltas + (s.first + i) * tile + at);
      T* to = deltas + from[i] * tile + at;
      const Vec<T> g = gate ? d * load(values + gate[i] * tile + at) : d;
      store(to, load(to) + g * slope<T>(s.kind, x));
      if (gate) to = deltas + gate[i] * tile + at, store(to, load(to) + d * y);
      if (added) to = deltas + added[i] * tile + at, store(to, load(to) + d);
    }
}

// ---- a tile ----

template <class T>
void read_tile(const T* x, int64_t n, int64_t width, int64_t begin, int64_t tile, T* to) {
  const int64_t here = std::min(tile, n - begin);
  for (int64_t s = 0; s < tile; ++s) {  // what lies beyond the batch repeats its last sample, so that it is finite if that is
    const T* from = x + (begin + std::min(s, here - 1)) * width;
    for (int64_t i = 0; i < width; ++i) to[i * tile + s] = from[i];
  }
}

template <class T>
void forward_tile(const Program& p, const FlowProgramArgs& a, const T* panels, int64_t begin, T* values) {
  const T* weights = static_cast<const T*>(a.weights);
  const int64_t tile = a.tile;
  read_tile(static_cast<const T*>(a.x), a.n, p.inputs, begin, tile, values);
  if (p.contexts) read_tile(static_cast<const T*>(a.context), a.n, p.contexts, begin, tile, values + p.inputs * tile);
  T* total = values + p.rows * tile;
  std::fill(total, total + tile, T(0));
  for (int64_t i = 0; i < p.count; ++i) {
    const Step& s = p.steps[i];
    switch (s.operation) {
      case kProduct:
        product_forward<T>(Product(p, s), weights, panels, values, tile);
        panels += packed_size<T>(p, s);
        break;
      case kPoint: point_any<T>(p, s, values, nullptr, tile); break;
      case kAffine: affine_any<T>(p, s, a.options, values, nullptr, tile); break;
      case kSplineMap: spline_any<T>(p, s, a.options, values, nullptr, tile); break;
      case kScale: scale_any<T>(p, s, a.options, weights, values, nullptr, nullptr, false, tile); break;
      case kConstant:
        for (int64_t at = 0; at < tile; ++at) total[at] += weights[s.f[0]];
        break;
      default: base_any<T>(p, s, values, nullptr, tile);
    }
  }
  if (!a.z) return;  // of the backward, which asks for the values alone
  const int64_t here = std::min(tile, a.n - begin);
  T *z = static_cast<T*>(a.z) + begin * p.inputs, *to = static_cast<T*>(a.total) + begin;
  for (int64_t s = 0; s < here; ++s) {
    for (int64_t i = 0; i < p.inputs; ++i) z[s * p.inputs + i] = values[p.outputs[i] * tile + s];
    to[s] = total[s];
  }
}

template <class T>
void backward_tile(const Program& p, const FlowProgramArgs& a, const T* panels, int64_t begin, T* values, T* deltas,
                   T* transposed, T* sums, bool fresh) {
  const T* weights = static_cast<const T*>(a.weights);
  const int64_t tile = a.tile, here = std::min(tile, a.n - begin);
  std::fill(deltas, deltas + (p.rows + 1) * tile, T(0));
  const T *grad_z = static_cast<const T*>(a.grad_z), *grad_total = static_cast<const T*>(a.grad_total);
  if (grad_z)
    for (int64_t s = 0; s < here; ++s)
      for (int64_t i = 0; i < p.inputs; ++i) deltas[p.outputs[i] * tile + s] = grad_z[(begin + s) * p.inputs + i];
  if (grad_total) std::copy(grad_total + begin, grad_total + begin + here, deltas + p.rows * tile);
  const int64_t skipped = a.grad_x ? 0 : a.grad_context ? 0 : p.inputs + p.contexts;
  for (int64_t i = p.count - 1; i >= 0; --i) {
    const Step& s = p.steps[i];
    sums -= sums_size<T>(p, s);
    switch (s.operation) {
      case kProduct: {
        const Product m(p, s);
        panels -= packed_size<T>(p, s);
        T* d = deltas + m.first * tile;
        if (m.activation != kNone) {
          const T* v = values + m.first * tile;
          for (int64_t at = 0; at < m.units * tile; at += lanes<T>())
            store(d + at, load(d + at) * slope_of_value<T>(m.activation, load(v + at)));
        }
        if (m.added)
          for (int64_t r = 0; r < m.units; ++r)
            for (int64_t at = 0; at < tile; at += lanes<T>()) {
              T* to = deltas + m.added[r] * tile + at;
              store(to, load(to) + load(d + r * tile + at));
            }
        product_weights<T>(m, values, deltas, transposed, sums, fresh, tile);
        product_inputs<T>(m, panels, deltas, skipped, tile);
        break;
      }
      case kPoint: point_any<T>(p, s, values, deltas, tile); break;
      case kAffine: affine_any<T>(p, s, a.options, values, deltas, tile); break;
      case kSplineMap: spline_any<T>(p, s, a.options, values, deltas, tile); break;
      case kScale: scale_any<T>(p, s, a.options, weights, values, deltas, sums, fresh, tile); break;
      case kConstant:
        if (fresh) std::fill(sums, sums + lanes<T>(), T(0));
        for (int64_t at = 0; at < tile; at += lanes<T>()) store(sums, load(sums) + load(deltas + p.rows * tile + at));
        break;
      default: base_any<T>(p, s, values, deltas, tile);
    }
  }
  T *grad_x = static_cast<T*>(a.grad_x), *grad_context = static_cast<T*>(a.grad_context);
  for (int64_t s = 0; s < here; ++s) {
    for (int64_t i = 0; grad_x && i < p.inputs; ++i) grad_x[(begin + s) * p.inputs + i] = deltas[i * tile + s];
    for (int64_t i = 0; grad_context && i < p.contexts; ++i)
      grad_context[(begin + s) * p.contexts + i] = deltas[(p.inputs + i) * tile + s];
  }
}

// ---- whole calls ----

template <class T>
int64_t panels_size(const Program& p) {
  int64_t size = 0;
  for (int64_t i = 0; i < p.count; ++i)
    if (p.steps[i].operation == kProduct) size += packed_size<T>(p, p.steps[i]);
  return size;
}

template <class T>
void pack(const Program& p, const T* weights, T* panels, bool backward, int threads) {
  std::vector<int64_t> starts(size_t(p.count) + 1, 0);
  for (int64_t i = 0; i < p.count; ++i)
    starts[size_t(i) + 1] = starts[size_t(i)] + (p.steps[i].operation == kProduct ? packed_size<T>(p, p.steps[i]) : 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.steps[i].operation != kProduct) continue;
    const Product m(p, p.steps[i]);
    backward ? pack_backward<T>(m, weights, panels + starts[size_t(i)]) : pack_forward<T>(m, weights, panels + starts[size_t(i)]);
  }
}

// The memory that a call works in: panels, and for each thread what a tile needs.
template <class T>
struct Layout {
  int64_t panels, values, deltas, transposed, sums, each;  // elements; the last all that one thread has

  Layout(const Program& p, int64_t tile, bool backward, bool again) {
    const auto lines = [](int64_t count) { return (count + 31) / 32 * 32; };
    int64_t widest = 0, all_sums = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      all_sums += sums_size<T>(p, p.steps[i]);
      if (p.steps[i].operation == kProduct) widest = std::max(widest, padded<T>(p.steps[i].f[3]));
    }
    panels = lines(panels_size<T>(p));
    values = again ? lines((p.rows + 1) * tile) : 0;
    deltas = backward ? lines((p.rows + 1) * tile) : 0;
    transposed = backward ? lines(widest * tile) : 0;
    sums = backward ? lines(all_sums) : 0;
    each = values + deltas + transposed + sums;
  }
  int64_t size(int threads, bool backward) const {
    return (backward && values ? 2 : 1) * panels + threads * each;  // values computed again need the forward's panels too
  }
};

template <class T>
void scratch(const FlowProgramArgs& a) {
  *a.size = Layout<T>(Program(a.code), a.tile, a.backward, a.again).size(a.threads, a.backward);
}

template <class T>
void forward(const FlowProgramArgs& a) {
  const Program p(a.code);
  const Layout<T> layout(p, a.tile, false, !a.values);
  T *panels = static_cast<T*>(a.scratch), *own = panels + layout.panels;
  pack<T>(p, static_cast<const T*>(a.weights), panels, false, a.threads);
  const int64_t tiles = (a.n + a.tile - 1) / a.tile, size = (p.rows + 1) * a.tile;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int t = 0; t < a.threads; ++t)
    for (int64_t i = tiles * t / a.threads; i < tiles * (t + 1) / a.threads; ++i)
      forward_tile<T>(p, a, panels, i * a.tile, a.values ? static_cast<T*>(a.values) + i * size : own + t * layout.each);
}

// The sum of all threads' gradients of step s, in the weights' own order; `sums` those of the first thread.
template <class T>
void join(const Program& p, const Step& s, const T* sums, int64_t apart, int threads, T* grad, int workers) {
  constexpr int n = lanes<T>();
  const auto total = [&](int64_t offset) {
    Vec<T> all = load(sums + offset);
    for (int t = 1; t < threads; ++t) all += load(sums + t * apart + offset);
    return sum<T>(all);
  };
  if (s.operation == kConstant) grad[s.f[0]] += total(0);
  if (s.operation == kScale) {
    const int64_t* index = p.table(s.f[4]);
    for (int64_t i = 0; i < s.units; ++i) {
      if (s.f[1] >= 0) grad[s.f[1] + index[i]] += total(2 * i * n);
      if (s.f[2] >= 0) grad[s.f[2] + index[i]] += total(2 * i * n + n);
    }
  }
  if (s.operation != kProduct) return;
  const Product m(p, s);
  const int64_t ld = padded<T>(m.inputs);
  bool run = true;
  for (int64_t j = 1; j < m.inputs; ++j) run = run && m.columns[j] == m.columns[j - 1] + 1;
#pragma omp parallel for num_threads(m.units * m.inputs < 65536 ? 1 : workers) schedule(static)
  for (int64_t r = 0; r < m.units; ++r) {
    T* to = grad + m.weight + m.out[r] * m.stride;
    const int64_t live = m.live_of(r);
    for (int t = 0; t < threads; ++t) {
      const T* from = sums + t * apart + r * ld;
      if (run) {
        T* next = to + (live ? m.columns[0] : 0);
        for (int64_t j = 0; j < live; ++j) next[j] += from[j];
      } else {
        for (int64_t j = 0; j < live; ++j) to[m.columns[j]] += from[j];
      }
    }
    if (m.bias >= 0) grad[m.bias + m.out[r]] += total(m.units * ld + r * n);
  }
}

template <class T>
void backward(const FlowProgramArgs& a) {
  const Program p(a.code);
  const Layout<T> layout(p, a.tile, true, !a.values);
  const T* weights = static_cast<const T*>(a.weights);
  T *panels = static_cast<T*>(a.scratch), *forward_panels = panels + layout.panels;
  T* own = a.values ? forward_panels : forward_panels + layout.panels;
  pack<T>(p, weights, panels, true, a.threads);
  if (!a.values) pack<T>(p, weights, forward_panels, false, a.threads);  // the values were not kept
  const int64_t tiles = (a.n + a.tile - 1) / a.tile, size = (p.rows + 1) * a.tile, all_panels = panels_size<T>(p);
  const int threads = int(std::min<int64_t>(a.threads, tiles));
  int64_t all_sums = 0;
  for (int64_t i = 0; i < p.count; ++i) all_sums += sums_size<T>(p, p.steps[i]);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    T *again = own + t * layout.each, *deltas = again + layout.values, *transposed = deltas + layout.deltas;
    T* sums = transposed + layout.transposed;
    const int64_t begin = tiles * t / threads;
    for (int64_t i = begin; i < tiles * (t + 1) / threads; ++i) {
      T* values = a.values ? static_cast<T*>(a.values) + i * size : again;
      if (!a.values) forward_tile<T>(p, a, forward_panels, i * a.tile, values);
      backward_tile<T>(p, a, panels + all_panels, i * a.tile, values, deltas, transposed, sums + all_sums, i == begin);
    }
  }
  T* grad = static_cast<T*>(a.grad_weights);
  const T* sums = own + layout.values + layout.deltas + layout.transposed;
  std::fill(grad, grad + p.weights, T(0));
  for (int64_t i = 0; i < p.count; ++i) {
    join<T>(p, p.steps[i], sums, layout.each, threads, grad, a.threads);
    sums += sums_size<T>(p, p.steps[i]);
  }
}

}  // namespace

GENFAST_KERNEL(flow_program_scratch, FlowProgramArgs, scratch<T>(a))
GENFAST_KERNEL(flow_program, FlowProgramArgs, forward<T>(a))
GENFAST_KERNEL(flow_program_backward, FlowProgramArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
