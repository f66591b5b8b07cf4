// Masked (causal) convolution (PixelRNN 1601.06759 sec. 3.4): y[p] = b + sum over live taps t of W_t x[p + o_t], relu on request.
//
// x (N, C, D, H, W) with any strides, weight (O, C / groups, K); 1-D and 2-D have D = 1 (H = 1). Only live taps are packed and
// multiplied; of the centre tap, which colour groups may split, the dead pairs are packed as zeros, whatever they hold.
// A block of rows is copied with its zero border to (position, channel) order, small enough for the second-level cache; a tap
// is then an offset, a run of neighbouring taps one segment of gemm.h, and a tile 6 positions by 64 channels (AVX-512, float).
// The gradient to x is the same routine with mirrored offsets and transposed weights. The gradient to W goes over the runs of
// taps, each thread with its own rows of W, so its sum does not depend on the number of threads.
// FLOPs 2 N D H W O C / groups a live tap in each of the three; bound by the FMA rate.
#include <string.h>

#include <algorithm>
#include <vector>

#include "dtype_switch.h"
#include "gemm.h"
#include "transpose.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kCache = 384 << 10;  // bytes of x that a task copies at once

struct Tap {
  int64_t z, y, x, index;
};

// A strided (N, C, D, H, W) tensor; where `sign` is given, an element counts only where sign's is above zero.
template <class T>
struct Source {
  const T* data;
  const int64_t* stride;
  const T* sign;
  const int64_t* sign_stride;
};

struct Border {
  int64_t z0 = 0, z1 = 0, y0 = 0, y1 = 0, x0 = 0, x1 = 0;
  explicit Border(const std::vector<Tap>& taps) {
    for (const Tap& t : taps) {
      z0 = std::max(z0, -t.z), z1 = std::max(z1, t.z);
      y0 = std::max(y0, -t.y), y1 = std::max(y1, t.y);
      x0 = std::max(x0, -t.x), x1 = std::max(x1, t.x);
    }
  }
};

template <class T>
struct Buffer : Workspace<T> {  // uninitialised; vectors that run over the end of the last row read the slack
  explicit Buffer(int64_t size) : Workspace<T>(size + 2 * block_columns<T>()) {}
};

// Rows [y0, y1) and columns [x0, x1) of slice z of sample n as (row, column, channel); zero outside the image.
template <class T>
void copy_block(const Source<T>& s, int64_t n, int64_t z, int64_t y0, int64_t y1, int64_t x0, int64_t x1, const MaskedConvArgs& a,
                int64_t channels, T* out) {
  const int64_t pitch = (x1 - x0) * channels, from = std::max<int64_t>(0, x0), to = std::min(a.w, x1);
  for (int64_t y = y0; y < y1; ++y, out += pitch) {
    if (z < 0 || z >= a.d || y < 0 || y >= a.h || from >= to) {
      memset(out, 0, size_t(pitch) * sizeof(T));
      continue;
    }
    memset(out, 0, size_t((from - x0) * channels) * sizeof(T));
    memset(out + (to - x0) * channels, 0, size_t((x1 - to) * channels) * sizeof(T));
    const int64_t *t = s.stride, count = to - from;
    const T* in = s.data + n * t[0] + z * t[2] + y * t[3] + from * t[4];
    T* row = out + (from - x0) * channels;
    if (s.sign) {
      const int64_t* u = s.sign_stride;
      const T* sign = s.sign + n * u[0] + z * u[2] + y * u[3] + from * u[4];
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < count; ++x)
          row[x * channels + c] = sign[c * u[1] + x * u[4]] > 0 ? in[c * t[1] + x * t[4]] : T(0);
    } else if (t[1] == 1) {
      for (int64_t x = 0; x < count; ++x) memcpy(row + x * channels, in + x * t[4], size_t(channels) * sizeof(T));
    } else if (t[4] == 1) {
      transpose(in, t[1], channels, count, row, channels);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t x = 0; x < count; ++x) row[x * channels + c] = in[c * t[1] + x * t[4]];
    }
  }
}

// Runs of taps that lie side by side, where a run's channels are side by side too (groups = 1).
struct Run {
  size_t first, count;
};

std::vector<Run> runs(const std::vector<Tap>& taps, bool merge) {
  std::vector<Run> found;
  for (size_t i = 0; i < taps.size(); ++i) {
    const bool next = merge && i && taps[i].z == taps[i - 1].z && taps[i].y == taps[i - 1].y && taps[i].x == taps[i - 1].x + 1;
    if (next)
      ++found.back().count;
    else
      found.push_back({i, 1});
  }
  return found;
}

template <class T>
struct Positions {  // a tile of positions by output channels
  const T* bias;
  T* out;
  int64_t ld, columns;
  bool relu;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<T> (&acc)[MR][NV]) const {
    for (int v = 0; v < NV; ++v) {
      const Vec<T> b = load(bias + v * lanes<T>());
      for (int m = 0; m < MR; ++m) acc[m][v] = b;
    }
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<T> (&acc)[MR][NV]) const {
    for (int m = 0; m < MR; ++m)
      for (int v = 0; v < NV; ++v) {
        Vec<T> y = acc[m][v];
        if (relu) y = y > T(0) ? y : (y == y ? splat(T(0)) : y);
        const int64_t left = columns - v * lanes<T>();
        T* p = out + m * ld + v * lanes<T>();
        left >= lanes<T>() ? store(p, y) : store_part(p, y, int(left));
      }
  }
};

// Everything one of the two convolutions needs: the weights as panels (group, block of columns, tap, channel, column).
template <class T>
struct Convolution {
  int64_t in, out, groups;  // channels in all
  std::vector<Tap> taps;
  Border border;
  Buffer<T> panels, bias;

  Convolution(const MaskedConvArgs& a, bool transposed, std::vector<Tap> taps_)
      : in(transposed ? a.cout : a.cin),
        out(transposed ? a.cin : a.cout),
        groups(a.groups),
        taps(std::move(taps_)),
        border(taps),
        panels(a.groups * int64_t(taps.size()) * (in / a.groups) * padded<T>(out / a.groups)),
        bias(a.groups * padded<T>(out / a.groups)) {
    const T* weight = static_cast<const T*>(a.weight);
    const int64_t ci = in / groups, co = out / groups, per = a.cin / groups;
    const int64_t k = int64_t(taps.size()) * ci;
    // Taps innermost, as they lie in the weight; the writes of one i fill whole lines of each tap's panel in turn.
#pragma omp parallel for num_threads(a.threads) schedule(static) collapse(2)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = 0; i < ci; ++i)
        for (int64_t block = 0; block < co; block += block_columns<T>()) {
          const int64_t width = std::min(block_columns<T>(), padded<T>(co - block));
          T* panel = panels.get() + (g * padded<T>(co) + block) * k;
          for (int64_t j = 0; j < width; ++j) {
            const int64_t o = g * (a.cout / groups) + (transposed ? i : block + j), c = transposed ? block + j : i;
            for (size_t t = 0; t < taps.size(); ++t) {
              const bool centre = !taps[t].z && !taps[t].y && !taps[t].x;
              const bool live = block + j < co && (!centre || !a.centre || a.centre[o * per + c]);
              panel[(int64_t(t) * ci + i) * width + j] = live ? weight[(o * per + c) * a.kernel + taps[t].index] : T(0);
            }
          }
        }
    const int64_t wide = padded<T>(co);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t j = 0; j < wide; ++j)
        bias.get()[g * wide + j] = !transposed && a.bias && j < co ? static_cast<const T*>(a.bias)[g * co + j] : T(0);
  }
};

template <class T>
void convolve(const MaskedConvArgs& a, const Convolution<T>& c, const Source<T>& source, T* y, const int64_t* ys, bool relu) {
  const Border& b = c.border;
  const int64_t ci = c.in / c.groups, co = c.out / c.groups, halo = b.y0 + b.y1, slices = b.z0 + 1 + b.z1;
  // Columns and rows of a task: what stays in the cache, and enough tasks for the threads.
  const int64_t fit = kCache / int64_t(sizeof(T)) / std::max<int64_t>(1, c.in * slices);
  const int64_t columns = std::min(a.w, std::max<int64_t>({96, fit / (1 + halo) - b.x0 - b.x1, b.x0 + b.x1}));
  const int64_t across = (a.w + columns - 1) / columns, pitch = (b.x0 + columns + b.x1) * c.in;
  const int64_t whole = a.n * a.d * across, share = whole >= a.threads ? a.h : (a.h * whole + a.threads - 1) / a.threads;
  const int64_t tall = fit * c.in / pitch - halo;
  const int64_t rows = std::max<int64_t>(1, std::min({a.h, share, std::max<int64_t>(tall, 4)}));
  const int64_t down = (a.h + rows - 1) / rows, chunks = down * across, plane = (rows + halo) * pitch;
  const std::vector<Run> found = runs(c.taps, c.groups == 1);
  const int64_t k = int64_t(c.taps.size()) * ci, wide = padded<T>(c.out);
  const int64_t slack = 2 * block_columns<T>();
  const PerThread<T> copies(a.threads, slices * plane + slack), lines(a.threads, columns * wide + slack);
  const PerThread<Segment> all_segments(a.threads, int64_t(found.size()));
#pragma omp parallel num_threads(a.threads)
  {
    T *const copy = copies.get(), *const line = lines.get();
    Segment* const segments = all_segments.get();
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.n * a.d * chunks; ++task) {
      const int64_t n = task / (a.d * chunks), z = task / chunks % a.d;
      const int64_t y0 = task % chunks / across * rows, y1 = std::min(a.h, y0 + rows);
      const int64_t x0 = task % across * columns, count = std::min(a.w, x0 + columns) - x0;
      for (int64_t s = 0; s < slices; ++s)
        copy_block(source, n, z - b.z0 + s, y0 - b.y0, y1 + b.y1, x0 - b.x0, x0 + columns + b.x1, a, c.in,
                   copy + s * plane);
      for (int64_t g = 0; g < c.groups; ++g)
        for (int64_t block = 0; block < co; block += block_columns<T>()) {
          const int64_t width = std::min(block_columns<T>(), padded<T>(co - block)), nv = width / lanes<T>();
          const T* panel = c.panels.get() + (g * padded<T>(co) + block) * k;
          for (int64_t row = y0; row < y1; ++row) {
            size_t used = 0;
            int64_t at = 0;
            for (const Run& r : found) {
              const Tap& t = c.taps[r.first];
              const int64_t length = int64_t(r.count) * ci;
              if (row + t.y >= 0 && row + t.y < a.h && z + t.z >= 0 && z + t.z < a.d)
                segments[used++] = {(b.z0 + t.z) * plane + t.y * pitch + t.x * c.in, at * width, length};
              at += length;
            }
            const T* base = copy + (row - y0 + b.y0) * pitch + b.x0 * c.in + g * ci;
            const bool direct = ys[1] == 1;
            T* out = y + n * ys[0] + z * ys[2] + row * ys[3] + x0 * ys[4] + (g * co + block) * ys[1];
            for (int64_t tile = 0; tile < tiles(count); ++tile) {
              const int64_t x = tile_start(count, tile), height = tile_start(count, tile + 1) - x;
              Positions<T> end{c.bias.get() + g * padded<T>(co) + block, nullptr, wide, std::min(width, co - block), relu};
              end.out = direct ? out + x * ys[4] : line + x * wide;
              if (direct) end.ld = ys[4];
              run<T>(height, nv, end, base + x * c.in, c.in, 1, segments, int64_t(used), panel, width);
            }
            if (direct) continue;
            if (ys[4] == 1) {
              transpose<T>(line, wide, count, std::min(width, co - block), out, ys[1]);
              continue;
            }
            for (int64_t j = 0; j < std::min(width, co - block); ++j)
              for (int64_t x = 0; x < count; ++x) out[j * ys[1] + x * ys[4]] = line[x * wide + j];
          }
        }
    }
  }
}

// x with its border and d without, whole, as (sample, slice, row, column, channel); then tile after tile of the gradient.
template <class T>
void weight_gradient(const MaskedConvArgs& a, const std::vector<Tap>& taps, const Source<T>& x_source, const T* d) {
  const Border b(taps);
  const int64_t per = a.cin / a.groups, co = a.cout / a.groups, pitch = (b.x0 + a.w + b.x1) * a.cin;
  const int64_t plane = (b.y0 + a.h + b.y1) * pitch, depth = b.z0 + a.d + b.z1, wide = padded<T>(co);
  Buffer<T> copy(a.n * depth * plane);
  const int64_t tall = b.y0 + a.h + b.y1, long_row = b.x0 + a.w + b.x1, piece = std::min<int64_t>(long_row, 4096);
  const int64_t pieces = (long_row + piece - 1) / piece;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t i = 0; i < a.n * depth * tall * pieces; ++i) {
    const int64_t row = i / pieces, x = i % pieces * piece - b.x0, y = row % tall - b.y0, slice = row / tall;
    copy_block(x_source, slice / depth, slice % depth - b.z0, y, y + 1, x, std::min(x + piece, a.w + b.x1), a, a.cin,
               copy.get() + row * pitch + (x + b.x0) * a.cin);
  }
  struct Item {
    int64_t a, d, out, height, nv, z, y;
  };
  std::vector<Item> items;
  const std::vector<Run> found = runs(taps, a.groups == 1);
  for (int64_t g = 0; g < a.groups; ++g)
    for (const Run& r : found) {
      const Tap& t = taps[r.first];
      const int64_t m = int64_t(r.count) * per, to = (g * int64_t(taps.size()) + int64_t(r.first)) * per;
      for (int64_t block = 0; block < co; block += block_columns<T>())
        for (int64_t tile = 0; tile < tiles(m); ++tile) {
          const int64_t first = tile_start(m, tile), nv = std::min(block_columns<T>(), padded<T>(co - block)) / lanes<T>();
          const int64_t at = (b.z0 + t.z) * plane + (b.y0 + t.y) * pitch + (b.x0 + t.x) * a.cin + g * per + first;
          items.push_back({at, g * co + block, (to + first) * wide + block, tile_start(m, tile + 1) - first, nv, t.z, t.y});
        }
    }
  const int64_t size = a.groups * int64_t(taps.size()) * per * wide;
  Buffer<T> sums(size);
  const int64_t positions = std::max<int64_t>(64, kCache / int64_t(sizeof(T)) / std::max<int64_t>(1, a.cout));
  const int64_t columns = std::min(a.w, positions), rows = std::max<int64_t>(1, std::min(a.h, positions / columns));
  memset(sums.get(), 0, size_t(size) * sizeof(T));
  const PerThread<Segment> all_segments(a.threads, rows);
#pragma omp parallel num_threads(a.threads)
  {
    Segment* const segments = all_segments.get();
    for (int64_t n = 0; n < a.n; ++n)
      for (int64_t z = 0; z < a.d; ++z) {
        const T* base = copy.get() + (n * depth + z) * plane;
        for (int64_t y0 = 0; y0 < a.h; y0 += rows)
          for (int64_t x0 = 0; x0 < a.w; x0 += columns) {  // a block of d that stays in the cache while all items use it
            const int64_t y1 = std::min(a.h, y0 + rows), count = std::min(columns, a.w - x0);
            for (int64_t y = y0; y < y1; ++y)
              segments[y - y0] = {y * pitch + x0 * a.cin, (((n * a.d + z) * a.h + y) * a.w + x0) * a.cout, count};
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < int64_t(items.size()); ++i) {
              const Item& item = items[size_t(i)];
              if (z + item.z < 0 || z + item.z >= a.d) continue;
              const int64_t from = std::max(y0, -item.y), to = std::min(y1, a.h - item.y);  // rows that meet x
              if (from >= to) continue;
              run<T>(item.height, item.nv, Onto<T>{sums.get() + item.out, wide, false}, base + item.a, 1, a.cin,
                     segments + (from - y0), to - from, d + item.d, a.cout);
            }
          }
      }
  }
  T* grad = static_cast<T*>(a.grad_weight);
  memset(grad, 0, size_t(a.cout * per * a.kernel) * sizeof(T));
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t o = 0; o < a.cout; ++o)
    for (int64_t i = 0; i < per; ++i)
      for (size_t t = 0; t < taps.size(); ++t) {
        const bool centre = !taps[t].z && !taps[t].y && !taps[t].x;
        if (centre && a.centre && !a.centre[o * per + i]) continue;
        const int64_t row = (o / co * int64_t(taps.size()) + int64_t(t)) * per + i;
        grad[(o * per + i) * a.kernel + taps[t].index] = sums.get()[row * wide + o % co];
      }
}

// Taps that a dilation puts farther away than the image is large meet zeros alone; left out, they widen no border.
std::vector<Tap> taps_of(const MaskedConvArgs& a) {
  const auto within = [](int64_t offset, int64_t size) { return -size < offset && offset < size; };
  std::vector<Tap> taps;
  for (int64_t t = 0; t < a.tap_count; ++t) {
    const Tap tap{a.taps[4 * t], a.taps[4 * t + 1], a.taps[4 * t + 2], a.taps[4 * t + 3]};
    if (within(tap.z, a.d) && within(tap.y, a.h) && within(tap.x, a.w)) taps.push_back(tap);
  }
  return taps;
}

template <class T>
void forward(const MaskedConvArgs& a) {
  const Source<T> x{static_cast<const T*>(a.x), a.x_stride, nullptr, nullptr};
  convolve<T>(a, Convolution<T>(a, false, taps_of(a)), x, static_cast<T*>(a.y), a.y_stride, a.relu);
}

template <class T>
void backward(const MaskedConvArgs& a) {
  const std::vector<Tap> taps = taps_of(a);
  Source<T> d{static_cast<const T*>(a.grad_y), a.grad_stride, a.relu ? static_cast<const T*>(a.saved) : nullptr, a.saved_stride};
  const int64_t dense[5] = {a.d * a.h * a.w * a.cout, 1, a.h * a.w * a.cout, a.w * a.cout, a.cout};
  const bool sums = a.grad_weight || a.grad_bias;
  const bool lies_so = !a.relu && std::equal(dense, dense + 5, a.grad_stride) && !(a.cout % block_columns<T>());
  Buffer<T> copy(sums && !lies_so ? a.n * dense[0] : 0);
  if (sums && !lies_so) {
    const int64_t piece = std::min<int64_t>(a.w, 4096), pieces = (a.w + piece - 1) / piece;
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t i = 0; i < a.n * a.d * a.h * pieces; ++i) {
      const int64_t row = i / pieces, y = row % a.h, slice = row / a.h, x = i % pieces * piece;
      copy_block(d, slice / a.d, slice % a.d, y, y + 1, x, std::min(a.w, x + piece), a, a.cout,
                 copy.get() + row * dense[3] + x * a.cout);
    }
    d = {copy.get(), dense, nullptr, nullptr};
  }
  if (a.grad_bias) {
    const int64_t all = a.n * a.d * a.h * a.w, groups = std::min<int64_t>(all, 64);  // whatever the number of threads
    std::vector<double> parts(size_t(groups * a.cout));
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t i = all * g / groups; i < all * (g + 1) / groups; ++i)
        for (int64_t o = 0; o < a.cout; ++o) parts[size_t(g * a.cout + o)] += double(d.data[i * a.cout + o]);
    for (int64_t o = 0; o < a.cout; ++o) {
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += parts[size_t(g * a.cout + o)];
      static_cast<T*>(a.grad_bias)[o] = T(sum);
    }
  }
  if (a.grad_weight) weight_gradient<T>(a, taps, {static_cast<const T*>(a.x), a.x_stride, nullptr, nullptr}, d.data);
  if (!a.y) return;
  std::vector<Tap> mirrored(taps.rbegin(), taps.rend());
  for (Tap& t : mirrored) t = {-t.z, -t.y, -t.x, t.index};
  convolve<T>(a, Convolution<T>(a, true, mirrored), d, static_cast<T*>(a.y), a.y_stride, false);
}

}  // namespace

namespace {

// Waking threads costs more than a small product.
MaskedConvArgs with_threads(const MaskedConvArgs& args) {
  MaskedConvArgs a = args;
  if (a.n * a.d * a.h * a.w * a.tap_count * a.cin * a.cout / a.groups < 1 << 17) a.threads = 1;
  return a;
}

}  // namespace

GENFAST_KERNEL(masked_conv, MaskedConvArgs, forward<T>(with_threads(a)))
GENFAST_KERNEL(masked_conv_backward, MaskedConvArgs, backward<T>(with_threads(a)))

}  // namespace GENFAST_ISA
}  // namespace genfast
