// The recurrences of PixelRNN (1601.06759 sec. 3.1, 3.2): [o, f, i, g] = act(K * h_{t-1} + gates_t), c = f c + i g,
// h = o tanh(c), over rows (step t a row, positions its columns) or over anti-diagonals (t = row + column, positions rows).
//
// gates (N, 4h, H, W), K (4h, h, k), h (N, h, H, W), kept (N, H, W, 5, h) = o, f, i, g, c. On a diagonal the neighbours above
// and to the left of row p stood at p - 1 and p of the diagonal before, so K is a convolution over two positions; nothing is
// skewed, and the corners that a skewed map pads are not computed.
// Fused: the product, the activations and the cell of a tile of positions never leave the first cache; the backward computes
// dh, the gate gradients and the weight gradient of a step while they lie in the first caches. An image is transposed to
// channels-last in its own scratch (into `kept`, where that is wanted) and back.
// Per position 8 k h^2 FLOPs forward and 16 k h^2 backward against 4 (4 + 5 + 1) h bytes: bound by the multipliers.
// Samples are shared out in groups that do not depend on the thread count; each sums its weight gradient in the order of its
// samples and steps, and the groups are summed in double, so the bits do not depend on the thread count either.
#include <math.h>
#include <stdlib.h>

#include "dtype_switch.h"
#include "transpose.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kGroups = 16;
constexpr int64_t kTilesAPart = 6;  // tiles of rows of the weight gradient that one thread takes at a time
#if GENFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRows = 6;  // 24 accumulators of 32 registers
#else
constexpr int kRows = 3;  // 12 of 16
#endif

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Scratch : Workspace<T> {
  explicit Scratch(int64_t count) : Workspace<T>(count, Workspace<T>::kZeros) {}
};

// Which positions a step has, and where they stand in the image.
struct Scan {
  int64_t height, width, taps, pad, positions, steps, sites;
  bool diagonal;
  explicit Scan(const PixelRnnArgs& a) : height(a.height), width(a.width), taps(a.taps), diagonal(a.diagonal) {
    pad = diagonal ? 1 : taps / 2;
    positions = diagonal ? height : width;
    steps = diagonal ? height + width - 1 : height;
    sites = height * width;
  }
  int64_t begin(int64_t t) const { return diagonal ? max_of(0, t - width + 1) : 0; }
  int64_t end(int64_t t) const { return diagonal ? min_of(t + 1, height) : width; }
  int64_t site(int64_t t, int64_t p) const { return diagonal ? p * width + t - p : t * width + p; }
  bool first(int64_t t, int64_t p) const { return diagonal ? p == t : t == 0; }  // whose state before is the given one
};

// How the channels are cut into vectors.
struct Channels {
  int64_t count, padded, blocks;
  int lanes;
  Channels(int64_t count, int lanes)
      : count(count), padded(ceil_div(count, lanes) * lanes), blocks(ceil_div(count, lanes)), lanes(lanes) {}
  int live(int64_t block) const { return int(min_of(lanes, count - block * lanes)); }
};

template <class T>
GENFAST_INLINE Vec<T> load_live(const T* p, int live) {
  return live == lanes<T>() ? load(p) : load_part(p, live);
}

template <class T>
GENFAST_INLINE void store_live(T* p, Vec<T> v, int live) {
  live == lanes<T>() ? store(p, v) : store_part(p, v, live);
}

// Sites [from, to) of an image of strided channels, to rows of channels.
template <class T>
void read_sites(const T* x, int64_t c_stride, int64_t s_stride, int64_t channels, int64_t from, int64_t to, T* rows,
                int64_t row_stride) {
  if (s_stride == 1) {
    transpose(x + from, c_stride, channels, to - from, rows + from * row_stride, row_stride);
    return;
  }
  for (int64_t s = from; s < to; ++s)
    for (int64_t c = 0; c < channels; ++c) rows[s * row_stride + c] = x[s * s_stride + c * c_stride];
}

// sums[m][v] += sum_q a[m][q] b[q][v]; b is packed, q by q. Not inlined: what surrounds it would take its registers.
template <class T, int M, int NV>
__attribute__((noinline)) void product(T* sums, const T* a, int64_t a_stride, const T* b, int64_t depth) {
  constexpr int n = lanes<T>();
  Vec<T> acc[M][NV];
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = load(sums + (m * NV + v) * n);
  for (int64_t q = 0; q < depth; ++q, b += NV * n) {
    Vec<T> column[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) column[v] = load(b + v * n);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const T scalar = a[m * a_stride + q];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] += column[v] * scalar;
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(sums + (m * NV + v) * n, acc[m][v]);
}

template <class T>
GENFAST_INLINE Vec<T> logistic(Vec<T> x) {
  Vec<T> s, one_minus, log_s;
  sigmoid<T>(x, s, one_minus, log_s);
  return s;
}

// A tile of positions of one step.
struct Tile {
  int64_t t, begin;
  int size;
};

Tile tile_of(const Scan& scan, int64_t t, int64_t index, int64_t tiles) {
  const int64_t first = scan.begin(t), count = scan.end(t) - first;
  const int64_t from = count * index / tiles, to = count * (index + 1) / tiles;
  return {t, first + from, int(to - from)};
}

int64_t tiles_of(const Scan& scan, int64_t t) { return ceil_div(scan.end(t) - scan.begin(t), kRows); }

// Calls function.template run<M>(...) for M = size.
template <class F, class... A>
GENFAST_INLINE void by_size(int size, F& function, A... args) {
  switch (size) {
    case 1: function.template run<1>(args...); break;
    case 2: function.template run<2>(args...); break;
    case 3: function.template run<3>(args...); break;
#if GENFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
    case 4: function.template run<4>(args...); break;
    case 5: function.template run<5>(args...); break;
    case 6: function.template run<6>(args...); break;
#endif
  }
}

int64_t group_begin(int64_t n, int64_t groups, int64_t g) { return n * g / groups; }

// A job is a list of stages, each of independent items, for each sample. With enough groups a thread takes a group whole, and
// waits for nobody; else all threads share the items of a stage, over one sample of every group at a time.
// Job: slots are the samples under way at once; run(sample, slot, group, stage, item).
template <class Job>
void drive(Job& job, int64_t n, int64_t groups, int64_t slots, bool together, int threads) {
  const int64_t stages = job.stages(), most = ceil_div(n, groups);
  if (!together) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t slot = 0; slot < slots; ++slot)
      for (int64_t g = slot; g < groups; g += slots)
        for (int64_t sample = group_begin(n, groups, g); sample < group_begin(n, groups, g + 1); ++sample)
          for (int64_t stage = 0; stage < stages; ++stage)
            for (int64_t item = 0, items = job.items(stage); item < items; ++item) job.run(sample, slot, g, stage, item);
    return;
  }
#pragma omp parallel num_threads(threads)
  for (int64_t i = 0; i < most; ++i)
    for (int64_t stage = 0; stage < stages; ++stage) {
      const int64_t items = job.items(stage);
#pragma omp for schedule(static)
      for (int64_t index = 0; index < groups * items; ++index) {
        const int64_t g = index / items, sample = group_begin(n, groups, g) + i;
        if (sample < group_begin(n, groups, g + 1)) job.run(sample, g, g, stage, index % items);
      }
    }
}

// Whether threads that each take whole groups would idle for more than a quarter of the time.
bool share_steps(int64_t groups, int threads) { return 4 * groups < 3 * ceil_div(groups, threads) * threads; }

// ---- forward ----

template <class T>
struct Forward {
  const PixelRnnArgs& a;
  Scan scan;
  Channels ch;
  int64_t rows, chunks, site_size;
  T *packed, *state, *cell, *kept, *y;  // by slot; kept by sample where it is an output
  bool y_is_output;

  int64_t stages() const { return scan.steps + 2; }
  int64_t items(int64_t stage) const {
    if (stage == 0 || stage > scan.steps) return chunks;
    return tiles_of(scan, stage - 1) * ch.blocks;
  }

  T* kept_of(int64_t sample, int64_t slot) const { return kept + (a.kept ? sample : slot) * scan.sites * site_size; }
  T* y_of(int64_t sample, int64_t slot) const { return y + (y_is_output ? sample : slot) * scan.sites * ch.count; }
  T* state_of(int64_t slot, int64_t t) const { return state + (2 * slot + (t & 1)) * rows * ch.padded; }

  void run(int64_t sample, int64_t slot, int64_t, int64_t stage, int64_t item) {
    if (stage == 0) {
      start(sample, slot, item);
    } else if (stage <= scan.steps) {
      const int64_t t = stage - 1, tiles = tiles_of(scan, t);
      Step step{*this, tile_of(scan, t, item % tiles, tiles), sample, slot, item / tiles};
      by_size(step.tile.size, step);
    } else if (!y_is_output) {
      const int64_t from = scan.sites * item / chunks, to = scan.sites * (item + 1) / chunks;
      transpose(y_of(sample, slot) + from * ch.count, ch.count, to - from, ch.count,
                static_cast<T*>(a.out) + sample * ch.count * scan.sites + from, scan.sites);
    }
  }

  void start(int64_t sample, int64_t slot, int64_t item) {
    const int64_t from = scan.sites * item / chunks, to = scan.sites * (item + 1) / chunks;
    read_sites(static_cast<const T*>(a.gates.data) + sample * a.gates.n, a.gates.c, a.gates.s, 4 * ch.count, from, to,
               kept_of(sample, slot), site_size);
    if (item) return;
    const T *h0 = static_cast<const T*>(a.h0), *c0 = static_cast<const T*>(a.c0);
    for (int64_t p = 0; p < scan.positions; ++p)
      for (int64_t k = 0; k < ch.count; ++k) {
        const T h = h0 ? h0[p * ch.count + k] : T(0);
        for (int64_t t = 0; t < 2; ++t) state_of(slot, t)[(p + scan.pad) * ch.padded + k] = h;
        cell[(slot * scan.positions + p) * ch.padded + k] = c0 ? c0[p * ch.count + k] : T(0);
      }
  }

  struct Step {
    Forward& f;
    Tile tile;
    int64_t sample, slot, block;

    template <int M>
    void run() {
      const Channels& ch = f.ch;
      const int64_t n = ch.count, offset = block * lanes<T>(), depth = f.scan.taps * ch.padded;
      const int live = ch.live(block);
      T* site[M];
      alignas(64) T sums[M * 4 * lanes<T>()];
      for (int m = 0; m < M; ++m) {
        site[m] = f.kept_of(sample, slot) + f.scan.site(tile.t, tile.begin + m) * f.site_size + offset;
        for (int q = 0; q < 4; ++q) store(sums + (m * 4 + q) * lanes<T>(), load_live(site[m] + q * n, live));
      }
      if (tile.t || f.a.h0)
        product<T, M, 4>(sums, f.state_of(slot, tile.t + 1) + tile.begin * ch.padded, ch.padded,
                         f.packed + block * depth * 4 * lanes<T>(), depth);
      T* cell = f.cell + (slot * f.scan.positions + tile.begin) * ch.padded + offset;
      T* next = f.state_of(slot, tile.t) + (tile.begin + f.scan.pad) * ch.padded + offset;
      T* y = f.y_of(sample, slot) + offset;
      const T* z = sums;
#pragma GCC unroll 1
      for (int m = 0; m < M; ++m, z += 4 * lanes<T>()) {
        const Vec<T> o = logistic<T>(load(z)), forget = logistic<T>(load(z + lanes<T>()));
        const Vec<T> i = logistic<T>(load(z + 2 * lanes<T>())), g = tanh<T>(load(z + 3 * lanes<T>()));
        const Vec<T> c = forget * load(cell + m * ch.padded) + i * g, h = o * tanh<T>(c);
        store(cell + m * ch.padded, c);
        store(next + m * ch.padded, h);
        store_live(y + f.scan.site(tile.t, tile.begin + m) * n, h, live);
        if (!f.a.kept) continue;
        store_live(site[m], o, live);
        store_live(site[m] + n, forget, live);
        store_live(site[m] + 2 * n, i, live);
        store_live(site[m] + 3 * n, g, live);
        store_live(site[m] + 4 * n, c, live);
      }
    }
  };
};

// K packed for the forward: block by block, (tap, channel) by (tap, channel), the four gates of a block of channels.
template <class T>
void pack_forward(const PixelRnnArgs& a, const Channels& ch, T* packed) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t depth = a.taps * ch.padded;
  for (int64_t row = 0; row < 4 * ch.count; ++row) {
    const int64_t gate = row / ch.count, out = row % ch.count;
    T* column = packed + (out / ch.lanes) * depth * 4 * ch.lanes + gate * ch.lanes + out % ch.lanes;
    for (int64_t in = 0; in < ch.count; ++in)
      for (int64_t j = 0; j < a.taps; ++j)
        column[(j * ch.padded + in) * 4 * ch.lanes] = weight[(row * ch.count + in) * a.taps + j];
  }
}

template <class T>
void forward(const PixelRnnArgs& a) {
  const Scan scan(a);
  const Channels ch(a.hidden, lanes<T>());
  const int64_t groups = min_of(a.n, kGroups), rows = scan.positions + scan.taps - 1;
  const bool together = share_steps(groups, a.threads);
  const int64_t slots = together ? groups : min_of(groups, a.threads), site_size = (a.kept ? 5 : 4) * ch.count;
  Scratch<T> packed(ch.blocks * scan.taps * ch.padded * 4 * ch.lanes), state(slots * 2 * rows * ch.padded);
  Scratch<T> cell(slots * scan.positions * ch.padded), kept(a.kept ? 0 : slots * scan.sites * site_size);
  Scratch<T> y(a.channels_last ? 0 : slots * scan.sites * ch.count);
  pack_forward(a, ch, packed.get());
  Forward<T> job{a,         scan,        ch,         rows,
                 ceil_div(scan.sites, 16 * ch.lanes), site_size,   packed.get(), state.get(),
                 cell.get(), a.kept ? static_cast<T*>(a.kept) : kept.get(),
                 a.channels_last ? static_cast<T*>(a.out) : y.get(), a.channels_last};
  drive(job, a.n, groups, slots, together, a.threads);
}

// ---- backward ----

template <class T>
struct Backward {
  const PixelRnnArgs& a;
  Scan scan;
  Channels ch;
  int64_t groups, chunks, panels;
  // By slot: da and h with their margins, tanh c, dc, grad h and grad gates by site. By group: the sums.
  T *packed, *da, *before, *tanh_c, *dc, *grad, *dgates, *dweight, *dfirst, *dcell;
  bool last;  // channels last: grad h and grad gates are read and written where they lie

  int64_t rows() const { return scan.positions + scan.taps - 1; }
  int64_t width() const { return 4 * ch.padded; }
  int64_t row_tiles() const { return ceil_div(ch.count, kRows); }
  int64_t row_parts() const { return ceil_div(row_tiles(), kTilesAPart); }

  // Stages: start, the state before the end of the scan, then two for each step, and the end.
  int64_t stages() const { return 2 * scan.steps + 3; }
  int64_t step_of(int64_t stage) const { return scan.steps - 1 - (stage - 2) / 2; }
  int64_t items(int64_t stage) const {
    if (stage == 0 || stage == stages() - 1) return chunks;
    if (stage == 1) return tiles_of(scan, scan.steps - 1);
    const int64_t t = step_of(stage);
    if (stage % 2) return scan.taps * 4 * row_parts();
    return tiles_of(scan, t) * panels + (t ? tiles_of(scan, t - 1) : 1);
  }

  void run(int64_t sample, int64_t slot, int64_t group, int64_t stage, int64_t item) {
    if (stage == 0) {
      start(sample, slot, item);
    } else if (stage == 1) {
      rebuild(sample, slot, scan.steps, item);
    } else if (stage == stages() - 1) {
      finish(sample, slot, group, item);
    } else if (stage % 2) {
      weight_gradient(slot, group, step_of(stage), item);
    } else {
      const int64_t t = step_of(stage), tiles = tiles_of(scan, t);
      if (item >= tiles * panels) {
        rebuild(sample, slot, t, item - tiles * panels);
        return;
      }
      const Tile tile = tile_of(scan, t, item % tiles, tiles);
      const int64_t panel = item / tiles;
      switch (min_of(4, ch.blocks - 4 * panel)) {
        case 1: gates<1>(tile, sample, slot, panel); break;
        case 2: gates<2>(tile, sample, slot, panel); break;
        case 3: gates<3>(tile, sample, slot, panel); break;
        default: gates<4>(tile, sample, slot, panel);
      }
    }
  }

  const T* kept_of(int64_t sample) const { return static_cast<const T*>(a.kept) + sample * scan.sites * 5 * ch.count; }
  T* da_of(int64_t slot, int64_t t) const { return da + (2 * slot + (t & 1)) * rows() * width(); }
  T* tanh_of(int64_t slot, int64_t t) const { return tanh_c + (2 * slot + (t & 1)) * scan.positions * ch.padded; }
  T* before_of(int64_t slot) const { return before + slot * rows() * ch.padded; }
  T* dgates_of(int64_t sample, int64_t slot) const { return dgates + (last ? sample : slot) * scan.sites * 4 * ch.count; }
  // grad h of site 0 and the distance to the next site
  const T* grad_of(int64_t sample, int64_t slot) const {
    return last ? static_cast<const T*>(a.grad_h.data) + sample * a.grad_h.n : grad + slot * scan.sites * ch.count;
  }
  int64_t grad_stride() const { return last ? a.grad_h.s : ch.count; }

  void start(int64_t sample, int64_t slot, int64_t item) {
    const int64_t from = scan.sites * item / chunks, to = scan.sites * (item + 1) / chunks;
    if (!last)
      read_sites(static_cast<const T*>(a.grad_h.data) + sample * a.grad_h.n, a.grad_h.c, a.grad_h.s, ch.count, from, to,
                 grad + slot * scan.sites * ch.count, ch.count);
    if (item) return;
    memset(da_of(slot, 0), 0, size_t(2 * rows() * width()) * sizeof(T));
    memset(before_of(slot), 0, size_t(rows() * ch.padded) * sizeof(T));
    memset(dc + slot * scan.positions * ch.padded, 0, size_t(scan.positions * ch.padded) * sizeof(T));
  }

  // tanh c and h of step t - 1, and where that has not begun, the given h.
  void rebuild(int64_t sample, int64_t slot, int64_t t, int64_t index) {
    const int64_t n = ch.count;
    T* row = before_of(slot) + scan.pad * ch.padded;
    if (index == 0 && t < scan.steps)
      for (int64_t p = scan.begin(t); p < scan.end(t); ++p)
        if (scan.first(t, p))
          for (int64_t k = 0; k < n; ++k) row[p * ch.padded + k] = a.h0 ? static_cast<const T*>(a.h0)[p * n + k] : T(0);
    if (t == 0) return;
    const Tile tile = tile_of(scan, t - 1, index, tiles_of(scan, t - 1));
    for (int64_t p = tile.begin; p < tile.begin + tile.size; ++p) {
      const T* site = kept_of(sample) + scan.site(t - 1, p) * 5 * n;
      for (int64_t b = 0; b < ch.blocks; ++b) {
        const int64_t offset = b * ch.lanes;
        const Vec<T> th = tanh<T>(load_live(site + 4 * n + offset, ch.live(b)));
        store(tanh_of(slot, t - 1) + p * ch.padded + offset, th);
        store(row + p * ch.padded + offset, load_live(site + offset, ch.live(b)) * th);
      }
    }
  }

  // dh of a tile, and from it the gradients of the gates before their activation.
  template <int NV>
  void gates(const Tile& tile, int64_t sample, int64_t slot, int64_t panel) {
    Gates<NV> task{*this, tile, sample, slot, panel};
    by_size(tile.size, task);
  }

  template <int NV>
  struct Gates {
    Backward& f;
    Tile tile;
    int64_t sample, slot, panel;

    template <int M>
    void run() {
      const Channels& ch = f.ch;
      const Scan& scan = f.scan;
      const int64_t n = ch.count, base = panel * 4 * lanes<T>(), depth = scan.taps * f.width(), t = tile.t;
      alignas(64) T sums[M * NV * lanes<T>()];
      for (int m = 0; m < M; ++m) {
        const T* g = f.grad_of(sample, slot) + scan.site(t, tile.begin + m) * f.grad_stride() + base;
        for (int v = 0; v < NV; ++v)
          store(sums + (m * NV + v) * lanes<T>(), load_live(g + v * ch.lanes, ch.live(4 * panel + v)));
      }
      if (t + 1 < scan.steps)
        product<T, M, NV>(sums, f.da_of(slot, t + 1) + tile.begin * f.width(), f.width(), f.packed + base * depth, depth);
      const T *c0 = static_cast<const T*>(f.a.c0), *grad_kept = static_cast<const T*>(f.a.grad_kept);
#pragma GCC unroll 1
      for (int m = 0; m < M; ++m) {
        const int64_t p = tile.begin + m, where = scan.site(t, p);
        const T* site = f.kept_of(sample) + where * 5 * n;
        const T* c_before = scan.first(t, p) ? (c0 ? c0 + p * n : nullptr)
                                             : f.kept_of(sample) + (scan.site(t - 1, p) * 5 + 4) * n;
        const T* extra = grad_kept ? grad_kept + (sample * scan.sites + where) * 5 * n : nullptr;
        T* da = f.da_of(slot, t) + (p + scan.taps - 1 - scan.pad) * f.width();
        T* out = f.dgates_of(sample, slot) + where * 4 * n;
#pragma GCC unroll 1
        for (int v = 0; v < NV; ++v) {
          const Vec<T> dh = load(sums + (m * NV + v) * lanes<T>());
          const int64_t k = base + v * ch.lanes;
          const int live = ch.live(4 * panel + v);
          const Vec<T> o = load_live(site + k, live), forget = load_live(site + n + k, live);
          const Vec<T> i = load_live(site + 2 * n + k, live), g = load_live(site + 3 * n + k, live);
          const Vec<T> th = load(f.tanh_of(slot, t) + p * ch.padded + k);
          T* dc = f.dc + (slot * scan.positions + p) * ch.padded + k;
          Vec<T> d = load(dc) + dh * o * (T(1) - th * th), d_o = dh * th;
          if (extra) {
            d += load_live(extra + 4 * n + k, live);
            d_o += load_live(extra + k, live);
          }
          Vec<T> d_f = c_before ? d * load_live(c_before + k, live) : Vec<T>{}, d_i = d * g, d_g = d * i;
          if (extra) {
            d_f += load_live(extra + n + k, live);
            d_i += load_live(extra + 2 * n + k, live);
            d_g += load_live(extra + 3 * n + k, live);
          }
          store(dc, d * forget);
          const Vec<T> grads[4] = {d_o * o * (T(1) - o), d_f * forget * (T(1) - forget), d_i * i * (T(1) - i),
                                   d_g * (T(1) - g * g)};
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) {
            store(da + q * ch.padded + k, grads[q]);
            store_live(out + q * n + k, grads[q], live);
          }
        }
      }
    }
  };

  // Rows of one tap of one gate: sum over the step's positions of da h_before^T.
  void weight_gradient(int64_t slot, int64_t group, int64_t t, int64_t item) {
    if (t == 0 && !a.h0) return;
    const int64_t parts = row_parts(), part = item % parts, gate = item / parts % 4, tap = item / parts / 4;
    for (int64_t tile = part * kTilesAPart; tile < min_of((part + 1) * kTilesAPart, row_tiles()); ++tile)
      weight_tile(slot, group, t, tap, gate, tile);
  }

  void weight_tile(int64_t slot, int64_t group, int64_t t, int64_t tap, int64_t gate, int64_t tile) {
    const int64_t tiles = row_tiles(), from = ch.count * tile / tiles, to = ch.count * (tile + 1) / tiles, begin = scan.begin(t);
    Outer task{scan.end(t) - begin,
               da_of(slot, t) + (begin + scan.taps - 1 - scan.pad) * width() + gate * ch.padded + from,
               before_of(slot) + (begin + tap) * ch.padded,
               dweight + (((group * scan.taps + tap) * 4 + gate) * ch.padded + from) * ch.padded,
               width(),
               ch.padded};
    for (int64_t b = 0; b < ch.blocks; b += 4) {
      switch (min_of(4, ch.blocks - b)) {
        case 1: task.columns = 1; break;
        case 2: task.columns = 2; break;
        case 3: task.columns = 3; break;
        default: task.columns = 4;
      }
      by_size(int(to - from), task);
      task.h += 4 * ch.lanes, task.out += 4 * ch.lanes;
    }
  }

  struct Outer {
    int64_t count;
    const T *da, *h;
    T* out;
    int64_t da_stride, stride;
    int columns;

    template <int M>
    void run() {
      switch (columns) {
        case 1: accumulate<M, 1>(); break;
        case 2: accumulate<M, 2>(); break;
        case 3: accumulate<M, 3>(); break;
        default: accumulate<M, 4>();
      }
    }

    template <int M, int NV>
    void accumulate() {
      constexpr int n = lanes<T>();
      Vec<T> acc[M][NV];
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[m][v] = load(out + m * stride + v * n);
      const T *x = da, *y = h;
      for (int64_t p = 0; p < count; ++p, x += da_stride, y += stride) {
        Vec<T> row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) row[v] = load(y + v * n);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          const T scalar = x[m];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[m][v] += row[v] * scalar;
        }
      }
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) store(out + m * stride + v * n, acc[m][v]);
    }
  };

  void finish(int64_t sample, int64_t slot, int64_t group, int64_t item) {
    const int64_t n = ch.count;
    const T* found = dgates_of(sample, slot);
    if (!last) {
      const int64_t from = scan.sites * item / chunks, to = scan.sites * (item + 1) / chunks;
      transpose(found + from * 4 * n, 4 * n, to - from, 4 * n, static_cast<T*>(a.out) + sample * 4 * n * scan.sites + from,
                scan.sites);
    }
    if (item) return;
    for (int64_t p = 0; p < scan.positions; ++p) {
      const T* gates = found + scan.site(scan.diagonal ? p : 0, p) * 4 * n;
      if (a.h0)
        for (int64_t k = 0; k < 4 * n; ++k) dfirst[(group * scan.positions + p) * 4 * n + k] += gates[k];
      if (a.c0)
        for (int64_t k = 0; k < n; ++k)
          dcell[(group * scan.positions + p) * n + k] += dc[(slot * scan.positions + p) * ch.padded + k];
    }
  }

  // The groups' sums, in double.
  void reduce() {
    const int64_t n = ch.count, positions = scan.positions, taps = scan.taps;
    const T* weight = static_cast<const T*>(a.weight);
    Scratch<double> totals(4 * n);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t gate = 0; gate < 4; ++gate) {
      double* total = totals.get() + gate * n;
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t out = 0; out < n; ++out) {
          memset(total, 0, size_t(n) * sizeof(double));
          for (int64_t g = 0; g < groups; ++g) {
            const T* part = dweight + (((g * taps + tap) * 4 + gate) * ch.padded + out) * ch.padded;
            for (int64_t in = 0; in < n; ++in) total[in] += double(part[in]);
          }
          T* row = static_cast<T*>(a.grad_weight) + (gate * n + out) * n * taps + tap;
          for (int64_t in = 0; in < n; ++in) row[in * taps] = T(total[in]);
        }
    }
    for (int64_t i = 0; a.c0 && i < positions * n; ++i) {
      double total = 0;
      for (int64_t g = 0; g < groups; ++g) total += double(dcell[g * positions * n + i]);
      static_cast<T*>(a.grad_c0)[i] = T(total);
    }
    if (!a.h0) return;
    Scratch<double> dh(positions * n);
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t row = 0; row < 4 * n; ++row) {
        double total = 0;
        for (int64_t g = 0; g < groups; ++g) total += double(dfirst[(g * positions + p) * 4 * n + row]);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t source = p + tap - scan.pad;
          // On a diagonal only the left neighbour is outside of the image with a state of its own.
          if (source < 0 || source >= positions || (scan.diagonal && source != p)) continue;
          for (int64_t in = 0; in < n; ++in)
            dh.get()[source * n + in] += total * double(weight[(row * n + in) * taps + tap]);
        }
      }
    for (int64_t i = 0; i < positions * n; ++i) static_cast<T*>(a.grad_h0)[i] = T(dh.get()[i]);
  }
};

// K packed for dh: panels of four blocks of channels, (tap, gate, channel) by (tap, gate, channel), the taps reversed.
template <class T>
void pack_backward(const PixelRnnArgs& a, const Channels& ch, T* packed) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t depth = a.taps * 4 * ch.padded;
  for (int64_t in = 0; in < ch.count; ++in) {
    const int64_t panel = in / (4 * ch.lanes), columns = min_of(4, ch.blocks - 4 * panel) * ch.lanes;
    T* column = packed + panel * 4 * ch.lanes * depth + in % (4 * ch.lanes);
    for (int64_t row = 0; row < 4 * ch.count; ++row)
      for (int64_t j = 0; j < a.taps; ++j)
        column[(((a.taps - 1 - j) * 4 + row / ch.count) * ch.padded + row % ch.count) * columns] =
            weight[(row * ch.count + in) * a.taps + j];
  }
}

template <class T>
void backward(const PixelRnnArgs& a) {
  const Scan scan(a);
  const Channels ch(a.hidden, lanes<T>());
  const int64_t groups = min_of(a.n, kGroups), rows = scan.positions + scan.taps - 1, width = 4 * ch.padded;
  const bool together = share_steps(groups, a.threads);
  const int64_t slots = together ? groups : min_of(groups, a.threads);
  const bool last = a.channels_last && a.grad_h.c == 1;
  Scratch<T> packed(ch.padded * scan.taps * width), da(slots * 2 * rows * width), before(slots * rows * ch.padded);
  Scratch<T> tanh_c(slots * 2 * scan.positions * ch.padded), dc(slots * scan.positions * ch.padded);
  Scratch<T> grad(last ? 0 : slots * scan.sites * ch.count), dgates(last ? 0 : slots * scan.sites * 4 * ch.count);
  Scratch<T> dweight(groups * scan.taps * width * ch.padded), dfirst(a.h0 ? groups * scan.positions * 4 * ch.count : 0);
  Scratch<T> dcell(a.c0 ? groups * scan.positions * ch.count : 0);
  pack_backward(a, ch, packed.get());
  Backward<T> job{a,
                  scan,
                  ch,
                  groups,
                  ceil_div(scan.sites, 16 * ch.lanes),
                  ceil_div(ch.blocks, 4),
                  packed.get(),
                  da.get(),
                  before.get(),
                  tanh_c.get(),
                  dc.get(),
                  grad.get(),
                  last ? static_cast<T*>(a.out) : dgates.get(),
                  dweight.get(),
                  dfirst.get(),
                  dcell.get(),
                  last};
  drive(job, a.n, groups, slots, together, a.threads);
  job.reduce();
}

}  // namespace

GENFAST_KERNEL(pixel_rnn, PixelRnnArgs, forward<T>(a))
GENFAST_KERNEL(pixel_rnn_backward, PixelRnnArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
