// The neural autoregressive distribution estimator (Larochelle and Murray 2011; Uria et al. 1306.0186), over d = 1 .. D:
//   a_1 = c;  h_d = act(rho_d a_d);  p_d = b_d + V_d h_d;  a_{d+1} = a_d + W_d x_d
//   backward, from d = D and e_{D+1} = 0, g the cotangent of p:  dx_d = <W_d, e_{d+1}>,  dW_d = sum_n x_d e_{d+1},
//   dV_d = sum_n g_d h_d,  z = act'(rho_d a_d) V_d^T g_d,  drho_d = sum_n <z, a_d>,  e_d = e_{d+1} + rho_d z,  dc = sum_n e_1
//
// x (N, D), W (D, H), V (D, P, H), p (N, D, P). O(N D H) time, O(H) memory a sample: no array of N x D x H.
// Forward and sampling: lanes over hidden units, threads over blocks of samples, weights streamed once a block.
// Backward: lanes and threads over hidden units, of which everything but dx and drho is independent, so that the weights'
// gradients have one owner each and need no partial sums. a comes back as it was, swept again over 32 steps from a checkpoint
// of the block's own first sweep. Subtracting W_d x_d instead would do for small x (measured over 12288 steps: at most 1.5 times
// the error in the gradients), but behind one x_d of 1e4 the bits of the earlier a are gone.
// Where x_d = 0 and there is no rho, a and h stay what they are: binary data pay an activation for their ones alone.
// 2 P + 2 FLOPs and an activation (some 20 instructions) a hidden unit and step: bound by arithmetic.
#include "dtype_switch.h"
#include "gemm.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kCheckpoint = 32;  // steps
constexpr int64_t kSamples = 32;     // of a block of the backward, whose states lie in the first cache
constexpr int64_t kSerial = 1 << 14;

// act(z), and its derivative from what the function has at hand.
template <class T, int kAct, bool kSlope>
GENFAST_INLINE Vec<T> activate(Vec<T> z, Vec<T>& slope) {
  if (kAct == NadeArgs::kRelu) {
    if (kSlope) slope = z > T(0) ? splat(T(1)) : Vec<T>{};
    return z < T(0) ? Vec<T>{} : z;
  }
  if (kAct == NadeArgs::kTanh) {
    const Vec<T> y = tanh<T>(z);
    if (kSlope) slope = T(1) - y * y;
    return y;
  }
  Vec<T> e;
  const Vec<T> s = logistic<T>(z, e);
  if (kSlope) slope = s * (e * s);
  return s;
}

// The last, partial vector of a row: read whole and cut where the tensor goes on behind it.
template <class T>
struct Tail {
  int live;
  Mask<T> mask;

  explicit Tail(int64_t size) : live(int(size % lanes<T>())) {
    for (int i = 0; i < lanes<T>(); ++i) mask[i] = i < live ? -1 : 0;
  }
  GENFAST_INLINE_MEMBER Vec<T> operator()(const T* p, const T* end) const {
    return p + lanes<T>() <= end ? from_bits<T>(bits<T>(load(p)) & mask) : load_part(p, live);
  }
};

// Lane i: the sum of vector i.
template <class T>
GENFAST_INLINE Vec<T> lane_sums(const T* from) {
  constexpr int n = lanes<T>();
#ifdef GENFAST_SHUFFLE
  const typename Counted<n>::type lane{};
  Vec<T> v[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) v[i] = load(from + i * n);
#pragma GCC unroll 4
  for (int half = n / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) v[i] = interleave_low(v[i], v[i + half], lane) + interleave_high(v[i], v[i + half], lane);
  return v[0];
#else
  T total[n];
  for (int i = 0; i < n; ++i) total[i] = sum<T>(load(from + i * n));
  return load(total);
#endif
}

// ---- forward and sampling ----

// Products of NT rows of h with PT rows of V, not yet summed over lanes, to partial[p][sample].
template <class T, int NT, int PT>
GENFAST_INLINE void dots(const T* h, int64_t row, const T* v, int64_t ld, const Tail<T>& tail, const T* end, T* partial) {
  constexpr int n = lanes<T>();
  Vec<T> acc[NT][PT] = {};
  int64_t k = 0;
  for (; k + n <= ld; k += n) {
    Vec<T> x[NT];
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) x[i] = load(h + i * row + k);
#pragma GCC unroll 4
    for (int j = 0; j < PT; ++j) {
      const Vec<T> y = load(v + j * ld + k);
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[i][j] += x[i] * y;
    }
  }
  if (tail.live) {
#pragma GCC unroll 4
    for (int j = 0; j < PT; ++j) {
      const Vec<T> y = tail(v + j * ld + k, end);
#pragma GCC unroll 4
      for (int i = 0; i < NT; ++i) acc[i][j] += load(h + i * row + k) * y;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < PT; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < NT; ++i) store(partial + (j * n + i) * n, acc[i][j]);
}

template <class T, int NT>
void dots_of(const T* h, int64_t row, const T* v, int64_t p, int64_t ld, const Tail<T>& tail, const T* end, T* partial) {
  constexpr int n = lanes<T>();
  int64_t j = 0;
  for (; j + 4 <= p; j += 4) dots<T, NT, 4>(h, row, v + j * ld, ld, tail, end, partial + j * n * n);
  for (; j < p; ++j) dots<T, NT, 1>(h, row, v + j * ld, ld, tail, end, partial + j * n * n);
}

// The inverse of the normal distribution function (Wichura 1988, AS 241, 1e-16).
double normal_quantile(double u) {
  const double q = u - 0.5;
  if (__builtin_fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((2509.0809287301226727 * r + 33430.575583588128105) * r + 67265.770927008700853) * r + 45921.953931549871457) * r +
               13731.693765509461125) * r + 1971.5909503065514427) * r + 133.14166789178437745) * r + 3.387132872796366608) /
           (((((((5226.495278852545925 * r + 28729.085735721942674) * r + 39307.89580009271061) * r + 21213.794301586595867) * r +
               5394.1960214247511077) * r + 687.1870074920579083) * r + 42.313330701600911252) * r + 1.0);
  }
  double r = __builtin_sqrt(-__builtin_log(q < 0 ? u : 1 - u)), y;
  if (r <= 5) {
    r -= 1.6;
    y = (((((((7.7454501427834140764e-4 * r + 0.0227238449892691845833) * r + 0.24178072517745061177) * r +
             1.27045825245236838258) * r + 3.64784832476320460504) * r + 5.7694972214606914055) * r + 4.6303378461565452959) * r +
         1.42343711074968357734) /
        (((((((1.05075007164441684324e-9 * r + 5.475938084995344946e-4) * r + 0.0151986665636164571966) * r +
             0.14810397642748007459) * r + 0.68976733498510000455) * r + 1.6763848301838038494) * r + 2.05319162663775882187) * r +
         1.0);
  } else {
    r -= 5;
    y = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 0.0012426609473880784386) * r +
             0.026532189526576123093) * r + 0.29656057182850489123) * r + 1.7848265399172913358) * r + 5.4637849111641143699) * r +
         6.6579046435011037772) /
        (((((((2.04426310338993978564e-15 * r + 1.4215117583164458887e-7) * r + 1.8463183175100546818e-5) * r +
             7.868691311456132591e-4) * r + 0.0148753612908506148525) * r + 0.13692988092273580531) * r + 0.59983220655588793769) * r +
         1.0);
  }
  return q < 0 ? -y : y;
}

// The smallest index whose cumulative probability exceeds u, as a number; lanes are samples. NaN where the logits have no sum.
template <class T>
Vec<T> choose_level(const T* logits, int64_t count, Vec<T> u) {
  constexpr int n = lanes<T>();
  Vec<T> most = load(logits), total = splat(T(0));
  for (int64_t k = 1; k < count; ++k) {
    const Vec<T> z = load(logits + k * n);
    most = z > most ? z : most;
  }
  for (int64_t k = 0; k < count; ++k) total += exp<T>(load(logits + k * n) - most);
  const Vec<T> threshold = u * total;
  Vec<T> reached = splat(T(0)), level = splat(T(0));
  for (int64_t k = 0; k + 1 < count; ++k) {
    reached += exp<T>(load(logits + k * n) - most);
    level += reached <= threshold ? splat(T(1)) : Vec<T>{};
  }
  return total == total ? level : total;
}

// x from the parameters (P vectors, lanes are samples) and `per` uniforms a sample.
template <class T>
Vec<T> draw(int kind, const T* params, int64_t p, const T* uniforms, int64_t stride, int64_t count) {
  constexpr int n = lanes<T>();
  T lane[n] = {}, other[n] = {};
  for (int64_t i = 0; i < count; ++i) lane[i] = uniforms[i * stride];
  const Vec<T> u = load(lane);
  if (kind == NadeArgs::kBernoulli) {
    Vec<T> e;
    const Vec<T> chance = logistic<T>(load(params), e);
    return chance == chance ? (u < chance ? splat(T(1)) : Vec<T>{}) : chance;
  }
  if (kind == NadeArgs::kCategorical) return choose_level<T>(params, p, u) / T(p - 1);
  const int64_t k = p / 3;
  const Vec<T> chosen = choose_level<T>(params, k, u);
  Vec<T> mean = load(params + k * n), log_sigma = load(params + 2 * k * n);
  for (int64_t j = 1; j < k; ++j) {
    const Mask<T> here = chosen == T(j);
    mean = here ? load(params + (k + j) * n) : mean;
    log_sigma = here ? load(params + (2 * k + j) * n) : log_sigma;
  }
  const T tiny = sizeof(T) == 4 ? T(1e-7) : T(1e-12);
  for (int64_t i = 0; i < count; ++i) {
    const T v = uniforms[i * stride + 1];
    other[i] = T(normal_quantile(v < tiny ? tiny : v > 1 - tiny ? T(1) - tiny : v));
  }
  return chosen == chosen ? mean + exp<T>(log_sigma) * load(other) : chosen;
}

template <class T>
int64_t scan_elements(const NadeArgs& a) {
  constexpr int n = lanes<T>();
  return 2 * n * padded<T>(a.h) + a.p * n * n + a.p * n;
}

template <class T, int kAct>
void scan(const NadeArgs& a, int64_t first, int64_t count, T* state) {
  constexpr int n = lanes<T>();
  const int64_t hidden = a.h, row = padded<T>(hidden), p = a.p;
  const Tail<T> tail(hidden);
  const T *weight = static_cast<const T*>(a.weight), *readout = static_cast<const T*>(a.readout);
  const T *bias = static_cast<const T*>(a.bias), *c = static_cast<const T*>(a.hidden_bias);
  const T *rescale = static_cast<const T*>(a.rescale), *given = static_cast<const T*>(a.x);
  const T *weight_end = weight + a.d * hidden, *readout_end = readout + a.d * p * hidden;
  T *h = state + n * row, *partial = h + n * row, *params = partial + p * n * n;
  for (int64_t i = 0; i < p * n * n; i += n) store(partial + i, Vec<T>{});
  alignas(64) T x[n] = {};
  Vec<T> unused;
  for (int64_t d = 0; d < a.d; ++d) {
    const T rho = rescale ? rescale[d] : T(1);
    for (int64_t s = 0; s < count; ++s) {
      T *at = state + s * row, *to = h + s * row;
      if (!d) {
        const T* begin = c + (a.own_hidden_bias ? (first + s) * hidden : 0);
        for (int64_t k = 0; k < row; k += n) {
          const Vec<T> z = k + n <= hidden ? load(begin + k) : load_part(begin + k, tail.live);
          store(at + k, z);
          store(to + k, activate<T, kAct, false>(z * rho, unused));
        }
      } else if (x[s] != T(0) || rescale) {
        const T* w = weight + (d - 1) * hidden;
        int64_t k = 0;
        for (; k + n <= hidden; k += n) {
          const Vec<T> z = load(at + k) + load(w + k) * x[s];
          store(at + k, z);
          store(to + k, activate<T, kAct, false>(z * rho, unused));
        }
        if (tail.live) {
          const Vec<T> z = load(at + k) + tail(w + k, weight_end) * x[s];
          store(at + k, z);
          store(to + k, activate<T, kAct, false>(z * rho, unused));
        }
      }
    }
    const T* v = readout + d * p * hidden;
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) dots_of<T, 4>(h + s * row, row, v, p, hidden, tail, readout_end, partial + s * n);
    for (; s < count; ++s) dots_of<T, 1>(h + s * row, row, v, p, hidden, tail, readout_end, partial + s * n);
    for (int64_t j = 0; j < p; ++j) store(params + j * n, lane_sums(partial + j * n * n) + bias[d * p + j]);
    T* out = static_cast<T*>(a.out);
    if (a.kind == NadeArgs::kParameters) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < p; ++j) out[((first + i) * a.d + d) * p + j] = params[j * n + i];
        x[i] = given[(first + i) * a.d + d];
      }
      continue;
    }
    const int64_t per = a.kind == NadeArgs::kGaussianMixture ? 2 : 1;
    const T* uniforms = static_cast<const T*>(a.uniforms) + (first * a.d + d) * per;
    store(x, draw<T>(a.kind, params, p, uniforms, a.d * per, count));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (first + i) * a.d + d;
      if (a.known && a.known[at]) x[i] = given[at];
      out[at] = x[i];
    }
  }
}

template <class T, int kAct>
void forward(const NadeArgs& a) {
  int64_t block = a.n / 16 < 4 ? 4 : a.n / 16;  // of the sizes alone: small batches are spread over the threads
  block = block < lanes<T>() ? block : lanes<T>();
  const int threads = a.n * a.d * a.h < kSerial ? 1 : a.threads;
  static thread_local TeamScratch scratch;
  const Slices<T> states = scratch.get<T>(threads, scan_elements<T>(a));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < a.n; first += block)
    scan<T, kAct>(a, first, a.n - first < block ? a.n - first : block, states.get());
}

// ---- backward ----

template <class T>
struct Rows {  // a tile of a product, set or added to what is there
  T* data;
  int64_t ld;
  bool add;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) acc[m][v] = add ? load(data + m * ld + v * lanes<T>()) : Vec<T>{};
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) store(data + m * ld + v * lanes<T>(), acc[m][v]);
  }
};

// out (rows, width) (+)= sum over k of a[m * am + k * ak] b[k][:], b (inner, width).
template <class T, int KV>
void small_product(int64_t rows, int64_t inner, const T* a, int64_t am, int64_t ak, const T* b, T* out, bool add) {
  constexpr int64_t width = KV * lanes<T>();
  const Segment segment{0, 0, inner};
  for (int64_t m = 0; m < rows; m += kMaxRows)
    run_rows<T, KV>(std::min<int64_t>(kMaxRows, rows - m), Rows<T>{out + m * width, width, add}, a + m * am, am, ak, &segment, 1, b,
                    width);
}

// KV vectors of hidden units, of all samples.
template <class T, int kAct, int KV>
struct Units {
  static constexpr int n = lanes<T>();
  static constexpr int64_t width = KV * n;
  const NadeArgs& a;
  int64_t first, live;             // hidden units
  T *w, *v, *dw, *dv, *dc;         // (D, width), (D, P, width), gradients likewise; (width)
  T *c, *e, *h, *slope, *dh;           // (kSamples, width)
  T *states, *check;               // (kCheckpoint, kSamples, width): a_d of one run of steps; a_d at the start of each run
  T* dx;                           // (D, N), the block's part; null where it is not wanted
  T* drho;                         // (D), likewise

  static int64_t runs(const NadeArgs& a) { return (a.d + kCheckpoint - 1) / kCheckpoint; }
  static int64_t elements(const NadeArgs& a) {
    return width * (2 * a.d * (1 + a.p) + 1 + kSamples * (5 + kCheckpoint + runs(a)));
  }

  Units(const NadeArgs& args, int64_t block, T* memory, T* dx_part, T* drho_part)
      : a(args), first(block * width), live(std::min(width, args.h - block * width)), dx(dx_part), drho(drho_part) {
    const auto take = [&memory](int64_t rows) {
      T* at = memory;
      memory += rows * width;
      return at;
    };
    w = take(a.d), v = take(a.d * a.p), dw = take(a.d), dv = take(a.d * a.p), dc = take(1);
    c = take(kSamples), e = take(kSamples), h = take(kSamples), slope = take(kSamples), dh = take(kSamples);
    states = take(kSamples * kCheckpoint), check = take(kSamples * runs(a));
    copy_in(static_cast<const T*>(a.weight), a.d, w);
    copy_in(static_cast<const T*>(a.readout), a.d * a.p, v);
    memset(dw, 0, size_t(a.d * (1 + a.p) * width) * sizeof(T));
    memset(dc, 0, size_t(width) * sizeof(T));
  }

  void copy_in(const T* from, int64_t rows, T* to) const {
    for (int64_t i = 0; i < rows; ++i) {
      memcpy(to + i * width, from + i * a.h + first, size_t(live) * sizeof(T));
      for (int64_t k = live; k < width; ++k) to[i * width + k] = T(0);
    }
  }

  void copy_out(const T* from, int64_t rows, void* out) const {
    T* to = static_cast<T*>(out) + first;
    for (int64_t i = 0; i < rows; ++i) memcpy(to + i * a.h, from + i * width, size_t(live) * sizeof(T));
  }

  // Steps [from, to) of K samples: a_d at every `every`-th of them, x is (D, N).
  template <int K>
  void sweep(const T* x, int64_t s, int64_t from, int64_t to, const T* begin, T* kept, int64_t every) const {
    Vec<T> z[K][KV];
#pragma GCC unroll 4
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < KV; ++k) z[i][k] = load(begin + (s + i) * width + k * n);
    for (int64_t d = from; d < to; ++d) {
      if ((d - from) % every == 0) {
        T* at = kept + ((d - from) / every * kSamples + s) * width;
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
          for (int k = 0; k < KV; ++k) store(at + i * width + k * n, z[i][k]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < KV; ++k) {
        const Vec<T> row = load(w + d * width + k * n);
#pragma GCC unroll 4
        for (int i = 0; i < K; ++i) z[i][k] += row * x[d * a.n + s + i];
      }
    }
  }

  void sweep_all(const T* x, int64_t count, int64_t from, int64_t to, const T* begin, T* kept, int64_t every) const {
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) sweep<4>(x, s, from, to, begin, kept, every);
    for (; s < count; ++s) sweep<1>(x, s, from, to, begin, kept, every);
  }

  // Step d of `count` samples. One is (D, N), the other (D, N, P).
  void step(int64_t d, const T* x, const T* g, int64_t count, T rho, bool whole, T* dx_row) const {
    const T *row = w + d * width, *out = v + d * a.p * width;
    if (dx_row) back_to_x(row, count, dx_row);
    const T* state = states + d % kCheckpoint * kSamples * width;
    int32_t listed[kSamples];
    int moved = 0;
    for (int64_t s = 0; s < count; ++s) {
      listed[moved] = int32_t(s);
      moved += whole || x[s] != T(0);
    }
    Vec<T> sums[KV];
#pragma GCC unroll 4
    for (int k = 0; k < KV; ++k) sums[k] = load(dw + d * width + k * n);
    for (int i = 0; i < moved; ++i) {
      const int64_t at = listed[i] * width;
      const T value = x[listed[i]];
#pragma GCC unroll 4
      for (int k = 0; k < KV; ++k) {
        sums[k] += load(e + at + k * n) * value;
        Vec<T> rise;
        store(h + at + k * n, activate<T, kAct, true>(load(state + at + k * n) * rho, rise));
        store(slope + at + k * n, rise);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < KV; ++k) store(dw + d * width + k * n, sums[k]);
    a.p == 1 ? one_output(d, state, out, g, count, rho) : outputs(d, state, out, g, count, rho);
  }

  void one_output(int64_t d, const T* state, const T* out, const T* g, int64_t count, T rho) const {
    Vec<T> sums[KV], own[KV], turn = splat(T(0));
#pragma GCC unroll 4
    for (int k = 0; k < KV; ++k) sums[k] = load(dv + d * width + k * n), own[k] = load(out + k * n);
    for (int64_t s = 0; s < count; ++s) {
      const T grad = g[s];
#pragma GCC unroll 4
      for (int k = 0; k < KV; ++k) {
        const int64_t at = s * width + k * n;
        sums[k] += load(h + at) * grad;
        const Vec<T> z = own[k] * load(slope + at) * grad;
        if (drho) turn += z * load(state + at);
        store(e + at, load(e + at) + z * rho);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < KV; ++k) store(dv + d * width + k * n, sums[k]);
    if (drho) drho[d] += sum<T>(turn);
  }

  void outputs(int64_t d, const T* state, const T* out, const T* g, int64_t count, T rho) const {
    small_product<T, KV>(count, a.p, g, a.p, 1, out, dh, false);
    small_product<T, KV>(a.p, count, g, 1, a.p, h, dv + d * a.p * width, true);
    Vec<T> turn = splat(T(0));
    for (int64_t at = 0; at < count * width; at += n) {
      const Vec<T> z = load(dh + at) * load(slope + at);
      if (drho) turn += z * load(state + at);
      store(e + at, load(e + at) + z * rho);
    }
    if (drho) drho[d] += sum<T>(turn);
  }

  void back_to_x(const T* row, int64_t count, T* to) const {
    alignas(64) T partial[n * n];
    for (int64_t s = 0; s < count; s += n) {
      const int64_t some = std::min<int64_t>(n, count - s);
      for (int64_t i = 0; i < n; ++i) {
        Vec<T> z = splat(T(0));
        if (i < some)
          for (int k = 0; k < KV; ++k) z += load(row + k * n) * load(e + (s + i) * width + k * n);
        store(partial + i * n, z);
      }
      const Vec<T> found = lane_sums(partial);
      some == n ? store(to + s, found) : store_part(to + s, found, int(some));
    }
  }

  void run() const {
    const T *x = static_cast<const T*>(a.x), *g = static_cast<const T*>(a.grad), *rescale = static_cast<const T*>(a.rescale);
    for (int64_t from = 0; from < a.n; from += kSamples) {
      const int64_t count = std::min(kSamples, a.n - from);
      for (int64_t s = 0; s < count; ++s)
        copy_in(static_cast<const T*>(a.hidden_bias) + (a.own_hidden_bias ? (from + s) * a.h : 0), 1, c + s * width);
      sweep_all(x + from, count, 0, a.d, c, check, kCheckpoint);
      memset(e, 0, size_t(count * width) * sizeof(T));
      for (int64_t d = a.d - 1; d >= 0; --d) {
        const int64_t start = d / kCheckpoint * kCheckpoint;
        if (d + 1 == a.d || d + 1 == start + kCheckpoint)
          sweep_all(x + from, count, start, d + 1, check + start / kCheckpoint * kSamples * width, states, 1);
        step(d, x + d * a.n + from, g + (d * a.n + from) * a.p, count, rescale ? rescale[d] : T(1), rescale || d == a.d - 1,
             dx ? dx + d * a.n + from : nullptr);
      }
      if (a.own_hidden_bias) copy_out(e, count, static_cast<T*>(a.grad_hidden_bias) + from * a.h);
      for (int64_t s = 0; s < count; ++s)
        for (int k = 0; k < KV; ++k) store(dc + k * n, load(dc + k * n) + load(e + s * width + k * n));
    }
    copy_out(dw, a.d, a.grad_weight);
    copy_out(dv, a.d * a.p, a.grad_readout);
    if (!a.own_hidden_bias) copy_out(dc, 1, a.grad_hidden_bias);
  }
};

template <class T, int kAct, int KV>
void backward(const NadeArgs& a) {
  constexpr int64_t width = KV * lanes<T>();
  const int64_t blocks = (a.h + width - 1) / width, parts = a.d * a.n;
  const int threads = a.n * a.d * a.h < kSerial ? 1 : a.threads;
  // Sums over hidden units are taken by block and then in the order of the blocks, whatever the threads.
  const Workspace<T> all_dx(a.grad_x ? blocks * parts : 0);
  const Workspace<T> all_drho(a.grad_rescale ? blocks * a.d : 0, Workspace<T>::kZeros);
  T *dx = a.grad_x ? all_dx.get() : nullptr, *drho = a.grad_rescale ? all_drho.get() : nullptr;
  static thread_local TeamScratch scratch;
  const Slices<T> all_memory = scratch.get<T>(threads, Units<T, kAct, KV>::elements(a));
#pragma omp parallel num_threads(threads)
  {
    T* memory = all_memory.get();
#pragma omp for schedule(dynamic, 1)
    for (int64_t j = 0; j < blocks; ++j)
      Units<T, kAct, KV>(a, j, memory, dx ? dx + j * parts : nullptr, drho ? drho + j * a.d : nullptr).run();
#pragma omp for schedule(static)
    for (int64_t d = 0; d < a.d; ++d) {
      const T* g = static_cast<const T*>(a.grad) + d * a.n * a.p;
      T* db = static_cast<T*>(a.grad_bias) + d * a.p;
      for (int64_t j = 0; j < a.p; ++j) db[j] = T(0);
      for (int64_t i = 0; i < a.n; ++i)
        for (int64_t j = 0; j < a.p; ++j) db[j] += g[i * a.p + j];
      if (dx) {
        T* to = static_cast<T*>(a.grad_x) + d * a.n;
        memcpy(to, dx + d * a.n, size_t(a.n) * sizeof(T));
        for (int64_t j = 1; j < blocks; ++j)
          for (int64_t i = 0; i < a.n; ++i) to[i] += dx[j * parts + d * a.n + i];
      }
      if (drho) {
        T total = T(0);
        for (int64_t j = 0; j < blocks; ++j) total += drho[j * a.d + d];
        static_cast<T*>(a.grad_rescale)[d] = total;
      }
    }
  }
}

template <class T, int kAct>
void backward_of(const NadeArgs& a) {
  vectors<T>(a.h) >= 16 ? backward<T, kAct, 2>(a) : backward<T, kAct, 1>(a);
}

template <class T>
void choose(const NadeArgs& a) {
  const bool back = a.grad != nullptr;
  switch (a.activation) {
    case NadeArgs::kSigmoid: return back ? backward_of<T, NadeArgs::kSigmoid>(a) : forward<T, NadeArgs::kSigmoid>(a);
    case NadeArgs::kRelu: return back ? backward_of<T, NadeArgs::kRelu>(a) : forward<T, NadeArgs::kRelu>(a);
    default: return back ? backward_of<T, NadeArgs::kTanh>(a) : forward<T, NadeArgs::kTanh>(a);
  }
}

}  // namespace

GENFAST_KERNEL(nade, NadeArgs, choose<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
