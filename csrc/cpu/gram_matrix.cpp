// Gram matrices G = scale (F + shift)(F + shift)^T of features F (C, S), and the style loss
// L = factor sum_ij (G_ij - A_ij)^2 (Gatys et al., arXiv:1508.06576, section 2); x (N, C, S) in either order, G (N, C, C).
//
// Only tiles at and below the diagonal are computed, C^2 S FLOPs and what tiles on the diagonal waste; F is packed once, for both
// sides. The mirror pass writes both halves, and there scales, takes the difference from A, and its square: G is never written
// for the loss. x is read once, C^2 elements are written. Bound by the FMA rate; at C = 64 a third of the time is reading and packing.
// Long S with few channels is cut into groups, summed apart and added in order. Groups and order depend on the sizes alone.
//
// The backward, scale M (F + shift) with M = dG + dG^T or the kept difference, is one product of gemm.h: 2 C^2 S FLOPs.
#include "dtype_switch.h"
#include "gemm.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kEdge = 16;                  // of a block of the mirror pass
constexpr int64_t kTerms = 512;                // of a run, after which a sum is added to the sums before
constexpr int64_t kGroup = 2048;               // positions that are worth a sum of their own
constexpr int64_t kMaxGroups = 16;
constexpr int64_t kGroupCache = 256 << 10;     // bytes of sums up to which groups are made: they stay in the second-level cache
constexpr int64_t kAtOnce = 32;                // groups of several samples that are kept until they are added
constexpr int64_t kStreamed = 4 << 20;         // bytes of an output from which it is stored past the caches
constexpr int64_t kPiece = 6;                  // tiles of a task where threads share a sample

template <class T>
class Gram {
 public:
  explicit Gram(const GramArgs& a)
      : a_(a), ld_(padded<T>(a.c)), rows_((a.c + kEdge - 1) / kEdge), groups_(groups(a.c, a.s)), longest_(longest(a.s, groups_)) {}

  void run_all() {
    const int64_t flops = a_.n * a_.c * a_.c * a_.s;
    const int threads = flops < 1 << 17 ? 1 : a_.threads;  // waking threads costs more than a small product
    static thread_local Scratch kept;
    double* squares = a_.target ? kept.get<double>(a_.n * rows_) : nullptr;
    const int64_t units = a_.n * groups_;
    if (threads == 1 || units % threads == 0 || units >= 4 * threads)
      apart(threads, squares);
    else
      together(threads, squares);
    for (int64_t n = 0; a_.target && n < a_.n; ++n) {
      double sum = 0;
      for (int64_t i = 0; i < rows_; ++i) sum += squares[n * rows_ + i];
      static_cast<T*>(a_.value)[n] = T(a_.factor * sum);
    }
  }

 private:
  static int64_t groups(int64_t c, int64_t s) {
    if (c * padded<T>(c) * int64_t(sizeof(T)) > kGroupCache) return 1;
    return std::max<int64_t>(1, std::min(kMaxGroups, s / kGroup));
  }

  static int64_t longest(int64_t s, int64_t groups) {
    const int64_t most = (s + groups - 1) / groups, runs = std::max<int64_t>(1, (most + kTerms - 1) / kTerms);
    return std::max<int64_t>(1, (most + runs - 1) / runs);
  }

  Strided<T> features(int64_t n) const {
    return {static_cast<const T*>(a_.x.data) + n * a_.x.n, a_.channels_last ? 1 : a_.x.c, a_.channels_last ? a_.x.s : 1};
  }

  // One group of a sample, by one thread.
  void group(int64_t n, int64_t g, const Panels<T>& panels, T* sums) const {
    const int64_t begin = a_.s * g / groups_, end = a_.s * (g + 1) / groups_;
    for (int64_t k0 = begin; k0 < end || k0 == begin; k0 += longest_) {
      const int64_t count = std::min(longest_, end - k0);
      for (int64_t p = 0; p < panels.count(); ++p) pack_panel(panels, p, features(n), k0, count, T(a_.shift));
      for (int64_t p = 0; p < panels.count(); ++p)
        for (int64_t q = p; q < panels.count(); ++q)
          triangle_tiles(panels, q, p, 0, tiles(panels.live(q)), count, sums, ld_, k0 == begin);
    }
  }

  // Threads take groups of samples.
  void apart(int threads, double* squares) const {
    const int64_t size = a_.c * ld_, samples = groups_ == 1 ? a_.n : std::max<int64_t>(1, kAtOnce / groups_);
    static thread_local Scratch shared;
    static thread_local TeamScratch panel_scratch, sum_scratch;
    T* all = groups_ == 1 ? nullptr : shared.get<T>(samples * groups_ * size);
    const Slices<T> all_panels = panel_scratch.get<T>(threads, Panels<T>::elements(a_.c, longest_));
    const Slices<T> own_sums = sum_scratch.get<T>(threads, all ? 0 : size);
#pragma omp parallel num_threads(threads)
    {
      const Panels<T> panels{all_panels.get(), a_.c, longest_};
      T* own = all ? nullptr : own_sums.get();
      for (int64_t base = 0; base < a_.n; base += samples) {
        const int64_t here = std::min(samples, a_.n - base);
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < here * groups_; ++unit) {
          const int64_t n = base + unit / groups_;
          group(n, unit % groups_, panels, all ? all + unit * size : own);
          for (int64_t i = 0; !all && i < rows_; ++i) mirror(n, i, own, squares);
        }
        if (!all) continue;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < here * rows_; ++task) {
          const int64_t n = task / rows_;
          mirror(base + n, task % rows_, all + n * groups_ * size, squares);
        }
      }
    }
  }

  // Threads share the packing and the tiles of a sample.
  void together(int threads, double* squares) const {
    const int64_t size = a_.c * ld_;
    static thread_local Scratch panel_scratch, sum_scratch;
    const Panels<T> panels{panel_scratch.get<T>(Panels<T>::elements(a_.c, longest_)), a_.c, longest_};
    T* sums = sum_scratch.get<T>(groups_ * size);
    const int64_t across = panels.count(), most = tiles(block_columns<T>()), pieces = (most + kPiece - 1) / kPiece;
#pragma omp parallel num_threads(threads)
    for (int64_t n = 0; n < a_.n; ++n) {
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t begin = a_.s * g / groups_, end = a_.s * (g + 1) / groups_;
        for (int64_t k0 = begin; k0 < end || k0 == begin; k0 += longest_) {
          const int64_t count = std::min(longest_, end - k0);
#pragma omp for schedule(static)
          for (int64_t p = 0; p < across; ++p) pack_panel(panels, p, features(n), k0, count, T(a_.shift));
#pragma omp for schedule(dynamic, 1)
          for (int64_t task = 0; task < across * across * pieces; ++task) {
            const int64_t p = task / pieces / across, q = task / pieces % across, piece = task % pieces;
            if (q < p) continue;
            const int64_t down = tiles(panels.live(q));
            triangle_tiles(panels, q, p, down * piece / pieces, down * (piece + 1) / pieces, count, sums + g * size, ld_, k0 == begin);
          }
        }
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < rows_; ++i) mirror(n, i, sums, squares);
    }
  }

  // A row of blocks, and the column that it mirrors.
  void mirror(int64_t n, int64_t row, const T* sums, double* squares) const {
    const int64_t i0 = row * kEdge, height = std::min(kEdge, a_.c - i0);
    double square = 0;
    for (int64_t j0 = 0; j0 <= i0; j0 += kEdge) {
      const int64_t width = std::min(kEdge, a_.c - j0);
      square += height == kEdge && width == kEdge ? block<true>(n, i0, j0, kEdge, kEdge, sums)
                                                  : block<false>(n, i0, j0, height, width, sums);
    }
    if (a_.target) squares[n * rows_ + row] = square;
  }

  template <bool kWhole>
  double block(int64_t n, int64_t i0, int64_t j0, int64_t height, int64_t width, const T* sums) const {
    alignas(64) T g[kEdge * kEdge];
    if (kWhole) height = width = kEdge;
    const T scale = T(a_.scale);
    for (int64_t i = 0; i < height; ++i) {
      const T* from = sums + (i0 + i) * ld_ + j0;
      T sum[kEdge];
      for (int64_t j = 0; j < width; ++j) sum[j] = from[j];
      for (int64_t part = 1; part < groups_; ++part)
        for (int64_t j = 0; j < width; ++j) sum[j] += from[part * a_.c * ld_ + j];
      for (int64_t j = 0; j < width; ++j) g[i * kEdge + j] = scale * sum[j];
    }
    if (i0 == j0)
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = i + 1; j < width; ++j) g[i * kEdge + j] = g[j * kEdge + i];
    const double square = a_.target ? difference(n, i0, j0, height, width, g) : 0;
    T* out = static_cast<T*>(a_.out) + n * a_.c * a_.c;
    for (int64_t i = 0; i < height; ++i) memcpy(out + (i0 + i) * a_.c + j0, g + i * kEdge, size_t(width) * sizeof(T));
    if (i0 != j0) transpose(g, kEdge, height, width, out + j0 * a_.c + i0, a_.c);
    return square;
  }

  // g becomes the symmetric part of g - A, and the squares of g - A are summed, those of the mirrored block too.
  GENFAST_INLINE_MEMBER double difference(int64_t n, int64_t i0, int64_t j0, int64_t height, int64_t width, T* g) const {
    const T* target = static_cast<const T*>(a_.target) + n * a_.target_stride;
    alignas(64) T mirrored[kEdge * kEdge];
    transpose(target + j0 * a_.c + i0, a_.c, width, height, mirrored, kEdge);
    T squares[kEdge] = {};
    for (int64_t i = 0; i < height; ++i) {
      const T* a = target + (i0 + i) * a_.c + j0;
      for (int64_t j = 0; j < width; ++j) {
        const T here = g[i * kEdge + j] - a[j], there = g[i * kEdge + j] - mirrored[i * kEdge + j];
        squares[j] += i0 == j0 ? here * here : here * here + there * there;
        g[i * kEdge + j] -= (a[j] + mirrored[i * kEdge + j]) / 2;
      }
    }
    double sum = 0;
    for (int64_t j = 0; j < kEdge; ++j) sum += squares[j];
    return sum;
  }

  const GramArgs& a_;
  int64_t ld_, rows_, groups_, longest_;
};

template <class T>
struct Scaled {  // the epilogue of the backward: of x's shift a bias a row, or a column where channels are columns
  T* out;
  int64_t columns;
  T scale;
  const T *row_bias, *column_bias;
  bool streams;  // past the caches, which a large output would only pass through

  void operator()(const T* tile, int64_t row, int64_t height, int64_t column, int64_t width) const {
    constexpr int n = lanes<T>();
    const int64_t count = std::min(width, columns - column);
    for (int64_t m = 0; m < height; ++m, tile += width) {
      T* to = out + (row + m) * columns + column;
      const T bias = row_bias ? row_bias[row + m] : T(0);
      for (int64_t j = 0; j < count; j += n) {
        const int part = count - j >= n ? n : int(count - j);
        Vec<T> y = load(tile + j) + bias;
        if (column_bias) y += part == n ? load(column_bias + column + j) : load_part(column_bias + column + j, part);
        if (part < n)
          store_part(to + j, scale * y, part);
        else
          streams ? stream(to + j, scale * y) : store(to + j, scale * y);
      }
    }
  }
};

template <class T>
void backward_sample(const GramBackwardArgs& a, int64_t n, int threads) {
  static thread_local Scratch matrix_scratch, bias_scratch;
  const T* matrix = static_cast<const T*>(a.matrix) + n * a.c * a.c;
  if (a.symmetrize) {
    T* sum = matrix_scratch.get<T>(a.c * a.c);
    alignas(64) T turned[kEdge * kEdge];
    for (int64_t i0 = 0; i0 < a.c; i0 += kEdge)
      for (int64_t j0 = 0; j0 < a.c; j0 += kEdge) {
        const int64_t height = std::min(kEdge, a.c - i0), width = std::min(kEdge, a.c - j0);
        transpose(matrix + j0 * a.c + i0, a.c, width, height, turned, kEdge);
        for (int64_t i = 0; i < height; ++i)
          for (int64_t j = 0; j < width; ++j) sum[(i0 + i) * a.c + j0 + j] = matrix[(i0 + i) * a.c + j0 + j] + turned[i * kEdge + j];
      }
    matrix = sum;
  }
  T* bias = nullptr;
  if (a.shift != 0) {
    bias = bias_scratch.get<T>(a.c);
    for (int64_t i = 0; i < a.c; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < a.c; ++j) sum += matrix[i * a.c + j];
      bias[i] = T(a.shift * sum);
    }
  }
  const T scale = T(a.scale * (a.grad ? static_cast<const T*>(a.grad)[n] : T(1)));
  const T* x = static_cast<const T*>(a.x.data) + n * a.x.n;
  T* out = static_cast<T*>(a.out) + n * a.c * a.s;
  const int64_t rows = a.channels_last ? a.s : a.c, columns = a.channels_last ? a.c : a.s;
  const bool streams = a.n * a.c * a.s * int64_t(sizeof(T)) >= kStreamed && aligned(out) && columns % lanes<T>() == 0;
  const Scaled<T> end{out, columns, scale, a.channels_last ? nullptr : bias, a.channels_last ? bias : nullptr, streams};
  if (a.channels_last)
    product<T>(rows, columns, a.c, {x, a.x.s, 1}, {matrix, 1, a.c}, out, columns, threads, end);
  else
    product<T>(rows, columns, a.c, {matrix, a.c, 1}, {x, a.x.c, 1}, out, columns, threads, end);
}

template <class T>
void backward(const GramBackwardArgs& a) {
  const int64_t flops = a.c * a.c * a.s;
  const int threads = a.n * flops < 1 << 17 ? 1 : a.threads;
  if (threads == 1 || a.n % threads == 0 || a.n >= 4 * threads) {
    TaskFailure failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t n = 0; n < a.n; ++n) failure.run([&] { backward_sample<T>(a, n, 1); });
    failure.rethrow();
  } else {
    for (int64_t n = 0; n < a.n; ++n) backward_sample<T>(a, n, threads);
  }
}

}  // namespace

GENFAST_KERNEL(gram_matrix, GramArgs, if (a.n && a.c) Gram<T>(a).run_all())
GENFAST_KERNEL(gram_matrix_backward, GramBackwardArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
