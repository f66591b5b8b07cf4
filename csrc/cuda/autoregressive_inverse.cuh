// The body of the degree-ordered engine (autoregressive_inverse.cu), written once for a GPU and for the test that emulates it.
//
// A Team is what runs a group of samples together: `rank` of `size` threads, in warps of 32; `sync` waits for all of them,
// `exchange(x, mask)` gives the x of the thread whose lane differs by `mask`.
#pragma once

#include "kernels.h"
#include "portable.cuh"

namespace genfast {
namespace cuda {

// As genfast/ops/_cuda_engine_items.py writes them.
enum LevelKind : int32_t { kProduct, kPoint, kSolve, kSweep, kParams };
enum Activation : int32_t { kNone, kRelu, kLeakyRelu, kElu, kTanh, kSigmoid, kSoftplus, kSilu, kGelu };
enum Transform : int32_t { kExp, kSoftclamp, kSigmoid2, kSoftplusScale, kAdditive, kBernoulli, kSpline };

enum SweepFlags : int32_t { kAccumulates = 1, kFirstSloped = 2, kSecondSloped = 4 };

// Units of one layer that are computed together: rows [out, out + rows) of the state are
// sum over k < count of W[r][k] state[source + k], with what the layer adds. Offsets and columns are -1 where there is none.
struct LevelItem {
  int32_t kind, activation;
  int32_t first, rows, count;           // first: unit of the layer; of kSolve and kParams: place of the input
  int32_t source, out, weight, stride;  // weight: in units of kWeightUnit floats
  int32_t bias;                         // offset in the weights, by unit of the layer
  int32_t context, gate;                // columns of statics; kSweep: gate >= 0 multiplies by the unit's slope
  int32_t sources, residual;            // offsets in tables of rows by unit; kSweep: links, -1 where a unit has none
  int32_t flags, level;                 // kSweep: which links are multiplied by the slopes of the units they lead to
};
constexpr int32_t kItemWords = sizeof(LevelItem) / sizeof(int32_t), kRing = 4;

constexpr int64_t kWeightUnit = 16;
constexpr int32_t kLanes = 32, kMostWarps = 16;
constexpr int32_t kAhead = 16;  // weights that a thread loads before it needs them

// Floats of a group's memory: the items at hand; the rows, what a product may read past the last, the parts that warps share.
GENFAST_ANYWHERE constexpr int64_t state_floats(int64_t rows, int64_t group) { 
  return kRing * kItemWords + (rows + kLanes + kMostWarps) * group;
}

// Samples of a block: as few as let every block of the batch run at once, as many as shared memory holds; 0: not even one.
inline int64_t level_group(int64_t n, int64_t rows, int64_t processors, int64_t bytes) {
  int64_t group = 0;
  for (int64_t wider = 1; wider <= 32; wider *= 2) {
    if (state_floats(rows, wider) * int64_t(sizeof(float)) > bytes) break;
    group = wider;
    if ((n + group - 1) / group <= processors) break;
  }
  return group;
}

template <int count>
struct alignas(count * sizeof(float)) Pack {
  float v[count];
};

GENFAST_DEVICE float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

GENFAST_DEVICE float activated(int32_t kind, float x) {
  switch (kind) {
    case kRelu: return x < 0.f ? 0.f : x;  // a NaN stays one
    case kLeakyRelu: return x < 0.f ? 0.01f * x : x;
    case kElu: return elu(x);
    case kTanh: return tanhf(x);
    case kSigmoid: return logistic(x);
    case kSoftplus: return softplus(x);
    case kSilu: return x * logistic(x);
    case kGelu: return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
    default: return x;
  }
}

// The parameters of one input of one sample, `stride` apart; they may be overwritten.
struct Params {
  float* at;
  int32_t stride;
  GENFAST_DEVICE float& operator[](int32_t p) const { return at[p * stride]; }
};

// x = (z - t)/s, or s z + t, and log |dx/dz|.
GENFAST_DEVICE float solve_affine(const DegreeOrderedArgs& a, float z, Params params, float& logdet) {
  const bool flip = a.options[0] != 0.f, scale_first = a.options[1] != 0.f;
  const float constant = a.options[2];
  if (a.transform == kAdditive) {
    logdet = 0.f;
    return flip ? z + params[0] : z - params[0];
  }
  const float raw = params[scale_first ? 0 : 1], t = params[scale_first ? 1 : 0];
  float s, log_s;
  if (a.transform == kSigmoid2 || a.transform == kSoftplusScale) {
    s = (a.transform == kSigmoid2 ? logistic(raw + 2.f) : softplus(raw)) + constant;
    log_s = logf(s);
  } else {
    log_s = a.transform == kSoftclamp ? raw / (1.f + fabsf(raw / constant)) : raw;
    s = expf(log_s);
  }
  logdet = flip ? log_s : -log_s;
  return flip ? s * z + t : (z - t) / s;
}

GENFAST_DEVICE float softclip(float x, float limit) { return x / (1.f + fabsf(x / limit)); }

// Where softmaxed logits divide [low, low + span]: the bin of x, or bin k where that is given, its start and its size.
struct Bins {
  Params logits;
  int32_t count;
  float low, span, minimum, scale, limit;  // limit: of zuko's logits, 0 without
  bool left;                               // a knot belongs to the bin on its left

  GENFAST_DEVICE void locate(float x, int32_t& k, float& start, float& size) const {
    float most = -INFINITY, sum = 0.f;
    GENFAST_UNROLL_BY(1)
    for (int32_t j = 0; j < count; ++j) {
      float l = logits[j] * scale;
      if (limit != 0.f) l = softclip(l, limit);
      logits[j] = l;
      most = fmaxf(most, l);
    }
    GENFAST_UNROLL_BY(1)
    for (int32_t j = 0; j < count; ++j) sum += logits[j] = expf(logits[j] - most);
    const float share = 1.f / sum, rest = 1.f - float(count) * minimum;
    const int32_t given = k;
    float at = low;
    GENFAST_UNROLL_BY(1)
    for (int32_t j = 0;; ++j) {
      start = at, size = span * (minimum + rest * (logits[j] * share));
      at += size;
      k = j;
      if (j == count - 1 || (given >= 0 ? j == given : left ? !(x > at) : !(x >= at))) break;
    }
  }
};

GENFAST_DEVICE float between(float x) { return x < 0.f ? 0.f : x > 1.f ? 1.f : x; }

// The rational quadratic spline (1906.04032 eq. 4 to 8) of genfast/reference/spline.py, or its inverse.
GENFAST_DEVICE float solve_spline(const DegreeOrderedArgs& a, float x, Params params, float& logdet) {
  const float *o = a.options, left = o[0], right = o[1], bottom = o[2], top = o[3], slope = o[7];
  const bool inverse = a.inverse, zuko = a.zuko;
  const float low = inverse ? bottom : left, high = inverse ? top : right;
  if (zuko ? x <= low || x > high : x < low || x > high) {
    logdet = a.tails == 1 ? NAN : 0.f;
    return a.tails == 1 ? NAN : x;
  }
  const float log_slope = zuko ? logf(slope) : 0.f;
  const int32_t bins = a.bins;
  const Bins across{params, bins, left, right - left, zuko ? 0.f : o[4], o[8], log_slope / 2.f, zuko};
  const Bins up{{&params[bins], params.stride}, bins, bottom, top - bottom, zuko ? 0.f : o[5], o[8], log_slope / 2.f, zuko};
  int32_t k = -1;
  float x0, w, y0, h;
  if (inverse) {
    up.locate(x, k, y0, h);
    across.locate(x, k, x0, w);
  } else {
    across.locate(x, k, x0, w);
    up.locate(x, k, y0, h);
  }
  const int32_t ends = a.tails == 0 ? 1 : 0;  // knots at each end whose derivative is one
  float d[2];
  GENFAST_UNROLL
  for (int32_t j = 0; j < 2; ++j) {
    int32_t knot = k + j - ends;
    if (a.tails == 2 && knot == bins) knot = 0;
    if (a.tails == 0 && (knot < 0 || knot == bins - 1)) {
      d[j] = 1.f;
    } else {
      const float raw = params[2 * bins + knot];
      d[j] = zuko ? expf(softclip(raw, log_slope)) : o[6] + softplus(raw);
    }
  }
  const float s = h / w, bend = d[0] + d[1] - 2.f * s;
  float theta, part;
  if (inverse) {
    part = between((x - y0) / h);
    const float qa = part * bend + s - d[0], qb = d[0] - part * bend;
    theta = between(2.f * s * part / (qb + sqrtf(qb * qb + 4.f * qa * s * part)));
  } else {
    theta = between((x - x0) / w);
    const float t = theta * (1.f - theta);
    part = (s * theta * theta + d[0] * t) / (s + bend * t);
  }
  const float other = 1.f - theta, t = theta * other, e = s + bend * t;
  const float rise = s * s * (d[1] * theta * theta + 2.f * s * t + d[0] * other * other);
  logdet = logf(rise / (e * e));
  if (inverse) logdet = -logdet;
  return inverse ? x0 + w * theta : y0 + h * part;
}

// M samples a lane and S lanes side by side make a group of M S samples; the other lanes of a warp share a product's terms.
// The state is [row][sample]; a row is a unit's value, or in the sweep its cotangent.
template <int M, int S, bool kBackward, class Team>
class DegreeOrdered {
 public:
  static constexpr int32_t kGroup = M * S, kShare = kLanes / S;

  GENFAST_DEVICE DegreeOrdered(const Team& team, const DegreeOrderedArgs& a, float* memory, int64_t first)
      : team_(team), a_(a), ring_(reinterpret_cast<int32_t*>(memory)), state_(memory + kRing * kItemWords), first_(first),
        warps_(team.size / kLanes), lane_(team.rank % kLanes), slice_(lane_ / S), column_(lane_ % S * M) {}

  GENFAST_DEVICE void run() {
    begin();
    float weights[kAhead];
    fetch(item(0), weights);
    int32_t word = word_of(2);
    GENFAST_UNROLL_BY(1)
    for (int32_t i = 0; i < a_.items; ++i) {
      // Asked for before the wait, since they depend on no result: the way to the second cache is as long as the product.
      float ahead[kAhead];
      if (i + 1 < a_.items) fetch(item(i + 1), ahead);
      if (team_.rank < kItemWords) ring_[(i + 2) % kRing * kItemWords + team_.rank] = word;
      word = word_of(i + 3);
      team_.sync();
      execute(item(i), weights);
      GENFAST_UNROLL
      for (int c = 0; c < kAhead; ++c) weights[c] = ahead[c];
    }
    team_.sync();
    end();
  }

 private:
  const Team team_;
  const DegreeOrderedArgs& a_;
  int32_t* const ring_;
  float* const state_;
  const int64_t first_;
  const int32_t warps_, lane_, slice_, column_;

  GENFAST_DEVICE int32_t word_of(int32_t i) const {
    return team_.rank < kItemWords && i < a_.items ? constant_at(a_.item_list + int64_t(i) * kItemWords + team_.rank) : 0;
  }

  GENFAST_DEVICE const LevelItem& item(int32_t i) const {
    return *reinterpret_cast<const LevelItem*>(ring_ + i % kRing * kItemWords);
  }

  GENFAST_DEVICE float* row(int32_t r) const { return state_ + int64_t(r) * kGroup; }

  GENFAST_DEVICE bool exists(int32_t s) const { return first_ + s < a_.n; }

  // Zero: rows that are not yet known meet weights that are zero.
  GENFAST_DEVICE void begin() {
    GENFAST_UNROLL_BY(1)
    for (int64_t i = team_.rank; i < (a_.rows + kLanes) * kGroup; i += team_.size) state_[i] = 0.f;
    if (team_.rank < kItemWords)
      for (int32_t i = 0; i < 2; ++i) ring_[i * kItemWords + team_.rank] = word_of(i);
    team_.sync();
    GENFAST_UNROLL_BY(1)
    for (int32_t i = team_.rank; i < a_.inputs * kGroup; i += team_.size) {
      const int32_t s = i / a_.inputs, place = i - s * a_.inputs;
      if (exists(s)) row(a_.given + place)[s] = a_.z[(first_ + s) * a_.inputs + constant_at(a_.order + place)];
    }
  }

  GENFAST_DEVICE void end() {
    GENFAST_UNROLL_BY(1)
    for (int32_t s = team_.rank; s < kGroup; s += team_.size) {
      if (!exists(s)) break;
      double sum = 0;
      for (int32_t i = 0; i < a_.inputs; ++i) {
        const float value = row(a_.given + i)[s];
        if (kBackward)
          a_.kept[(first_ + s) * a_.units + i] = value;
        else
          sum += double(value);
      }
      if (!kBackward) a_.logdet[first_ + s] = float(sum);
    }
  }

  // How warps divide an item's rows: four a warp where there are many; where there are few, `split` warps share one.
  struct Division {
    int32_t tiles, split, tile, part;
    bool wide;
  };

  GENFAST_DEVICE Division division(const LevelItem& item) const {
    Division d;
    d.wide = item.rows > 2 * warps_;
    d.tiles = d.wide ? (item.rows + 3) / 4 : item.rows;
    d.split = 1;
    while (!d.wide && d.tiles * d.split * 2 <= warps_ && item.count > d.split * kAhead * kShare) d.split *= 2;
    const int32_t warp = team_.rank / kLanes;
    d.tile = warp / d.split, d.part = warp - d.tile * d.split;
    return d;
  }

  // Which term a thread's c-th weight of a row belongs to. With few lanes to a row, four at a time, as one load.
  static constexpr bool kVector = kShare <= 4;
  GENFAST_DEVICE int32_t term(int32_t c) const {
    return kVector ? c / 4 * (4 * kShare) + 4 * slice_ + c % 4 : c * kShare + slice_;
  }

  template <int U>
  GENFAST_DEVICE void load(const LevelItem& item, int32_t tile, int32_t k, float (&w)[kAhead]) const {
    constexpr int kTerms = kAhead / U;
    GENFAST_UNROLL
    for (int u = 0; u < U; ++u) {
      const int32_t r = smaller(tile * U + u, item.rows - 1);
      const float* at = a_.weights + (int64_t(item.weight) * kWeightUnit + int64_t(r) * item.stride + k);
      if (kVector) {
        GENFAST_UNROLL
        for (int c = 0; c < kTerms; c += 4) {
          const bool live = k + term(c) < item.count;
          const float4 four = live ? constant_at(reinterpret_cast<const float4*>(at + term(c))) : float4{0.f, 0.f, 0.f, 0.f};
          w[u * kTerms + c] = four.x, w[u * kTerms + c + 1] = four.y;
          w[u * kTerms + c + 2] = four.z, w[u * kTerms + c + 3] = four.w;
        }
      } else {
        GENFAST_UNROLL
        for (int c = 0; c < kTerms; ++c) w[u * kTerms + c] = k + term(c) < item.count ? constant_at(at + term(c)) : 0.f;
      }
    }
  }

  // The first weights that this thread will need for an item.
  GENFAST_DEVICE void fetch(const LevelItem& item, float (&w)[kAhead]) const {
    const Division d = division(item);
    if (item.count == 0 || d.tile >= d.tiles) return;
    if (d.wide)
      load<4>(item, d.tile, 0, w);
    else
      load<1>(item, d.tile, d.part * kAhead * kShare, w);
  }

  GENFAST_DEVICE void execute(const LevelItem& item, float (&w)[kAhead]) const {
    if (item.kind == kProduct || item.kind == kSweep) {
      const Division d = division(item);
      if (d.wide)
        product<4>(item, d, w);
      else
        product<1>(item, d, w);
    } else if (kBackward) {
      params(item);
    } else if (item.kind == kPoint) {
      points(item);
    } else {
      solve(item);
    }
  }

  template <int U>
  GENFAST_DEVICE void product(const LevelItem& item, const Division& d, float (&w)[kAhead]) const {
    constexpr int kTerms = kAhead / U, kChunk = kTerms * kShare;
    constexpr int kSums = U * M, kKept = kSums > kShare ? kSums / kShare : 1;
    const int32_t apart = warps_ / d.split;
    int32_t own = 0;  // the first of the sums that this lane will hold
    GENFAST_UNROLL
    for (int mask = 1; mask < kShare; mask *= 2)
      if (slice_ & mask) own += kSums / 2 / mask;
    GENFAST_UNROLL_BY(1)
    for (int32_t tile = d.tile; tile < d.tiles; tile += apart) {
      int32_t k = d.part * kChunk;
      if (tile != d.tile) load<U>(item, tile, k, w);
      float operands[kKept];
      GENFAST_UNROLL
      for (int i = 0; i < kKept; ++i)
        operands[i] = operand(item, smaller(tile * U + (own + i) / M, item.rows - 1), column_ + (own + i) % M);
      float sum[kSums] = {};
      GENFAST_UNROLL_BY(1)
      for (; k < item.count; k += d.split * kChunk) {
        float ahead[kAhead];
        const bool more = k + d.split * kChunk < item.count;
        if (U == 1 && more) load<U>(item, tile, k + d.split * kChunk, ahead);
        const float* values = row(item.source + k) + column_;
        GENFAST_UNROLL
        for (int c = 0; c < kTerms; ++c) {
          if (k + (kVector ? c / 4 * (4 * kShare) : c * kShare) >= item.count) break;
          const Pack<M> v = *reinterpret_cast<const Pack<M>*>(values + term(c) * kGroup);
          GENFAST_UNROLL
          for (int u = 0; u < U; ++u) {
            GENFAST_UNROLL
            for (int m = 0; m < M; ++m) sum[u * M + m] += w[u * kTerms + c] * v.v[m];
          }
        }
        if (U > 1 && more) load<U>(item, tile, k + d.split * kChunk, w);  // other warps' work hides the way
        GENFAST_UNROLL
        for (int c = 0; c < kAhead; ++c)
          if (U == 1 && more) w[c] = ahead[c];
      }
      // Halves change hands until each lane holds the sums of its own; then lanes that hold the same add up.
      GENFAST_UNROLL
      for (int mask = 1; mask < kShare; mask *= 2) {
        const int half = kSums / 2 / mask;
        const bool upper = slice_ & mask;
        if (half) {
          GENFAST_UNROLL
          for (int i = 0; i < half; ++i) {
            const float given = upper ? sum[i] : sum[i + half], kept = upper ? sum[i + half] : sum[i];
            sum[i] = kept + team_.exchange(given, mask * S);
          }
        } else {
          sum[0] += team_.exchange(sum[0], mask * S);
        }
      }
      if (slice_ >= kSums) continue;
      GENFAST_UNROLL
      for (int i = 0; i < kKept; ++i) {
        const int32_t r = tile * U + (own + i) / M, s = column_ + (own + i) % M;
        if (r >= item.rows) break;
        if (d.split > 1)
          row(a_.rows + kLanes + d.part * d.tiles + tile)[s] = sum[i];
        else
          finish(item, r, s, operands[i], sum[i]);
      }
    }
    if (d.split > 1) {
      team_.sync();
      GENFAST_UNROLL_BY(1)
      for (int32_t i = team_.rank; i < item.rows * kGroup; i += team_.size) {
        const int32_t r = i / kGroup, s = i % kGroup;
        float total = 0.f;
        for (int32_t part = 0; part < d.split; ++part) total += row(a_.rows + kLanes + part * d.tiles + r)[s];
        finish(item, r, s, operand(item, r, s), total);
      }
    }
  }

  // What a unit's sum is joined with that is known before: bias and context; in the sweep the unit's slope.
  GENFAST_DEVICE float operand(const LevelItem& item, int32_t r, int32_t s) const {
    const int32_t unit = item.first + r;
    const int64_t n = exists(s) ? first_ + s : a_.n - 1;
    if (kBackward) return item.gate >= 0 ? constant_at(a_.slopes + n * a_.units + item.out + r) : 1.f;
    float value = item.bias >= 0 ? constant_at(a_.weights + item.bias + unit) : 0.f;
    if (item.context >= 0) value += constant_at(a_.statics + n * a_.statics_width + item.context + unit);
    return value;
  }

  GENFAST_DEVICE void finish(const LevelItem& item, int32_t r, int32_t s, float operand,
                             float value) const {
    const int32_t unit = item.first + r;
    if (kBackward) {
      const int64_t n = exists(s) ? first_ + s : a_.n - 1;
      const float* slopes = a_.slopes + n * a_.units;
      if (item.flags & kAccumulates) value += row(item.out + r)[s];
      if (item.sources >= 0) value += linked(item.sources + unit, item.flags & kFirstSloped, slopes, s);
      if (item.residual >= 0) value += linked(item.residual + unit, item.flags & kSecondSloped, slopes, s);
      value *= operand;
      if (exists(s)) a_.kept[n * a_.units + item.out + r] = value;
    } else {
      value = activated(item.activation, value + operand);
      if (item.residual >= 0) value += row(constant_at(a_.tables + item.residual + unit))[s];
    }
    row(item.out + r)[s] = value;
  }

  GENFAST_DEVICE float linked(int32_t table, int32_t sloped, const float* slopes, int32_t s) const {
    const int32_t from = constant_at(a_.tables + table);
    if (from < 0) return 0.f;
    return row(from)[s] * (sloped ? constant_at(slopes + from) : 1.f);
  }

  GENFAST_DEVICE void points(const LevelItem& item) const {
    GENFAST_UNROLL_BY(1)
    for (int32_t i = team_.rank; i < item.rows * kGroup; i += team_.size) {
      const int32_t r = i / kGroup, s = i % kGroup, unit = item.first + r;
      const int64_t n = exists(s) ? first_ + s : a_.n - 1;
      float value = activated(item.activation, row(constant_at(a_.tables + item.sources + unit))[s]);
      if (item.gate >= 0) value *= constant_at(a_.statics + n * a_.statics_width + item.gate + unit);
      if (item.residual >= 0) value += row(constant_at(a_.tables + item.residual + unit))[s];
      row(item.out + r)[s] = value;
    }
  }

  // Inputs [first, first + rows) of the sorted order, whose parameters begin at row `source`; their logdets take z's place.
  GENFAST_DEVICE void solve(const LevelItem& item) const {
    GENFAST_UNROLL_BY(1)
    for (int32_t i = team_.rank; i < item.rows * kGroup; i += team_.size) {
      const int32_t r = i / kGroup, s = i % kGroup, place = item.first + r;
      const Params params{row(item.source + r * a_.width) + s, kGroup};
      const float z = row(a_.given + place)[s];
      float logdet = 0.f, x;
      if (a_.transform == kBernoulli) {
        const float chance = logistic(params[0]);
        x = z < chance ? 1.f : chance - chance;  // 0, or NaN of NaN
      } else {
        x = a_.transform == kSpline ? solve_spline(a_, z, params, logdet) : solve_affine(a_, z, params, logdet);
      }
      row(place)[s] = x;
      row(a_.given + place)[s] = logdet;
      if (exists(s)) a_.x[(first_ + s) * a_.inputs + constant_at(a_.order + place)] = x;
    }
  }

  // The cotangents of the inputs' parameters, of the inputs' own: F (grad_x + those) + C. They lie at row `out`.
  GENFAST_DEVICE void params(const LevelItem& item) const {
    const int32_t each = item.rows * a_.width;
    GENFAST_UNROLL_BY(1)
    for (int32_t i = team_.rank; i < each * kGroup; i += team_.size) {
      const int32_t s = i / each, p = i - s * each, r = p / a_.width;
      if (!exists(s)) break;
      const int64_t n = first_ + s, at = n * a_.inputs * a_.width + int64_t(item.first) * a_.width + p;
      float value = a_.by_value[at] * row(item.first + r)[s] + a_.constant[at];
      if (item.gate >= 0) value *= constant_at(a_.slopes + n * a_.units + item.out + p);
      row(item.out + p)[s] = value;
      a_.kept[n * a_.units + item.out + p] = value;
    }
  }
};

}  // namespace cuda
}  // namespace genfast
