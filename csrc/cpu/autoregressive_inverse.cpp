// The inverse of an autoregressive transformation in degree order: x_i = f(z_i; theta_i(x)), theta_i of lower levels only.
// Source: the masks of MADE (Germain et al. 1502.03509) and MAF (Papamakarios et al. 1705.07057); the order is genfast's: units
// sorted by level, so that each is computed once, when the inputs that it needs are solved. The program's format stands at the
// head of genfast/programs/degree_program.py.
//
// Fused: all layers, their activations, and the univariate inverse with its logdet, for a block of samples at a time.
// Batches: units by samples, [unit][up to 3 vectors of samples]; a tile of up to 9 units by 3 vectors takes its weights by
// broadcast. A block's activations stay in the second-level cache (4 bytes x 48 samples x units), from which a tile of r units
// reads 64 bytes per r multiply-adds; the weights stream through once a block. Few samples: [sample][unit], lanes over the
// inputs of a unit, four units by up to four samples at once.
// 2 FLOPs a live weight and sample. Bound by multiply-adds in batches (measured on Zen 4: 85% of what a core does in registers,
// 64 inputs, hidden 512-512, 128 samples), by the second-level cache's weights for one sample.
//
// Backward: the activations are computed again from x; one sweep in reverse order pushes each unit's cotangent, once it is
// complete, to what the unit read; products over samples then give the weights' gradient. 2 + 2 FLOPs more a weight.
#include <cmath>
#include <vector>

#include "dtype_switch.h"
#include "gemm.h"
#include "spline.h"
#include "unit_activation.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int kVectors = 3;
// Rows of a tile: accumulators, 3 activations and a weight fill the registers.
constexpr int kRows = GENFAST_VECTOR_BYTES == 64 ? 9 : 4;
constexpr int kPushed = GENFAST_VECTOR_BYTES == 64 ? 8 : 3;
constexpr int64_t kSerial = 1 << 16;  // multiply-adds below which threads do not pay

enum Transform { kExp, kSoftclamp, kSigmoid2, kSoftplusScale, kAdditive, kBernoulli, kSpline };

struct Layer {
  int64_t kind, activation, source, source_units, first, units, bias, context, gate, sources, residual;
};
struct Group {
  int64_t level, layer, row, rows, count, weight, stride;
};
static_assert(sizeof(Layer) == 11 * sizeof(int64_t) && sizeof(Group) == 7 * sizeof(int64_t), "the program is read in place");

struct Program {
  const int64_t* code;
  int64_t inputs, width, levels, layer_count, group_count, units, statics, packed, parameters;
  const int64_t *order, *ends;
  const Layer* layers;
  const Group* groups;

  explicit Program(const int64_t* c) : code(c) {
    inputs = c[0], width = c[1], levels = c[2], layer_count = c[3], group_count = c[4], units = c[5], statics = c[6];
    packed = c[7], parameters = c[8];
    order = c + 9;
    ends = order + inputs;
    layers = reinterpret_cast<const Layer*>(ends + levels);
    groups = reinterpret_cast<const Group*>(layers + layer_count);
  }

  int64_t multiplications() const {
    int64_t total = 0;
    for (int64_t g = 0; g < group_count; ++g) total += groups[g].rows * groups[g].count;
    return total;
  }
};

// A sum with the rounding that it lost (Kahan): the peers add in the same order in both directions, the sweep does not, and
// so is held to the exact sum. What an infinity loses is no number, and is dropped.
template <class T>
struct Total {
  Vec<T> sum{}, lost{};

  GENFAST_INLINE_MEMBER void add(Vec<T> x) {
    const Vec<T> y = x - lost, t = sum + y, gone = (t - sum) - y;
    lost = gone == gone ? gone : Vec<T>{};
    sum = t;
  }
};

// ---- the univariate inverse; `params` are P vectors `apart` elements from each other ----

template <class T>
struct Univariate {
  int transform;
  bool flip, scale_first;
  T constant;
  SplineOptions<T> spline;

  struct Scale {
    Vec<T> s, log_s, slope;  // slope: the derivative of log s by a
  };

  GENFAST_INLINE_MEMBER Scale scale(Vec<T> a) const {
    if (transform == kExp) return {exp<T>(a), a, splat(T(1))};
    if (transform == kSoftclamp) {
      const Vec<T> r = T(1) / (abs<T>(a / constant) + T(1)), log_s = a * r;
      return {exp<T>(log_s), log_s, r * r};
    }
    return shifted_scale(a);
  }

  __attribute__((noinline)) Scale shifted_scale(Vec<T> a) const {
    const Vec<T> p = logistic<T>(transform == kSigmoid2 ? a + T(2) : a);
    const Vec<T> s = (transform == kSigmoid2 ? p : softplus<T>(a)) + constant;
    Vec<T> log_s = s > T(0) ? log<T>(s) : splat(T(-__builtin_inf()));
    log_s = s == s ? log_s : s;
    return {s, log_s, (transform == kSigmoid2 ? p * logistic<T>(-(a + T(2))) : p) / s};
  }

  GENFAST_INLINE_MEMBER void split(const T* params, int64_t apart, Vec<T>& a, Vec<T>& t) const {
    a = load(params + (scale_first ? 0 : apart));
    t = load(params + (scale_first ? apart : 0));
  }

  GENFAST_INLINE_MEMBER Vec<T> solve(Vec<T> z, const T* params, int64_t apart, Total<T>& logdet) const {
    if (transform == kBernoulli) {
      const Vec<T> chance = logistic<T>(load(params));
      return chance == chance ? (z < chance ? splat(T(1)) : Vec<T>{}) : chance;  // NaN stays
    }
    if (transform == kAdditive) return flip ? z + load(params) : z - load(params);
    if (transform == kSpline) return bend(z, params, apart, logdet);
    Vec<T> a, t;
    split(params, apart, a, t);
    const Scale of = scale(a);
    logdet.add(flip ? of.log_s : -of.log_s);
    return flip ? of.s * z + t : (z - t) / of.s;
  }

  __attribute__((noinline, noclone)) Vec<T> bend(Vec<T> z, const T* params, int64_t apart, Total<T>& logdet) const {
    Vec<T> p[3 * kSplineBins + 1], x, l;
    for (int i = 0; i < spline.params(); ++i) p[i] = load(params + i * apart);
    genfast::GENFAST_ISA::spline<T>(spline, p, z, !flip, x, l);
    logdet.add(l);
    return x;
  }

  __attribute__((noinline, noclone)) Vec<T> pull_bend(Vec<T> gx, Vec<T> gl, Vec<T> z, const T* params, int64_t apart, T* g,
                                             int64_t g_apart) const {
    Vec<T> p[3 * kSplineBins + 1], d[3 * kSplineBins + 1], dz;
    for (int i = 0; i < spline.params(); ++i) p[i] = load(params + i * apart);
    spline_backward<T>(spline, p, z, !flip, gx, gl, dz, d);
    for (int i = 0; i < spline.params(); ++i) store(g + i * g_apart, d[i]);
    return dz;
  }

  // From the cotangents gx and gl of x and of log |dx/dz| those of z and of the parameters.
  GENFAST_INLINE_MEMBER Vec<T> pull(Vec<T> gx, Vec<T> gl, const T* z, Vec<T> x, const T* params, int64_t apart, T* g,
                                    int64_t g_apart) const {
    if (transform == kSpline) return pull_bend(gx, gl, load(z), params, apart, g, g_apart);
    if (transform == kAdditive) {
      store(g, flip ? gx : -gx);
      return gx;
    }
    Vec<T> a, t;
    split(params, apart, a, t);
    const Scale of = scale(a);
    const Vec<T> dz = flip ? gx * of.s : gx / of.s;
    store(g + (scale_first ? 0 : g_apart), flip ? of.slope * (gx * (x - t) + gl) : -of.slope * (gx * x + gl));
    store(g + (scale_first ? g_apart : 0), flip ? gx : -dz);
    return dz;
  }
};

template <class T>
Univariate<T> univariate(const DegreeOrderedArgs& a) {
  Univariate<T> u{a.transform, false, false, T(0), {}};
  const double* o = a.options;
  if (a.option_count) u.flip = o[0] != 0;
  if (a.transform == kSpline)
    u.spline = {int(o[1]), int(o[2]), o[3] != 0, T(o[4]), T(o[5]), T(o[6]), T(o[7]), T(o[8]),
                T(o[9]), T(o[10]), T(std::log(o[11])), T(o[12])};
  else if (a.option_count)
    u.scale_first = o[1] != 0, u.constant = T(o[2]);
  return u;
}

// ---- batches: [unit][V vectors of samples] ----

// acc[r][v] += sum over k < count of w[r][k] h[k][v].
template <class T, int V, int R>
GENFAST_INLINE void multiply_tile(const T* const* rows, int64_t from, const T* h, int64_t count, Vec<T> (&acc)[R][V]) {
  constexpr int n = lanes<T>(), kLine = 64 / sizeof(T);
  const T* w[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) w[r] = rows[r] + from;
  h += from * V * n;
  for (int64_t k = 0; k < count - from;) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) __builtin_prefetch(w[r] + k + 2 * kLine);
    for (const int64_t stop = std::min(count - from, k + kLine); k < stop; ++k, h += V * n) {
      Vec<T> x[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) x[v] = load(h + v * n);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec<T> s = splat(w[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += s * x[v];
      }
    }
  }
}

// How groups of few rows of a layer are summed together: `rows` of this one and those that it takes along, the next group of
// the layer, and how many terms an earlier one has summed for it.
struct Ahead {
  int64_t rows, next, begun;
};

std::vector<Ahead> look_ahead(const Program& p) {
  std::vector<Ahead> ahead(size_t(p.group_count), Ahead{0, -1, 0});
  std::vector<int64_t> leader(size_t(p.layer_count), -1), last(size_t(p.layer_count), -1);
  for (int64_t g = 0; g < p.group_count; ++g) {
    const Group& group = p.groups[g];
    int64_t& first = leader[size_t(group.layer)];
    if (last[size_t(group.layer)] >= 0) ahead[size_t(last[size_t(group.layer)])].next = g;
    last[size_t(group.layer)] = g;
    ahead[size_t(g)].rows = group.rows;
    // The rows that come along are as long as the leader's at least, which no level's order would promise for any mask.
    if (first >= 0 && p.groups[first].count > 0 && p.groups[first].count <= group.count &&
        ahead[size_t(first)].rows + group.rows <= kRows) {
      ahead[size_t(first)].rows += group.rows;
      ahead[size_t(g)].begun = p.groups[first].count;
    } else {
      first = g;
    }
  }
  return ahead;
}

template <class T>
struct Block {
  const Program& p;
  const Ahead* ahead;
  const T* packed;
  T *units, *statics;  // [unit][wide], [column][wide]
};

// Terms from..to of rows of a product, whose sums so far lie in their units' places (from 0: nothing is there).
template <class T, int V, int R>
void sum_rows(const T* const* rows, const T* h, int64_t from, int64_t to, T* out) {
  constexpr int n = lanes<T>(), wide = V * n;
  Vec<T> acc[R][V] = {};
  if (from) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = load(out + r * wide + v * n);
  }
  multiply_tile<T, V, R>(rows, from, h, to, acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + r * wide + v * n, acc[r][v]);
}

template <class T, int V, int R = kRows>
GENFAST_INLINE void sum_rows_any(int64_t count, const T* const* rows, const T* h, int64_t from, int64_t to, T* out) {
  if constexpr (R > 1) {
    if (count < R) return sum_rows_any<T, V, R - 1>(count, rows, h, from, to, out);
  }
  sum_rows<T, V, R>(rows, h, from, to, out);
}

// The sums of a group. One of few rows takes the next groups of its layer along, as far as its own terms go: tiles of many rows
// read an activation less often. `begun` is how far the sums of this group's rows have come.
template <class T, int V>
void sum_group(const Block<T>& b, const Layer& layer, const Group* group, int64_t begun) {
  constexpr int wide = V * lanes<T>();
  const T* rows[kRows];
  const T* h = b.units + layer.source * wide;
  T* out = b.units + (layer.first + group->row) * wide;
  const Ahead& ahead = b.ahead[group - b.p.groups];
  if (ahead.rows > group->rows) {
    int64_t count = 0;
    for (const Group* g = group; count < ahead.rows; g = b.p.groups + b.ahead[g - b.p.groups].next)
      for (int64_t r = 0; r < g->rows; ++r) rows[count++] = b.packed + g->weight + r * g->stride;
    sum_rows_any<T, V>(count, rows, h, 0, group->count, out);
    return;
  }
  const int64_t tiles = (group->rows + kRows - 1) / kRows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = group->rows * t / tiles, count = group->rows * (t + 1) / tiles - first;
    for (int64_t r = 0; r < count; ++r) rows[r] = b.packed + group->weight + (first + r) * group->stride;
    sum_rows_any<T, V>(count, rows, h, begun, group->count, out + first * wide);
  }
}

// Bias, context, activation and residual over a group's sums.
template <class T, int V, int kActivation>
void finish_group(const Block<T>& b, const Layer& layer, const Group* group) {
  constexpr int n = lanes<T>(), wide = V * n;
  for (int64_t row = group->row; row < group->row + group->rows; ++row) {
    const T* context = layer.context < 0 ? nullptr : b.statics + (layer.context + row) * wide;
    const T* residual = layer.residual < 0 ? nullptr : b.units + b.p.code[layer.residual + row] * wide;
    const T bias = layer.bias < 0 ? T(0) : b.packed[layer.bias + row];
    T* out = b.units + (layer.first + row) * wide;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<T> u = load(out + v * n) + bias;
      if (context) u += load(context + v * n);
      u = activated<T>(kActivation < 0 ? layer.activation : kActivation, u);
      if (residual) u += load(residual + v * n);
      store(out + v * n, u);
    }
  }
}

template <class T, int V>
void product_group(const Block<T>& b, const Layer& layer, const Group* group) {
  sum_group<T, V>(b, layer, group, b.ahead[group - b.p.groups].begun);
  if (layer.activation == kNone)
    finish_group<T, V, kNone>(b, layer, group);
  else if (layer.activation == kRelu)
    finish_group<T, V, kRelu>(b, layer, group);
  else
    finish_group<T, V, -1>(b, layer, group);
}

template <class T, int V>
void point_rows(const Block<T>& b, const Layer& layer, const Group& group) {
  constexpr int n = lanes<T>(), wide = V * n;
  for (int64_t row = group.row; row < group.row + group.rows; ++row) {
    const T* from = b.units + b.p.code[layer.sources + row] * wide;
    const T* gate = layer.gate < 0 ? nullptr : b.statics + (layer.gate + row) * wide;
    const T* residual = layer.residual < 0 ? nullptr : b.units + b.p.code[layer.residual + row] * wide;
    T* out = b.units + (layer.first + row) * wide;
    for (int v = 0; v < V; ++v) {
      Vec<T> u = activated<T>(layer.activation, load(from + v * n));
      if (gate) u *= load(gate + v * n);
      if (residual) u += load(residual + v * n);
      store(out + v * n, u);
    }
  }
}

// [sample][column] of `live` samples to [column][wide], other samples zero.
template <class T>
void gather_samples(const T* from, int64_t columns, int64_t live, int64_t wide, T* to) {
  transpose(from, columns, live, columns, to, wide);
  if (live < wide)
    for (int64_t c = 0; c < columns; ++c) memset(to + c * wide + live, 0, size_t(wide - live) * sizeof(T));
}

// Samples first .. first + live, live <= V vectors. With `given` x is known and the units alone are wanted.
template <class T, int V>
void forward_block(const DegreeOrderedArgs& a, const Program& p, const Ahead* ahead, const Univariate<T>& u, int64_t first,
                   int64_t live, T* scratch) {
  constexpr int n = lanes<T>(), wide = V * n;
  const bool given = a.units != nullptr;
  T *units = scratch, *statics = units + p.units * wide, *rows = statics + p.statics * wide;
  const Block<T> b{p, ahead, static_cast<const T*>(a.packed), units, statics};
  if (p.statics) gather_samples(static_cast<const T*>(a.statics) + first * p.statics, p.statics, live, wide, statics);
  gather_samples(static_cast<const T*>(given ? a.x : a.z) + first * p.inputs, p.inputs, live, wide, rows);
  if (given)
    for (int64_t j = 0; j < p.inputs; ++j) memcpy(units + j * wide, rows + p.order[j] * wide, wide * sizeof(T));
  Total<T> logdet[V];
  const Group* group = p.groups;
  const Group* end = p.groups + p.group_count;
  for (int64_t level = 0; level < p.levels; ++level) {
    for (; group < end && group->level == level; ++group) {
      const Layer& layer = p.layers[group->layer];
      if (layer.kind)
        point_rows<T, V>(b, layer, *group);
      else
        product_group<T, V>(b, layer, group);
    }
    if (given) continue;
    for (int64_t j = level ? p.ends[level - 1] : 0; j < p.ends[level]; ++j) {
      T* place = rows + p.order[j] * wide;
      for (int v = 0; v < V; ++v) {
        const Vec<T> x = u.solve(load(place + v * n), units + (p.parameters + j * p.width) * wide + v * n, wide, logdet[v]);
        store(units + j * wide + v * n, x);
        store(place + v * n, x);
      }
    }
  }
  if (given) {
    T* out = static_cast<T*>(a.units) + first;
    for (int64_t i = 0; i < p.units; ++i) memcpy(out + i * a.stride, units + i * wide, wide * sizeof(T));
    return;
  }
  transpose(rows, wide, p.inputs, live, static_cast<T*>(a.x) + first * p.inputs, p.inputs);
  T sums[V * n];
  for (int v = 0; v < V; ++v) store(sums + v * n, logdet[v].sum);
  memcpy(static_cast<T*>(a.logdet) + first, sums, size_t(live) * sizeof(T));
}

// ---- few samples: [sample][unit] ----

// The sums of `count` vectors, the transpose's rows added up.
template <class T>
GENFAST_INLINE void sums_of(const T* vectors, int count, T* out) {
  constexpr int n = lanes<T>();
  alignas(64) T square[n * n];
  for (int from = 0; from < count; from += n) {
    transpose_square(vectors + from * n, n, square, n);
    Vec<T> total = load(square);
    for (int i = 1; i < n; ++i) total += load(square + i * n);
    store(out + from, total);
  }
}

template <class T, int S, int R>
GENFAST_INLINE void dot_rows(const T* w, int64_t stride, const T* h, int64_t apart, int64_t count, T* out) {
  constexpr int n = lanes<T>(), room = (R * S + n - 1) / n * n;
  Vec<T> acc[R][S] = {};
  for (int64_t k = 0; k < count; k += n) {
    Vec<T> x[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) x[s] = load(h + s * apart + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = load(w + r * stride + k);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) acc[r][s] += weight * x[s];
    }
  }
  alignas(64) T vectors[room * n];
  for (int i = 0; i < room; ++i) store(vectors + i * n, i < R * S ? acc[i / S][i % S] : Vec<T>{});
  sums_of<T>(vectors, R * S, out);
}

template <class T, int S>
void forward_few(const DegreeOrderedArgs& a, const Program& p, const Univariate<T>& u, int64_t first, T* scratch) {
  constexpr int n = lanes<T>();
  const int64_t apart = p.units + 16;
  const T *packed = static_cast<const T*>(a.packed), *statics = static_cast<const T*>(a.statics) + first * p.statics;
  const T* z = static_cast<const T*>(a.z) + first * p.inputs;
  T *x = static_cast<T*>(a.x) + first * p.inputs, *params = scratch + S * apart;
  memset(scratch, 0, size_t(S * apart) * sizeof(T));  // what a row reads beyond its inputs must be a number
  Total<T> logdet;
  const Group* group = p.groups;
  const Group* end = p.groups + p.group_count;
  for (int64_t level = 0; level < p.levels; ++level) {
    for (; group < end && group->level == level; ++group) {
      const Layer& layer = p.layers[group->layer];
      for (int64_t from = 0; from < group->rows; from += 4) {
        const int64_t rows = group->rows - from < 4 ? group->rows - from : 4, row = group->row + from;
        alignas(64) T sums[32];
        if (layer.kind) {
          for (int64_t r = 0; r < rows; ++r)
            for (int s = 0; s < S; ++s) sums[r * S + s] = scratch[s * apart + p.code[layer.sources + row + r]];
        } else {
          const T *w = packed + group->weight + from * group->stride, *h = scratch + layer.source;
          if (rows == 4)
            dot_rows<T, S, 4>(w, group->stride, h, apart, group->count, sums);
          else if (rows == 3)
            dot_rows<T, S, 3>(w, group->stride, h, apart, group->count, sums);
          else if (rows == 2)
            dot_rows<T, S, 2>(w, group->stride, h, apart, group->count, sums);
          else
            dot_rows<T, S, 1>(w, group->stride, h, apart, group->count, sums);
          for (int64_t r = 0; r < rows; ++r)
            for (int s = 0; s < S; ++s) {
              sums[r * S + s] += layer.bias < 0 ? T(0) : packed[layer.bias + row + r];
              if (layer.context >= 0) sums[r * S + s] += statics[s * p.statics + layer.context + row + r];
            }
        }
        for (int64_t i = 0; i < rows * S; i += n) store(sums + i, activated<T>(layer.activation, load(sums + i)));
        for (int64_t r = 0; r < rows; ++r)
          for (int s = 0; s < S; ++s) {
            T h = sums[r * S + s];
            if (layer.gate >= 0) h *= statics[s * p.statics + layer.gate + row + r];
            if (layer.residual >= 0) h += scratch[s * apart + p.code[layer.residual + row + r]];
            scratch[s * apart + layer.first + row + r] = h;
          }
      }
    }
    for (int64_t j = level ? p.ends[level - 1] : 0; j < p.ends[level]; ++j) {
      T lane[n] = {};
      for (int s = 0; s < S; ++s) lane[s % n] = z[s * p.inputs + p.order[j]];
      for (int64_t q = 0; q < p.width; ++q)
        for (int s = 0; s < n; ++s) params[q * n + s] = s < S ? scratch[s * apart + p.parameters + j * p.width + q] : T(0);
      store(lane, u.solve(load(lane), params, n, logdet));
      for (int s = 0; s < S; ++s) scratch[s * apart + j] = x[s * p.inputs + p.order[j]] = lane[s % n];
    }
  }
  T lane[n];
  store(lane, logdet.sum);
  for (int s = 0; s < S; ++s) static_cast<T*>(a.logdet)[first + s] = lane[s % n];
}

// ---- the backward's sweep ----

// g[k] += sum over r of w[r][k] d[r], the cotangents d of R units to what they read.
template <class T, int V, int R>
void push_rows(const T* w, int64_t stride, const T* delta, int64_t count, T* g) {
  constexpr int n = lanes<T>();
  Vec<T> d[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) d[r][v] = load(delta + (r * V + v) * n);
  for (int64_t k = 0; k < count; ++k, g += V * n) {
    Vec<T> sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] = load(g + v * n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<T> s = splat(w[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] += s * d[r][v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(g + v * n, sum[v]);
  }
}

template <class T, int V, int R = kPushed>
GENFAST_INLINE void push_any(int64_t rows, const T* w, int64_t stride, const T* delta, int64_t count, T* g) {
  if constexpr (R > 1) {
    if (rows < R) return push_any<T, V, R - 1>(rows, w, stride, delta, count, g);
  }
  push_rows<T, V, R>(w, stride, delta, count, g);
}

template <class T, int V>
void sweep_block(const DegreeOrderedArgs& a, const Program& p, const Univariate<T>& u, int64_t first, int64_t live,
                 T* scratch) {
  constexpr int n = lanes<T>(), wide = V * n;
  T *g = scratch, *statics = g + p.units * wide, *rows = statics + p.statics * wide, *z = rows + p.inputs * wide;
  const T *packed = static_cast<const T*>(a.packed), *units = static_cast<const T*>(a.units) + first;
  T* deltas = static_cast<T*>(a.deltas) + first;
  memset(g, 0, size_t(p.units * wide) * sizeof(T));
  if (p.statics) gather_samples(static_cast<const T*>(a.statics) + first * p.statics, p.statics, live, wide, statics);
  if (a.grad_x) {
    gather_samples(static_cast<const T*>(a.grad_x) + first * p.inputs, p.inputs, live, wide, rows);
    for (int64_t j = 0; j < p.inputs; ++j) memcpy(g + j * wide, rows + p.order[j] * wide, wide * sizeof(T));
  }
  gather_samples(static_cast<const T*>(a.z) + first * p.inputs, p.inputs, live, wide, z);
  T grad_logdet[wide] = {};
  if (a.grad_logdet) memcpy(grad_logdet, static_cast<const T*>(a.grad_logdet) + first, size_t(live) * sizeof(T));
  const Group* group = p.groups + p.group_count;
  for (int64_t level = p.levels - 1; level >= 0; --level) {
    for (int64_t j = level ? p.ends[level - 1] : 0; j < p.ends[level]; ++j) {
      const int64_t at = p.parameters + j * p.width;
      for (int v = 0; v < V; ++v) {
        const Vec<T> dz = u.pull(load(g + j * wide + v * n), load(grad_logdet + v * n), z + p.order[j] * wide + v * n,
                                 load(units + j * a.stride + v * n), units + at * a.stride + v * n, a.stride,
                                 g + at * wide + v * n, wide);
        store(rows + p.order[j] * wide + v * n, dz);
      }
    }
    while (group > p.groups && group[-1].level == level) {
      --group;
      const Layer& layer = p.layers[group->layer];
      alignas(64) T tile[kPushed * wide];
      for (int64_t from = 0; from < group->rows; from += kPushed) {
        const int64_t count = group->rows - from < kPushed ? group->rows - from : kPushed;
        for (int64_t r = 0; r < count; ++r) {
          const int64_t row = group->row + from + r, unit = layer.first + row;
          T* residual = layer.residual < 0 ? nullptr : g + p.code[layer.residual + row] * wide;
          for (int v = 0; v < V; ++v) {
            Vec<T> d = load(g + unit * wide + v * n);
            if (residual) store(residual + v * n, load(residual + v * n) + d);
            if (layer.kind) {
              store(deltas + unit * a.stride + v * n, d);
              const int64_t source = p.code[layer.sources + row];
              if (layer.gate >= 0) d *= load(statics + (layer.gate + row) * wide + v * n);
              T* to = g + source * wide + v * n;
              store(to, load(to) + d * slope<T>(layer.activation, load(units + source * a.stride + v * n)));
            } else {
              d *= slope_of_value<T>(layer.activation, load(units + unit * a.stride + v * n));
              store(deltas + unit * a.stride + v * n, d);
              store(tile + r * wide + v * n, d);
            }
          }
        }
        if (!layer.kind && group->count)
          push_any<T, V>(count, packed + group->weight + from * group->stride, group->stride, tile, group->count,
                         g + layer.source * wide);
      }
    }
  }
  transpose(rows, wide, p.inputs, live, static_cast<T*>(a.grad_z) + first * p.inputs, p.inputs);
}

template <class T>
int64_t scratch_elements(const Program& p, int64_t vectors) {
  return (p.units + p.statics + 2 * p.inputs) * vectors * lanes<T>();
}

// Blocks of samples, as equal as may be, of at most kVectors vectors.
template <class T, class Work>
void over_blocks(const DegreeOrderedArgs& a, const Program& p, const Work& work) {
  const int64_t vectors = (a.n + lanes<T>() - 1) / lanes<T>();
  const int threads = a.n * p.multiplications() < kSerial ? 1 : int(vectors < a.threads ? vectors : a.threads);
  const int64_t blocks = (vectors + kVectors * threads - 1) / (kVectors * threads) * threads;
  static thread_local TeamScratch team;
  const Slices<T> own = team.get<T>(threads, scratch_elements<T>(p, kVectors));
#pragma omp parallel num_threads(threads)
  {
    T* scratch = own.get();
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t from = vectors * block / blocks, to = vectors * (block + 1) / blocks, first = from * lanes<T>();
      const int64_t live = (a.n < to * lanes<T>() ? a.n : to * lanes<T>()) - first;
      if (to > from) work(to - from, first, live, scratch);
    }
  }
}

template <class T>
void run(const DegreeOrderedArgs& a) {
  const Program p(a.code);
  const Univariate<T> u = univariate<T>(a);
  if (!a.units && a.n <= lanes<T>() / 2) {
    const int64_t tasks = (a.n + 3) / 4;
    const int threads = a.n * p.multiplications() < kSerial ? 1 : int(tasks < a.threads ? tasks : a.threads);
    static thread_local TeamScratch team;
    const Slices<T> own = team.get<T>(threads, 4 * (p.units + 16) + p.width * lanes<T>());
#pragma omp parallel num_threads(threads)
    {
      T* scratch = own.get();
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = a.n * task / tasks, count = a.n * (task + 1) / tasks - first;
        if (count == 4)
          forward_few<T, 4>(a, p, u, first, scratch);
        else if (count == 3)
          forward_few<T, 3>(a, p, u, first, scratch);
        else if (count == 2)
          forward_few<T, 2>(a, p, u, first, scratch);
        else
          forward_few<T, 1>(a, p, u, first, scratch);
      }
    }
    return;
  }
  const std::vector<Ahead> ahead = look_ahead(p);
  over_blocks<T>(a, p, [&](int64_t vectors, int64_t first, int64_t live, T* scratch) {
    if (vectors == 3)
      forward_block<T, 3>(a, p, ahead.data(), u, first, live, scratch);
    else if (vectors == 2)
      forward_block<T, 2>(a, p, ahead.data(), u, first, live, scratch);
    else
      forward_block<T, 1>(a, p, ahead.data(), u, first, live, scratch);
  });
}

template <class T>
void sweep(const DegreeOrderedArgs& a) {
  const Program p(a.code);
  const Univariate<T> u = univariate<T>(a);
  over_blocks<T>(a, p, [&](int64_t vectors, int64_t first, int64_t live, T* scratch) {
    if (vectors == 3)
      sweep_block<T, 3>(a, p, u, first, live, scratch);
    else if (vectors == 2)
      sweep_block<T, 2>(a, p, u, first, live, scratch);
    else
      sweep_block<T, 1>(a, p, u, first, live, scratch);
  });
}

// ---- the weights' gradient: for each group of a product, its cotangents times the units that it read, over the samples ----

template <class T>
struct Add {  // a tile that adds to what `out` holds, of which the last vectors may lie beyond the row
  T* out;
  int64_t stride, width;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v)
        acc[m][v] = (v + 1) * lanes<T>() <= width ? load(out + m * stride + v * lanes<T>()) : Vec<T>{};
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v)
        if ((v + 1) * lanes<T>() <= width) store(out + m * stride + v * lanes<T>(), acc[m][v]);
  }
};

template <class T>
void weights(const DegreeOrderedArgs& a) {
  constexpr int64_t block = block_columns<T>();
  const Program p(a.code);
  const T *units = static_cast<const T*>(a.units), *deltas = static_cast<const T*>(a.deltas);
  T* out = static_cast<T*>(a.grad_packed);
  int64_t panels = 0;
  for (int64_t l = 0; l < p.layer_count; ++l)
    if (!p.layers[l].kind) panels += (p.layers[l].source_units + block - 1) / block;
  const int threads = a.n * p.multiplications() < kSerial ? 1 : a.threads;
  memset(out, 0, size_t(p.packed) * sizeof(T));
  static thread_local TeamScratch team;
  const Slices<T> own = team.get<T>(threads, kInner * block);
#pragma omp parallel num_threads(threads)
  {
    T* panel = own.get();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels + p.layer_count; ++task) {
      if (task >= panels) {  // a bias: the sum of the cotangents
        const Layer& layer = p.layers[task - panels];
        if (layer.kind || layer.bias < 0) continue;
        for (int64_t r = 0; r < layer.units; ++r) {
          const T* d = deltas + (layer.first + r) * a.stride;
          Vec<T> total = {};
          int64_t i = 0;
          for (; i + lanes<T>() <= a.n; i += lanes<T>()) total += load(d + i);
          total += load_part(d + i, int(a.n - i));
          out[layer.bias + r] = sum<T>(total);
        }
        continue;
      }
      int64_t l = 0, at = task;
      for (;; ++l) {
        if (p.layers[l].kind) continue;
        const int64_t here = (p.layers[l].source_units + block - 1) / block;
        if (at < here) break;
        at -= here;
      }
      const Layer& layer = p.layers[l];
      const int64_t column = at * block, live = std::min(block, layer.source_units - column);
      for (int64_t k0 = 0; k0 < a.n; k0 += kInner) {
        const int64_t count = std::min(kInner, a.n - k0);
        const Strided<T> read{units + layer.source * a.stride, 1, a.stride};
        pack_columns(read, k0, count, column, layer.source_units, padded<T>(live), panel);
        const Segment segment{0, 0, count};
        for (int64_t g = 0; g < p.group_count; ++g) {
          const Group& group = p.groups[g];
          if (group.layer != l || group.count <= column) continue;
          const int64_t width = std::min(padded<T>(live), group.stride - column);
          const int64_t tiles_ = tiles(group.rows);
          for (int64_t t = 0; t < tiles_; ++t) {
            const int64_t row = tile_start(group.rows, t), height = tile_start(group.rows, t + 1) - row;
            const Add<T> tile{out + group.weight + row * group.stride + column, group.stride, width};
            const T* left = deltas + (layer.first + group.row + row) * a.stride + k0;
            run<T>(height, padded<T>(live) / lanes<T>(), tile, left, a.stride, 1, &segment, 1, panel, padded<T>(live));
          }
          for (int64_t r = 0; r < group.rows; ++r) {  // what fills a row up to whole vectors is no weight
            T* row = out + group.weight + r * group.stride;
            for (int64_t k = std::max(column, group.count); k < column + width; ++k) row[k] = T(0);
          }
        }
      }
    }
  }
}

}  // namespace

GENFAST_KERNEL(autoregressive_inverse, DegreeOrderedArgs, run<T>(a))
GENFAST_KERNEL(autoregressive_inverse_sweep, DegreeOrderedArgs, sweep<T>(a))
GENFAST_KERNEL(autoregressive_inverse_weights, DegreeOrderedArgs, weights<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
