// A linear layer whose mask is a staircase after sorting (MADE, arXiv:1502.03509, section 4), y = act(x (W o M)^T + b), and its
// backward, dx = g (W o M), dW = (g^T x) o M and db = sum of g, where g is dy, or dy where relu gave y > 0.
//
// Each side of the weight is taken in an order in which its units reach ever more, or ever fewer, of the other side: as they
// lie where that is such an order (sorted degrees, rising or falling), sorted where it is not. A unit that reaches L units is then
// joined to the first or to the last L of the other side, so a panel of outputs needs one interval of terms, and each vector of
// the panel a part of it: the tile drops a vector where its terms end. Of the 2 N I O FLOPs of the dense product it does the live
// half and half a vector's width along the diagonal. Sorting costs nothing on the side of the terms, which a tile reads at their
// units, and one move a number on the other, from rows that one thread owns; where that is more than it saves (some 64 units)
// the whole product is done, with zeros for what is dead.
// The weight is packed, without what is dead, once a call. Bound by the FMA rate from batches of some ten on; a batch below is
// bound by reading the weight, of which it takes dot products as it lies.
#include <vector>

#include "dtype_switch.h"
#include "gemm.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kDots = 4;         // samples that dot products with the weight as it lies serve best
constexpr int64_t kPanelRows = 1024; // rows that a panel meets in one go, from a level of the cache that holds them
constexpr int64_t kBlockTiles = 16;  // tiles of rows that share a panel while it is in the second-level cache

// Inputs or outputs in the order in which tiles take them. A thread keeps the memory from call to call.
template <class T>
struct Side {
  int64_t count = 0;
  bool rising = false;         // whether later positions reach more
  bool sorted = false;         // else positions are units
  bool mixed = false;          // positions are units and reach in no order: all terms are taken, the dead ones as zeros
  std::vector<int32_t> unit;   // of a position, where sorted
  std::vector<int32_t> place;  // sorted position of a unit, where that is another
  std::vector<T> reach;        // units of the other side that a position is joined to; zeros to a whole vector

  int64_t blocks() const { return (count + block_columns<T>() - 1) / block_columns<T>(); }

  // Which of the units that the other side reaches first the one at a position is.
  int64_t depth(int64_t p) const {
    const int64_t at = mixed && !place.empty() ? place[size_t(p)] : p;
    return rising ? count - 1 - at : at;
  }
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
  side.sorted = side.mixed = false, side.rising = rising;
  side.place.clear();
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
    side.place.clear();
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

// Leaves both sides as they lie where sorting costs more moves of a sample's numbers than it saves products of vectors.
template <class T>
void mix_if_cheaper(const MaskedLinearArgs& a, int64_t live, int64_t moves, Side<T>& outputs, Side<T>& inputs) {
  if ((a.outputs * a.inputs - live) / lanes<T>() > moves || (!outputs.sorted && !inputs.sorted)) return;
  for (Side<T>* side : {&outputs, &inputs}) {
    side->mixed = true;
    if (!side->sorted) continue;
    std::vector<T> natural(side->reach.size(), T(0));
    for (int64_t u = 0; u < side->count; ++u) natural[size_t(u)] = side->reach[size_t(side->place[size_t(u)])];
    side->reach.swap(natural);
    side->sorted = false;
  }
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
    panel.length[s] = outer.mixed ? inner.count : int64_t(outer.reach[outer.rising ? last : panel.first[s]]);
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

// The terms [from[n], to[n]) with the first n vectors, for n = N down to 1; kIndexed: the k-th stands at unit[k] in a.
template <class T, int MR, bool kIndexed, int N>
GENFAST_INLINE void stages(const T* a, int64_t ld, const int32_t* unit, const T* b, int64_t width, const int64_t* from,
                           const int64_t* to, Vec<T> (&acc)[MR][kMaxVectors]) {
  if constexpr (N > 0) {
    const T* right = b + from[N] * width;
    for (int64_t k = from[N]; k < to[N]; ++k, right += width) {
      const T* left = a + (kIndexed ? int64_t(unit[k]) : k);
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
    stages<T, MR, kIndexed, N - 1>(a, ld, unit, b, width, from, to, acc);
  }
}

template <class T, int MR, bool kIndexed>
static __attribute__((noinline)) void staged_tile(const T* a, int64_t ld, const int32_t* unit, const T* b, int64_t width,
                                                  const int64_t* from, const int64_t* to, const Target<T>& target) {
  Vec<T> acc[MR][kMaxVectors] = {};
  stages<T, MR, kIndexed, kMaxVectors>(a, ld, unit, b, width, from, to, acc);
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

// Terms [u0, u1) of a panel times `height` rows of a, where the first term stands at a, or each at its unit.
template <class T, bool kIndexed>
static void multiply_tile(int64_t height, const Panel& panel, int64_t u0, int64_t u1, const T* a, int64_t ld, const int32_t* unit,
                          const T* b, const Target<T>& target) {
  // In which terms n vectors are alive: from the end that all share to where the n-th vector's terms end.
  int64_t from[kMaxVectors + 1], to[kMaxVectors + 1];
  for (int64_t n = 1; n <= kMaxVectors; ++n) {
    const int64_t near = n < panel.slots ? panel.length[n] : 0, far = n <= panel.slots ? panel.length[n - 1] : 0;
    const int64_t begin = panel.rising ? panel.length[0] - far : near, end = panel.rising ? panel.length[0] - near : far;
    from[n] = std::max(begin, u0), to[n] = std::min(end, u1);
  }
  const int64_t width = panel.slots * lanes<T>();
  switch (height) {
    case 1: return staged_tile<T, 1, kIndexed>(a, ld, unit, b, width, from, to, target);
    case 2: return staged_tile<T, 2, kIndexed>(a, ld, unit, b, width, from, to, target);
    case 3: return staged_tile<T, 3, kIndexed>(a, ld, unit, b, width, from, to, target);
    case 4: return staged_tile<T, 4, kIndexed>(a, ld, unit, b, width, from, to, target);
    case 5: return staged_tile<T, 5, kIndexed>(a, ld, unit, b, width, from, to, target);
    default: return staged_tile<T, 6, kIndexed>(a, ld, unit, b, width, from, to, target);
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

  int64_t offset(int64_t p) const { return panels_[size_t(p)].offset; }
  int64_t largest() const {
    if (panels_.empty()) return 0;
    return (outer_.rising ? panels_.back() : panels_.front()).length[0] * block_columns<T>();
  }

  void pack(int64_t p, T* to) const {
    const Panel& panel = panels_[size_t(p)];
    const int64_t width = panel.slots * lanes<T>();
    for (int64_t s = 0; s < panel.slots; ++s) {
      across_ ? pack_rows_of(panel, s, to + s * lanes<T>(), width) : pack_columns_of(panel, s, to + s * lanes<T>(), width);
      clear_dead(panel, s, to + s * lanes<T>(), width);
    }
  }

  // Tiles [from, to) of the `all` rows, of which a's first is the first here, against a panel. Into `out`, whose rows lie
  // `wide` apart; a panel that is not whole goes by `aside` (rows, block_columns()) where out has no room beyond its columns.
  void rows(int64_t p, const T* a, int64_t ld, int64_t from, int64_t to, int64_t all, const T* packed, const T* bias, bool relu,
            T* out, int64_t wide, T* aside) const {
    const Panel& panel = panels_[size_t(p)];
    const int64_t start = tile_start(all, from), end = tile_start(all, to);
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
        const T* left = a + (row - start) * ld;
        if (inner_.sorted)
          multiply_tile<T, true>(height, panel, u0, u1, left, ld, inner_.unit.data() + panel.begin, packed, target);
        else
          multiply_tile<T, false>(height, panel, u0, u1, left + panel.begin, ld, nullptr, packed, target);
      }
    }
    for (int64_t row = 0; !whole && row < end - start; ++row)
      memcpy(out + row * wide + begin, aside + row * block_columns<T>(), size_t(outer_.count - begin) * sizeof(T));
  }

 private:
  // The slot's units are rows of the weight: transposed, where rows or columns are sorted a square at a time. (Inputs sorted by
  // their reach fall, so that the terms of a slot are the first ones.)
  void pack_rows_of(const Panel& panel, int64_t s, T* to, int64_t width) const {
    const int64_t first = panel.first[s], count = std::min<int64_t>(lanes<T>(), outer_.count - first), ld = args_.weight_row;
    const int64_t begin = inner_.rising ? inner_.count - panel.length[s] : 0, length = panel.length[s];
    const T* weight = static_cast<const T*>(args_.weight);
    to += (begin - panel.begin) * width;
    if (!outer_.sorted && !inner_.sorted) {
      transpose(weight + first * ld + begin, ld, count, length, to, width);
      return;
    }
    constexpr int n = lanes<T>();
    T rows[n * n] = {}, turned[n * n];
    const int64_t stop = inner_.sorted ? inner_.count : begin + length;
    for (int64_t t = inner_.sorted ? 0 : begin; t < stop; t += n) {
      const int64_t here = std::min<int64_t>(n, stop - t);
      for (int64_t r = 0; r < count; ++r) {
        const T* row = weight + (outer_.sorted ? outer_.unit[size_t(first + r)] : first + r) * ld + t;
        here == n ? store(rows + r * n, load(row)) : store(rows + r * n, load_part(row, int(here)));
      }
      transpose_square(rows, n, turned, n);
      for (int64_t k = 0; k < here; ++k) {  // a term goes to its place as a whole vector
        const int64_t place = inner_.sorted ? inner_.place[size_t(t + k)] : t + k - begin;
        if (place >= 0 && place < length) store(to + place * width, load(turned + k * n));
      }
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
    const int64_t least = outer_.mixed || panel.first[s] + lanes<T>() > outer_.count
                              ? 0
                              : int64_t(outer_.reach[outer_.rising ? panel.first[s] : panel.first[s] + lanes<T>() - 1]);
    for (int64_t d = least; d < panel.length[s]; ++d) {
      const int64_t u = inner_.rising ? panel.length[0] - 1 - d : d;
      T* at = to + u * width;
      store(at, reach > T(inner_.mixed ? inner_.depth(u) : d) ? load(at) : Vec<T>{});
    }
  }

  const MaskedLinearArgs& args_;
  const Side<T>&outer_, &inner_;
  const bool across_;
  std::vector<Panel> panels_;
  int64_t elements_ = 0;
};

// out (n, outer) = act(a (n, inner) W + bias). Where there are panels enough, each is packed by the
// thread that takes it, just before it is used by all rows; the largest first, so that all threads end together.
template <class T>
void multiply_by_panels(const Product<T>& product, bool rising, const T* a, int64_t ld, const T* bias, bool relu, T* out,
                        int64_t wide, int64_t n, int threads) {
  static thread_local TeamScratch panel_scratch, aside_scratch;
  const int64_t panels = product.panels();
  const bool partial = wide % lanes<T>();
  const Slices<T> all_packed = panel_scratch.get<T>(threads, product.largest());
  const Slices<T> all_aside = aside_scratch.get<T>(threads, partial ? n * block_columns<T>() : 0);
#pragma omp parallel num_threads(threads)
  {
    T* packed = all_packed.get();
    T* aside = partial ? all_aside.get() : nullptr;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < panels; ++task) {
      const int64_t p = rising ? panels - 1 - task : task;
      product.pack(p, packed);
      product.rows(p, a, ld, 0, tiles(n), n, packed, bias, relu, out, wide, aside);
    }
  }
}

// The same by blocks of rows, each of which one thread owns, so that it may spread what it has.
template <class T>
void multiply_by_rows(const Product<T>& product, const Side<T>& outer, const T* a, int64_t ld, const T* bias, bool relu, T* out,
                      int64_t n, int threads) {
  static thread_local Scratch shared;
  static thread_local TeamScratch row_scratch, aside_scratch;
  T* packed = shared.get<T>(product.elements());
  const int64_t down = tiles(n), step = std::max<int64_t>(1, std::min(kBlockTiles, down / (4 * threads)));
  const int64_t wide = outer.sorted ? padded<T>(outer.count) : outer.count, most = step * kMaxRows;
  const bool partial = wide % lanes<T>();
  const Slices<T> all_rows = row_scratch.get<T>(threads, outer.sorted ? most * wide : 0);
  const Slices<T> all_aside = aside_scratch.get<T>(threads, partial ? most * block_columns<T>() : 0);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < product.panels(); ++p) product.pack(p, packed + product.offset(p));
#pragma omp for schedule(dynamic, 1)
    for (int64_t base = 0; base < down; base += step) {
      const int64_t stop = std::min(down, base + step), begin = tile_start(n, base), end = tile_start(n, stop);
      T* rows = outer.sorted ? all_rows.get() : out + begin * wide;
      T* aside = partial ? all_aside.get() : nullptr;
      for (int64_t p = 0; p < product.panels(); ++p)
        product.rows(p, a + begin * ld, ld, base, stop, n, packed + product.offset(p), bias, relu, rows, wide, aside);
      for (int64_t row = begin; outer.sorted && row < end; ++row)
        permute(rows + (row - begin) * wide, outer.place.data(), outer.count, out + row * outer.count);
    }
  }
}

template <class T>
void multiply(const Product<T>& product, const Side<T>& outer, const T* a, int64_t ld, const T* bias, bool relu, T* out, int64_t n,
              int threads) {
  if (!outer.sorted && n <= kPanelRows && (threads == 1 || product.panels() >= 4 * threads))
    multiply_by_panels(product, outer.rising, a, ld, bias, relu, out, outer.count, n, threads);
  else
    multiply_by_rows(product, outer, a, ld, bias, relu, out, n, threads);
}

// A few samples: each output is a dot product of the weight's row as it lies, over the terms that it reaches.
template <class T, int N>
GENFAST_INLINE void dots(const MaskedLinearArgs& a, const Side<T>& outputs, const Side<T>& inputs, const T* place, const T* lane,
                         int64_t p) {
  constexpr int kWidth = lanes<T>();
  const int64_t unit = outputs.sorted ? outputs.unit[p] : p, reach = int64_t(outputs.reach[p]);
  const int64_t begin = !inputs.sorted && inputs.rising ? inputs.count - reach : 0;
  const int64_t end = inputs.sorted ? inputs.count : begin + reach;
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
  for (; i + kWidth <= end; i += kWidth) {
    const Vec<T> w = live(load(row + i), i);
    for (int n = 0; n < N; ++n) acc[0][n] += w * load(x + n * a.x_row + i);
  }
  if (i < end && end - begin >= kWidth) {  // the last vector again, without what has been added
    const Mask<T> rest = load(lane) >= T(i - (end - kWidth));
    const Vec<T> w = rest ? live(load(row + end - kWidth), end - kWidth) : Vec<T>{};
    for (int n = 0; n < N; ++n) acc[0][n] += w * (rest ? load(x + n * a.x_row + end - kWidth) : Vec<T>{});
  } else if (i < end) {
    const int part = int(end - i);
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
  T lane[lanes<T>()];
  for (int j = 0; j < lanes<T>(); ++j) lane[j] = T(j);
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
  for (int64_t p = 0; p < outputs.count; ++p) dots<T, N>(a, outputs, inputs, place.data(), lane, p);
}

int64_t live_weights(const MaskedLinearArgs& a) {
  int64_t live = 0;
  for (int64_t r = 0; r < a.outputs; ++r) live += a.counts[r];
  return live;
}

// Waking threads costs more than a small product.
int worth(const MaskedLinearArgs& a, int64_t live) { return live * a.n < 1 << 17 ? 1 : a.threads; }

template <class T>
void forward(const MaskedLinearArgs& a) {
  static thread_local Side<T> outputs, inputs;
  *a.fits = read_sides(a, outputs, inputs);
  if (!*a.fits || !a.n || !a.outputs) return;
  const int64_t live = live_weights(a);
  const int threads = worth(a, live);
  switch (a.n) {
    case 1: return all_dots<T, 1>(a, outputs, inputs, threads);
    case 2: return all_dots<T, 2>(a, outputs, inputs, threads);
    case 3: return all_dots<T, 3>(a, outputs, inputs, threads);
    case 4: return all_dots<T, 4>(a, outputs, inputs, threads);
  }
  static_assert(kDots == 4, "one case for each batch");
  mix_if_cheaper(a, live, outputs.sorted ? a.outputs : 0, outputs, inputs);
  std::vector<T> bias(a.bias ? size_t(padded<T>(a.outputs)) : 0);
  for (int64_t p = 0; a.bias && p < a.outputs; ++p)
    bias[size_t(p)] = static_cast<const T*>(a.bias)[outputs.sorted ? outputs.unit[p] : p];
  const Product<T> product(a, outputs, inputs, true);
  multiply(product, outputs, static_cast<const T*>(a.x), a.x_row, a.bias ? bias.data() : nullptr, a.relu,
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
  const int64_t depth = outputs.depth(row);
  T* out = static_cast<T*>(a.dw) + (outputs.sorted ? outputs.unit[row] : row) * inputs.count;
  for (const Panel& panel : panels) {
    for (int64_t s = 0; s < panel.slots; ++s) {
      const int64_t first = panel.first[s], left = inputs.count - first;
      const Vec<T> live = load(inputs.reach.data() + first) > T(depth) ? load(sums + s * lanes<T>()) : Vec<T>{};
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

// g^T x: a tile of six outputs against the panels of inputs that any of them reaches, over
// runs of samples. What is dead is written as zeros.
template <class T>
void weight_gradient(const MaskedLinearArgs& a, const Side<T>& outputs, const Side<T>& inputs, const T* g, int64_t ld, int threads) {
  constexpr int64_t block = block_columns<T>();
  static thread_local Scratch panel_scratch, sum_scratch;
  static thread_local TeamScratch own_scratch, tile_scratch, row_scratch;
  const int64_t runs = inner_runs(a.n), longest = (a.n + runs - 1) / runs, down = tiles(a.outputs), across = inputs.blocks();
  const int64_t size = kMaxRows * across * block;
  const bool direct = across == 1 && !outputs.sorted;  // one panel reads g once, as packing would
  T* panels = panel_scratch.get<T>(across * block * longest);
  T* all = runs == 1 ? nullptr : sum_scratch.get<T>(down * size);
  const Slices<T> all_sorted = row_scratch.get<T>(threads, padded<T>(a.inputs));
  const Slices<T> all_packed = tile_scratch.get<T>(threads, kMaxRows * longest);
  const Slices<T> all_own = own_scratch.get<T>(threads, size);
  const T* x = static_cast<const T*>(a.x);
  std::vector<Panel> at(static_cast<size_t>(across));
  for (int64_t p = 0; p < across; ++p) at[size_t(p)] = panel_of(inputs, outputs, p);
#pragma omp parallel num_threads(threads)
  {
    T *sorted = all_sorted.get(), *packed = all_packed.get(), *own = all_own.get();
    for (int64_t part = 0; part < runs; ++part) {
      const int64_t n0 = a.n * part / runs, count = a.n * (part + 1) / runs - n0;
#pragma omp for schedule(static)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t p = 0; p < across; ++p)
          pack_sample(inputs, at[size_t(p)], x + (n0 + k) * a.x_row, panels + p * block * longest, k);
#pragma omp for schedule(dynamic, 2)
      for (int64_t tile = 0; tile < down; ++tile) {
        const int64_t row = tile_start(a.outputs, tile), height = tile_start(a.outputs, tile + 1) - row;
        T* sums = all ? all + tile * size : own;
        const T* left = direct ? g + n0 * ld + row : packed;
        if (outputs.sorted)
          for (int64_t k = 0; k < count; ++k)
            for (int64_t m = 0; m < height; ++m) packed[k * height + m] = g[(n0 + k) * ld + outputs.unit[size_t(row + m)]];
        else if (!direct)
          pack_rows<T>({g, 1, ld}, n0, count, row, height, packed);
        const int64_t most = int64_t(outputs.reach[outputs.rising ? row + height - 1 : row]);
        for (int64_t p = 0; p < across; ++p) {
          const Panel& panel = at[size_t(p)];
          int64_t live = outputs.mixed ? panel.slots : 0;  // slots that some output of the tile reaches
          while (live < panel.slots && nearest(inputs, panel.first[live]) < most) ++live;
          if (!live) continue;
          weight_tile(height, live, left, direct ? ld : height, panels + p * block * longest, panel.slots * lanes<T>(), count,
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

// g = dy where y > 0.
template <class T>
void live_gradient(const MaskedLinearArgs& a, T* g, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < a.n; ++n) {
    const T* grad = static_cast<const T*>(a.grad) + n * a.grad_row;
    const T* y = static_cast<const T*>(a.y) + n * a.y_row;
    T* to = g + n * a.outputs;
    int64_t o = 0;
    for (; o + lanes<T>() <= a.outputs; o += lanes<T>()) store(to + o, load(y + o) > T(0) ? load(grad + o) : Vec<T>{});
    for (; o < a.outputs; ++o) to[o] = y[o] > T(0) ? grad[o] : T(0);
  }
}

// db of a vector of outputs.
template <class T>
void bias_gradient(const MaskedLinearArgs& a, const T* g, int64_t ld, int threads) {
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
    store_part(static_cast<T*>(a.db) + first, total, part);
  }
}

template <class T>
void backward(const MaskedLinearArgs& a) {
  static thread_local Side<T> outputs, inputs;
  *a.fits = read_sides(a, outputs, inputs);
  if (!*a.fits) return;
  const int64_t live = live_weights(a);
  const int threads = worth(a, live);
  mix_if_cheaper(a, live, (outputs.sorted ? a.outputs : 0) + (inputs.sorted ? a.inputs : 0), outputs, inputs);
  const T* g = static_cast<const T*>(a.grad);
  int64_t ld = a.grad_row;
  if (a.y) {
    static thread_local Scratch scratch;
    T* made = scratch.get<T>(a.n * a.outputs);
    live_gradient(a, made, threads);
    g = made, ld = a.outputs;
  }
  if (a.dx) {
    const Product<T> product(a, inputs, outputs, false);
    multiply<T>(product, inputs, g, ld, nullptr, false, static_cast<T*>(a.dx), a.n, threads);
  }
  if (a.dw) weight_gradient(a, outputs, inputs, g, ld, threads);
  if (a.db) bias_gradient(a, g, ld, threads);
}

}  // namespace

GENFAST_KERNEL(masked_linear, MaskedLinearArgs, forward<T>(a))
GENFAST_KERNEL(masked_linear_backward, MaskedLinearArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
