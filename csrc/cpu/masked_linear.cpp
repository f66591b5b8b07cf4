// A linear layer whose mask is a staircase after sorting (MADE, arXiv:1502.03509, section 4), y = act(x (W o M)^T + b), and its
// backward, dx = g (W o M), dW = (g^T x) o M and db = sum of g, where g is dy, or dy where relu gave y > 0.
//
// Each side of the weight is taken in an order in which its units reach ever more, or ever fewer, of the other side: as they
// lie where that is such an order (sorted degrees, rising or falling), sorted where it is not, and what is sorted is gathered
// on the way in and spread on the way out, by rows that one thread owns. A unit that reaches L units is then joined to the
// first or to the last L of the other side, so a panel of outputs needs one interval of terms, and each vector of the panel a
// part of it: the tile drops a vector where its terms end. Of the 2 N I O FLOPs of the dense product it does the live half and
// half a vector's width along the diagonal. The weight is packed, without what is dead, once a call: its live part is read
// once. Bound by the FMA rate from batches of some ten on; a batch below is bound by reading the weight, of which it takes dot
// products as it lies.
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kDots = 4;         // samples that dot products with the weight as it lies serve best
constexpr int64_t kBlockTiles = 16;  // tiles of rows that share a panel while it is in the second-level cache

// Inputs or outputs in the order in which tiles take them. A thread keeps the memory from call to call.
template <class T>
struct Side {
  int64_t count = 0;
  bool rising = false;         // whether later positions reach more
  bool sorted = false;         // else positions are units
  std::vector<int32_t> unit;   // of a position, where sorted
  std::vector<int32_t> place;  // position of a unit, where sorted
  std::vector<T> reach;        // units of the other side that a position is joined to; zeros to a whole vector

  int64_t blocks() const { return (count + block_columns<T>() - 1) / block_columns<T>(); }
};

static inline bool identity(const int64_t* order, int64_t count) {
  int64_t differs = 0;
  for (int64_t p = 0; p < count; ++p) differs |= order[p] ^ p;
  return !differs;
}

// `side.reach` holds the reach of sorted positions. Units are taken as they lie, if their reach rises or falls all along so; else
// sorted. False where `order` is no permutation.
template <class T>
bool arrange(Side<T>& side, const int64_t* order, bool rising) {
  side.sorted = false, side.rising = rising;
  if (identity(order, side.count)) return true;
  static thread_local std::vector<T> natural;
  natural.assign(side.reach.size(), T(0));
  side.place.assign(size_t(side.count), -1);
  for (int64_t p = 0; p < side.count; ++p) {
    const int64_t unit = order[p];
    if (unit < 0 || unit >= side.count || side.place[size_t(unit)] >= 0) return false;
    side.place[size_t(unit)] = int32_t(p);
    natural[size_t(unit)] = side.reach[size_t(p)];
  }
  bool rises = true, falls = true;
  for (int64_t u = 1; u < side.count; ++u) {
    rises = rises && natural[size_t(u)] >= natural[size_t(u - 1)];
    falls = falls && natural[size_t(u)] <= natural[size_t(u - 1)];
  }
  if (rises || falls) {
    side.rising = rises;
    side.reach.swap(natural);
    return true;
  }
  side.sorted = true;
  side.unit.assign(order, order + side.count);
  return true;
}

// Both sides of a staircase, or false where rows or columns are no permutations or counts no staircase.
template <class T>
bool read_sides(const MaskedLinearArgs& a, Side<T>& outputs, Side<T>& inputs) {
  const int64_t o = outputs.count = a.outputs, i = inputs.count = a.inputs;
  outputs.reach.assign(size_t(padded<T>(o)), T(0));
  inputs.reach.assign(size_t(padded<T>(i)), T(0));
  bool falls = o && (a.counts[0] < 0 || a.counts[o - 1] > i);
  for (int64_t r = 1; r < o; ++r) falls |= a.counts[r] < a.counts[r - 1];
  if (falls) return false;
  for (int64_t r = 0; r < o; ++r) outputs.reach[size_t(r)] = T(a.counts[r]);
  for (int64_t r = 0, k = 0; r < o; ++r)  // inputs before the r-th output's count are joined to it and to those after it
    for (; k < a.counts[r]; ++k) inputs.reach[size_t(k)] = T(o - r);
  return arrange(outputs, a.rows, true) && arrange(inputs, a.columns, false);
}

// A panel: up to kMaxVectors vectors of units of one side, in slots, the one that reaches most first, over the positions of the
// other side that any of them is joined to.
struct Panel {
  bool rising;  // whether later terms reach more, and all slots share the last
  int64_t slots, begin, offset;
  int64_t first[kMaxVectors];       // position of a slot's first unit
  int64_t length[kMaxVectors + 1];  // terms of a slot; of the one after the last, 0
};

template <class T>
Panel panel_of(const Side<T>& outer, const Side<T>& inner, int64_t p) {
  Panel panel{};
  const int64_t start = p * block_columns<T>();
  panel.slots = vectors<T>(std::min(block_columns<T>(), outer.count - start));
  for (int64_t s = 0; s < panel.slots; ++s) {
    panel.first[s] = start + (outer.rising ? panel.slots - 1 - s : s) * lanes<T>();
    const int64_t last = std::min(panel.first[s] + lanes<T>(), outer.count) - 1;
    panel.length[s] = int64_t(outer.reach[outer.rising ? last : panel.first[s]]);
  }
  panel.rising = inner.rising;
  panel.begin = inner.rising ? inner.count - panel.length[0] : 0;
  return panel;
}

// Where the sums of a tile go, and what follows them.
template <class T>
struct Target {
  T* data;
  int64_t ld;
  const int64_t* column;  // of a slot
  int64_t slots;
  bool add;       // to what is there, the sums of terms before
  const T* bias;  // null where there is none, or terms follow
  bool relu;
};

// The terms [from[n], to[n]) with the first n vectors, for n = N down to 1.
template <class T, int MR, int N>
GENFAST_INLINE void stages(const T* a, int64_t ld, const T* b, int64_t width, const int64_t* from, const int64_t* to,
                           Vec<T> (&acc)[MR][kMaxVectors]) {
  if constexpr (N > 0) {
    const T* left = a + from[N];
    const T* right = b + from[N] * width;
    for (int64_t k = to[N] - from[N]; k > 0; --k, ++left, right += width) {
      Vec<T> row[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) row[v] = load(right + v * lanes<T>());
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec<T> x = splat(left[m * ld]);
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) acc[m][v] += x * row[v];
      }
    }
    stages<T, MR, N - 1>(a, ld, b, width, from, to, acc);
  }
}

template <class T, int MR>
static __attribute__((noinline)) void staged_tile(const T* a, int64_t ld, const T* b, int64_t width, const int64_t* from,
                                                  const int64_t* to, const Target<T>& target) {
  Vec<T> acc[MR][kMaxVectors] = {};
  stages<T, MR, kMaxVectors>(a, ld, b, width, from, to, acc);
#pragma GCC unroll 8
  for (int v = 0; v < kMaxVectors; ++v) {
    if (v >= target.slots) break;
    T* at = target.data + target.column[v];
    const Vec<T> bias = target.bias ? load(target.bias + target.column[v]) : Vec<T>{};
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m, at += target.ld) {
      Vec<T> y = acc[m][v] + bias;
      if (target.add) y += load(at);
      if (target.relu) y = y < T(0) ? Vec<T>{} : y;  // a NaN stays
      store(at, y);
    }
  }
}

// Terms [u0, u1) of a panel times `height` rows of a.
template <class T>
static void multiply_tile(int64_t height, const Panel& panel, int64_t u0, int64_t u1, const T* a, int64_t ld, const T* b,
                          const Target<T>& target) {
  // In which terms n vectors are alive: from the end that all share to where the n-th vector's terms end.
  int64_t from[kMaxVectors + 1], to[kMaxVectors + 1];
  for (int64_t n = 1; n <= kMaxVectors; ++n) {
    const int64_t near = n < panel.slots ? panel.length[n] : 0, far = n <= panel.slots ? panel.length[n - 1] : 0;
    const int64_t begin = panel.rising ? panel.length[0] - far : near, end = panel.rising ? panel.length[0] - near : far;
    from[n] = std::max(begin, u0), to[n] = std::min(end, u1);
  }
  const int64_t width = panel.slots * lanes<T>();
  switch (height) {
    case 1: return staged_tile<T, 1>(a, ld, b, width, from, to, target);
    case 2: return staged_tile<T, 2>(a, ld, b, width, from, to, target);
    case 3: return staged_tile<T, 3>(a, ld, b, width, from, to, target);
    case 4: return staged_tile<T, 4>(a, ld, b, width, from, to, target);
    case 5: return staged_tile<T, 5>(a, ld, b, width, from, to, target);
    default: return staged_tile<T, 6>(a, ld, b, width, from, to, target);
  }
}

// to[p] = from[at[p]]
template <class T>
static __attribute__((noinline)) void permute(const T* from, const int32_t* at, int64_t count, T* to) {
  for (int64_t p = 0; p < count; ++p) to[p] = from[at[p]];
}

// ---- a product with a packed staircase: out (rows, outer) = a (rows, inner) times the weight's live part ----

template <class T>
class Product {
 public:
  // across: outer units are the weight's rows (the forward pass); else its columns.
  Product(const MaskedLinearArgs& args, const Side<T>& outer, const Side<T>& inner, bool across)
      : args_(args), outer_(outer), inner_(inner), across_(across), panels_(static_cast<size_t>(outer.blocks())) {
    for (size_t p = 0; p < panels_.size(); ++p) {
      panels_[p] = panel_of(outer_, inner_, int64_t(p));
      panels_[p].offset = elements_;
      elements_ += panels_[p].slots * lanes<T>() * panels_[p].length[0];
    }
  }

  int64_t elements() const { return elements_; }
  int64_t panels() const { return int64_t(panels_.size()); }

  void pack(int64_t p, T* packed) const {
    const Panel& panel = panels_[p];
    const int64_t width = panel.slots * lanes<T>();
    T* to = packed + panel.offset;
    for (int64_t s = 0; s < panel.slots; ++s) {
      across_ ? pack_rows_of(panel, s, to + s * lanes<T>(), width) : pack_columns_of(panel, s, to + s * lanes<T>(), width);
      clear_dead(panel, s, to + s * lanes<T>(), width);
    }
  }

  // Tiles [from, to) of the `all` rows, of which a's first is the first here, against every panel. Into `out`, whose rows lie
  // `wide` apart; a panel that is not whole goes by `aside` (rows, block_columns()) where out has no room beyond its columns.
  void rows(const T* a, int64_t ld, int64_t from, int64_t to, int64_t all, const T* packed, const T* bias, bool relu, T* out,
            int64_t wide, T* aside) const {
    const int64_t start = tile_start(all, from), end = tile_start(all, to);
    for (const Panel& panel : panels_) {
      const int64_t begin = std::min(panel.first[0], panel.first[panel.slots - 1]);
      const bool whole = begin + panel.slots * lanes<T>() <= wide;
      T* data = whole ? out : aside - begin;
      const int64_t step = whole ? wide : block_columns<T>(), runs = inner_runs(panel.length[0]);
      for (int64_t part = 0; part < runs; ++part) {
        const int64_t u0 = panel.length[0] * part / runs, u1 = panel.length[0] * (part + 1) / runs;
        const bool last = part + 1 == runs;
        for (int64_t tile = from; tile < to; ++tile) {
          const int64_t row = tile_start(all, tile), height = tile_start(all, tile + 1) - row;
          const Target<T> target{data + (row - start) * step, step, panel.first, panel.slots, part > 0, last ? bias : nullptr,
                                 last && relu};
          multiply_tile(height, panel, u0, u1, a + (row - start) * ld + panel.begin, ld, packed + panel.offset, target);
        }
      }
      for (int64_t row = 0; !whole && row < end - start; ++row)
        memcpy(out + row * wide + begin, aside + row * block_columns<T>(), size_t(outer_.count - begin) * sizeof(T));
    }
  }

 private:
  // The slot's units are rows of the weight: transposed, where rows or columns are sorted from a copy of a run of them.
  void pack_rows_of(const Panel& panel, int64_t s, T* to, int64_t width) const {
    const int64_t first = panel.first[s], count = std::min<int64_t>(lanes<T>(), outer_.count - first), ld = args_.weight_row;
    const int64_t begin = inner_.rising ? inner_.count - panel.length[s] : 0, length = panel.length[s];
    const T* weight = static_cast<const T*>(args_.weight);
    to += (begin - panel.begin) * width;
    if (!outer_.sorted && !inner_.sorted) {
      transpose(weight + first * ld + begin, ld, count, length, to, width);
      return;
    }
    constexpr int64_t kRun = 256;
    T copy[lanes<T>() * kRun];
    for (int64_t t = 0; t < length; t += kRun) {
      const int64_t here = std::min(kRun, length - t);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = weight + (outer_.sorted ? outer_.unit[first + r] : first + r) * ld;
        if (inner_.sorted)
          permute(row, inner_.unit.data() + begin + t, here, copy + r * kRun);
        else
          memcpy(copy + r * kRun, row + begin + t, size_t(here) * sizeof(T));
      }
      transpose(copy, kRun, count, here, to + t * width, width);
    }
  }

  // The slot's units are columns of the weight.
  void pack_columns_of(const Panel& panel, int64_t s, T* to, int64_t width) const {
    const int64_t first = panel.first[s], count = std::min<int64_t>(lanes<T>(), outer_.count - first);
    const int64_t begin = inner_.rising ? inner_.count - panel.length[s] : 0;
    const T* weight = static_cast<const T*>(args_.weight);
    to += (begin - panel.begin) * width;
    for (int64_t t = begin; t < begin + panel.length[s]; ++t, to += width) {
      const T* row = weight + (inner_.sorted ? inner_.unit[t] : t) * args_.weight_row;
      if (outer_.sorted)
        for (int64_t j = 0; j < count; ++j) to[j] = row[outer_.unit[first + j]];
      else if (count == lanes<T>())
        store(to, load(row + first));
      else
        store(to, load_part(row + first, int(count)));
    }
  }

  // Zeros where a term is beyond a unit's reach, and in the lanes without a unit.
  void clear_dead(const Panel& panel, int64_t s, T* to, int64_t width) const {
    const Vec<T> reach = load(outer_.reach.data() + panel.first[s]);
    const int64_t least = panel.first[s] + lanes<T>() > outer_.count
                              ? 0
                              : int64_t(outer_.reach[outer_.rising ? panel.first[s] : panel.first[s] + lanes<T>() - 1]);
    for (int64_t d = least; d < panel.length[s]; ++d) {
      T* at = to + (inner_.rising ? panel.length[0] - 1 - d : d) * width;
      store(at, reach > T(d) ? load(at) : Vec<T>{});
    }
  }

  const MaskedLinearArgs& args_;
  const Side<T>&outer_, &inner_;
  const bool across_;
  std::vector<Panel> panels_;
  int64_t elements_ = 0;
};

// Sorted rows of `from` (n, count) between rows `begin` and `end`, dense.
template <class T>
const T* gathered(const Side<T>& side, const T* from, int64_t ld, int64_t begin, int64_t end, Scratch& scratch) {
  T* to = scratch.get<T>((end - begin) * side.count);
  for (int64_t row = begin; row < end; ++row) permute(from + row * ld, side.unit.data(), side.count, to + (row - begin) * side.count);
  return to;
}

// out (n, outer) = act(a (n, inner) W + bias) by blocks of rows, each of which one thread owns. a is in the order of positions
// already where `placed`.
template <class T>
void multiply(const Product<T>& product, const Side<T>& outer, const Side<T>& inner, const T* a, int64_t ld, bool placed, const T* bias,
              bool relu, T* out, int64_t n, int threads) {
  static thread_local Scratch shared;
  T* packed = shared.get<T>(product.elements());
  const int64_t down = tiles(n), step = std::max<int64_t>(1, std::min(kBlockTiles, down / (4 * threads)));
  const int64_t wide = outer.sorted ? padded<T>(outer.count) : outer.count, most = step * kMaxRows;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch row_scratch, a_scratch, aside_scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < product.panels(); ++p) product.pack(p, packed);
#pragma omp for schedule(dynamic, 1)
    for (int64_t base = 0; base < down; base += step) {
      const int64_t stop = std::min(down, base + step), begin = tile_start(n, base), end = tile_start(n, stop);
      T* rows = outer.sorted ? row_scratch.get<T>(most * wide) : out + begin * wide;
      T* aside = wide % lanes<T>() ? aside_scratch.get<T>(most * block_columns<T>()) : nullptr;
      const bool gather = inner.sorted && !placed;
      const T* left = gather ? gathered(inner, a, ld, begin, end, a_scratch) : a + begin * ld;
      product.rows(left, gather ? inner.count : ld, base, stop, n, packed, bias, relu, rows, wide, aside);
      for (int64_t row = begin; outer.sorted && row < end; ++row)
        permute(rows + (row - begin) * wide, outer.place.data(), outer.count, out + row * outer.count);
    }
  }
}

// A few samples: each output is a dot product of the weight's row as it lies, over the terms that it reaches.
template <class T, int N>
GENFAST_INLINE void dots(const MaskedLinearArgs& a, const Side<T>& outputs, const Side<T>& inputs, const T* place, int64_t p) {
  constexpr int kWidth = lanes<T>();
  const int64_t unit = outputs.sorted ? outputs.unit[p] : p, reach = int64_t(outputs.reach[p]);
  const int64_t begin = !inputs.sorted && inputs.rising ? inputs.count - reach : 0, end = inputs.sorted ? inputs.count : begin + reach;
  const T* row = static_cast<const T*>(a.weight) + unit * a.weight_row;
  const T* x = static_cast<const T*>(a.x);
  Vec<T> acc[2][N] = {};
  const auto live = [&](Vec<T> w, int64_t i) { return inputs.sorted ? (load(place + i) < T(reach) ? w : Vec<T>{}) : w; };
  int64_t i = begin;
  for (; i + 2 * kWidth <= end; i += 2 * kWidth)
    for (int h = 0; h < 2; ++h) {
      const Vec<T> w = live(load(row + i + h * kWidth), i + h * kWidth);
      for (int n = 0; n < N; ++n) acc[h][n] += w * load(x + n * a.x_row + i + h * kWidth);
    }
  for (; i < end; i += kWidth) {
    const int part = int(std::min<int64_t>(kWidth, end - i));
    const Vec<T> w = live(load_part(row + i, part), i);
    for (int n = 0; n < N; ++n) acc[0][n] += w * load_part(x + n * a.x_row + i, part);
  }
  for (int n = 0; n < N; ++n) {
    T y = sum<T>(acc[0][n] + acc[1][n]) + (a.bias ? static_cast<const T*>(a.bias)[unit] : T(0));
    static_cast<T*>(a.out)[n * a.outputs + unit] = a.relu && y < T(0) ? T(0) : y;
  }
}

template <class T, int N>
void all_dots(const MaskedLinearArgs& a, const Side<T>& outputs, const Side<T>& inputs, int threads) {
  std::vector<T> place(inputs.sorted ? size_t(padded<T>(inputs.count)) : 0);
  for (int64_t i = 0; inputs.sorted && i < inputs.count; ++i) place[size_t(i)] = T(inputs.place[i]);
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
  for (int64_t p = 0; p < outputs.count; ++p) dots<T, N>(a, outputs, inputs, place.data(), p);
}

int worth(const MaskedLinearArgs& a) {
  int64_t live = 0;
  for (int64_t r = 0; r < a.outputs; ++r) live += a.counts[r];
  return live * a.n < 1 << 17 ? 1 : a.threads;  // waking threads costs more than a small product
}

template <class T>
void forward(const MaskedLinearArgs& a) {
  static thread_local Side<T> outputs, inputs;
  *a.fits = read_sides(a, outputs, inputs);
  if (!*a.fits || !a.n || !a.outputs) return;
  const int threads = worth(a);
  switch (a.n) {
    case 1: return all_dots<T, 1>(a, outputs, inputs, threads);
    case 2: return all_dots<T, 2>(a, outputs, inputs, threads);
    case 3: return all_dots<T, 3>(a, outputs, inputs, threads);
    case 4: return all_dots<T, 4>(a, outputs, inputs, threads);
  }
  static_assert(kDots == 4, "one case for each batch");
  std::vector<T> bias(a.bias ? size_t(padded<T>(a.outputs)) : 0);
  for (int64_t p = 0; a.bias && p < a.outputs; ++p)
    bias[size_t(p)] = static_cast<const T*>(a.bias)[outputs.sorted ? outputs.unit[p] : p];
  const Product<T> product(a, outputs, inputs, true);
  multiply(product, outputs, inputs, static_cast<const T*>(a.x), a.x_row, false, a.bias ? bias.data() : nullptr, a.relu,
           static_cast<T*>(a.out), a.n, threads);
}

// ---- the weight's gradient ----

// How many inputs come before the nearest unit of a vector, from the end that outputs reach first.
template <class T>
int64_t nearest(const Side<T>& inputs, int64_t first) {
  return inputs.rising ? std::max<int64_t>(0, inputs.count - (first + lanes<T>())) : first;
}

template <class T>
static __attribute__((noinline)) void weight_tile(int64_t height, int64_t slots, const T* left, int64_t ld, const T* panel,
                                                  int64_t width, int64_t count, T* sums, bool first) {
  const Segment segment{0, 0, count};
  run<T>(height, slots, Onto<T>{sums, block_columns<T>(), first}, left, 1, ld, &segment, 1, panel, width);
}

// A sample's inputs into row k of a panel, zeros in the lanes without a unit.
template <class T>
static inline void pack_sample(const Side<T>& inputs, const Panel& panel, const T* x, T* panel_data, int64_t k) {
  T* to = panel_data + k * panel.slots * lanes<T>();
  for (int64_t s = 0; s < panel.slots; ++s, to += lanes<T>()) {
    const int64_t first = panel.first[s], count = std::min<int64_t>(lanes<T>(), inputs.count - first);
    if (inputs.sorted) {
      for (int64_t j = 0; j < count; ++j) to[j] = x[inputs.unit[first + j]];
      for (int64_t j = count; j < lanes<T>(); ++j) to[j] = T(0);
    } else {
      store(to, count == lanes<T>() ? load(x + first) : load_part(x + first, int(count)));
    }
  }
}

// The gradient of one output's weights from its sums, zeros where they are dead.
template <class T>
static void write_row(const MaskedLinearArgs& a, const Side<T>& outputs, const Side<T>& inputs, const std::vector<Panel>& panels,
                      int64_t row, const T* sums, T* sorted) {
  const int64_t place = outputs.rising ? outputs.count - 1 - row : row;
  T* out = static_cast<T*>(a.dw) + (outputs.sorted ? outputs.unit[row] : row) * inputs.count;
  for (const Panel& panel : panels) {
    for (int64_t s = 0; s < panel.slots; ++s) {
      const int64_t first = panel.first[s], left = inputs.count - first;
      const Vec<T> live = load(inputs.reach.data() + first) > T(place) ? load(sums + s * lanes<T>()) : Vec<T>{};
      if (inputs.sorted)
        store(sorted + first, live);
      else if (left >= lanes<T>())
        store(out + first, live);
      else
        store_part(out + first, live, int(left));
    }
    sums += kMaxRows * block_columns<T>();
  }
  if (inputs.sorted) permute(sorted, inputs.place.data(), inputs.count, out);
}

// g (n, outputs) in the order of positions: a tile of six outputs against the panels of inputs that any of them reaches, over
// runs of samples. What is dead is written as zeros.
template <class T>
void weight_gradient(const MaskedLinearArgs& a, const Side<T>& outputs, const Side<T>& inputs, const T* g, int64_t ld, int threads) {
  constexpr int64_t block = block_columns<T>();
  static thread_local Scratch panel_scratch, sum_scratch;
  const int64_t runs = inner_runs(a.n), longest = (a.n + runs - 1) / runs, down = tiles(a.outputs), across = inputs.blocks();
  const int64_t size = kMaxRows * across * block;
  T* panels = panel_scratch.get<T>(across * block * longest);
  T* all = runs == 1 ? nullptr : sum_scratch.get<T>(down * size);
  const T* x = static_cast<const T*>(a.x);
  std::vector<Panel> at(static_cast<size_t>(across));
  for (int64_t p = 0; p < across; ++p) at[size_t(p)] = panel_of(inputs, outputs, p);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch own_scratch, tile_scratch, row_scratch;
    T* sorted = row_scratch.get<T>(padded<T>(a.inputs));
    T* packed = tile_scratch.get<T>(kMaxRows * longest);
    T* own = own_scratch.get<T>(size);
    for (int64_t part = 0; part < runs; ++part) {
      const int64_t n0 = a.n * part / runs, count = a.n * (part + 1) / runs - n0;
#pragma omp for schedule(static)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t p = 0; p < across; ++p) pack_sample(inputs, at[size_t(p)], x + (n0 + k) * a.x_row, panels + p * block * longest, k);
#pragma omp for schedule(dynamic, 2)
      for (int64_t tile = 0; tile < down; ++tile) {
        const int64_t row = tile_start(a.outputs, tile), height = tile_start(a.outputs, tile + 1) - row;
        T* sums = all ? all + tile * size : own;
        const T* left = across > 1 ? packed : g + n0 * ld + row;  // one panel reads it once, as packing would
        if (across > 1) pack_rows<T>({g, 1, ld}, n0, count, row, height, packed);
        const int64_t most = int64_t(outputs.reach[outputs.rising ? row + height - 1 : row]);
        for (int64_t p = 0; p < across; ++p) {
          const Panel& panel = at[size_t(p)];
          int64_t live = 0;  // slots that some output of the tile reaches
          while (live < panel.slots && nearest(inputs, panel.first[live]) < most) ++live;
          if (!live) continue;
          weight_tile(height, live, left, across > 1 ? height : ld, panels + p * block * longest, panel.slots * lanes<T>(), count,
                      sums + p * kMaxRows * block, part == 0);
        }
        if (part + 1 < runs) continue;
        for (int64_t m = 0; m < height; ++m) write_row(a, outputs, inputs, at, row + m, sums + m * block, sorted);
      }
    }
  }
}


// ---- the backward ----

constexpr int64_t kRun = 512;  // samples that a bias gradient adds up at a time, so that a long sum loses little

// g = dy where y > 0 (or everywhere), in the order of positions.
template <class T>
void live_gradient(const MaskedLinearArgs& a, const Side<T>& outputs, T* g, int threads) {
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    T* row = outputs.sorted && a.y ? scratch.get<T>(padded<T>(a.outputs)) : nullptr;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.n; ++n) {
      const T* grad = static_cast<const T*>(a.grad) + n * a.grad_row;
      T* to = row ? row : g + n * a.outputs;
      if (a.y) {
        const T* y = static_cast<const T*>(a.y) + n * a.y_row;
        int64_t o = 0;
        for (; o + lanes<T>() <= a.outputs; o += lanes<T>()) store(to + o, load(y + o) > T(0) ? load(grad + o) : Vec<T>{});
        for (; o < a.outputs; ++o) to[o] = y[o] > T(0) ? grad[o] : T(0);
        grad = to;
      }
      if (outputs.sorted) permute(grad, outputs.unit.data(), a.outputs, g + n * a.outputs);
    }
  }
}

// db of a vector of positions.
template <class T>
void bias_gradient(const MaskedLinearArgs& a, const Side<T>& outputs, const T* g, int64_t ld, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < a.outputs; first += lanes<T>()) {
    const int part = int(std::min<int64_t>(lanes<T>(), a.outputs - first));
    Vec<T> total{};
    for (int64_t begin = 0; begin < a.n; begin += kRun) {
      Vec<T> sums{};
      for (int64_t n = begin; n < std::min(a.n, begin + kRun); ++n)
        sums += part == lanes<T>() ? load(g + n * ld + first) : load_part(g + n * ld + first, part);
      total += sums;
    }
    T lane[lanes<T>()];
    store(lane, total);
    for (int j = 0; j < part; ++j) static_cast<T*>(a.db)[outputs.sorted ? outputs.unit[first + j] : first + j] = lane[j];
  }
}

template <class T>
void backward(const MaskedLinearArgs& a) {
  static thread_local Side<T> outputs, inputs;
  *a.fits = read_sides(a, outputs, inputs);
  if (!*a.fits) return;
  const int threads = worth(a);
  const T* g = static_cast<const T*>(a.grad);
  int64_t ld = a.grad_row;
  if (a.y || outputs.sorted) {
    static thread_local Scratch scratch;
    T* made = scratch.get<T>(a.n * a.outputs);
    live_gradient(a, outputs, made, threads);
    g = made, ld = a.outputs;
  }
  if (a.dx) {
    const Product<T> product(a, inputs, outputs, false);
    multiply<T>(product, inputs, outputs, g, ld, true, nullptr, false, static_cast<T*>(a.dx), a.n, threads);
  }
  if (a.dw) weight_gradient(a, outputs, inputs, g, ld, threads);
  if (a.db) bias_gradient(a, outputs, g, ld, threads);
}

}  // namespace

void masked_linear(const MaskedLinearArgs& a) { a.is_double ? forward<double>(a) : forward<float>(a); }

void masked_linear_backward(const MaskedLinearArgs& a) { a.is_double ? backward<double>(a) : backward<float>(a); }

}  // namespace GENFAST_ISA
}  // namespace genfast
