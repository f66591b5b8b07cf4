// Contextual similarity (Mechrez et al. 1803.02077, section 3.2; losses with a spatial term Zhang et al. 1905.05169), rows x
// (N, C) and y (M, C) of each sample:
//   d_ij = 1 - x_i.y_j | |x_i - y_j|^2 | sum_c |x_ic - y_jc|,  m_i = min_j d_ij,  r_i = m_i + eps,  u_ij = (m_i - d_ij) / (r_i h)
//   A_ij = exp(u_ij) / sum_j exp(u_ij),  S = (1 - w) A + w P,  value = max over i (or over j) of S
//   backward, g' the gradient at the winners, W = dL/dd: W_ij = (V_i A_ij - [winner] g'_ij A_ij) / (h r_i) + [j nearest] rbar_i,
//   V_i = sum_j g'_ij A_ij;  dx = -W y, dy = -W^T x (cosine).
//
// Where x_i lies on its nearest target a, A_ia is 1 to rounding and h r_i is as small as h eps, so W_ia as the difference of its two
// terms would be rounding times 1 / (h eps). A row's W sums to rbar alone, so every sum over targets is taken relative to the
// nearest: of d_ij - m_i, of y_j - y_a, and W_ia = -sum of the others + rbar. What remains is proportional to the weight of the
// other targets, and is zero where that is. For the same reason u_ij takes m_i as the product gives it, so that equal targets are
// equally near; r_i takes it as float64 gives it. Targets that equal the
// nearest (flat areas of a picture) count with it.
//
// A strip of kStrip rows by M columns stays in a cache: product, minimum and its index, exponentials, sums, the update of the
// columns' maxima, and with a kept mean the strip's product with y. Nothing is N x M. One product of 2 N M C FLOPs forward (two
// with the mean); backward O((N + M) C) with the mean, else 4 R M C, 6 R M C with dy, on the R rows that won something.
// Bound by the FMA rate. A row's numbers depend on no other row and a maximum on no order, so threads do not matter.
#include <algorithm>
#include <cmath>
#include <limits>

#include "dtype_switch.h"
#include "gemm.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kStrip = 4 * kMaxRows;
constexpr int64_t kRowsAtOnce = 16 * kStrip;  // rows whose W is held for dy: a block of columns of it lies in a cache

using Args = ContextualArgs;

GENFAST_INLINE int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

// ---- tiles of kMaxRows rows by one block of columns ----

template <class T>
__attribute__((noinline)) void product_tile(T* tile, const T* left, int64_t row, const T* panel, int64_t count) {
  const Segment segment{0, 0, count};
  Vec<T> acc[kMaxRows][kMaxVectors] = {};
  multiply<T, kMaxRows, kMaxVectors>(left, row, 1, &segment, 1, panel, block_columns<T>(), acc);
  Aside<T>{tile}.template end<kMaxRows, kMaxVectors>(acc);
}

// Of a left side packed as (term, row), and a right side whose rows lie `ldb` apart.
template <class T>
__attribute__((noinline)) void transposed_tile(T* tile, const T* left, const T* right, int64_t ldb, int64_t count) {
  const Segment segment{0, 0, count};
  Vec<T> acc[kMaxRows][kMaxVectors] = {};
  multiply<T, kMaxRows, kMaxVectors>(left, 1, kMaxRows, &segment, 1, right, ldb, acc);
  Aside<T>{tile}.template end<kMaxRows, kMaxVectors>(acc);
}

template <class T>
__attribute__((noinline)) void l1_tile(T* tile, const T* left, int64_t row, const T* panel, int64_t count) {
  Vec<T> acc[kMaxRows][kMaxVectors] = {};
  for (; count > 0; --count, ++left, panel += block_columns<T>()) {
    Vec<T> b[kMaxVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kMaxVectors; ++v) b[v] = load(panel + v * lanes<T>());
#pragma GCC unroll 8
    for (int m = 0; m < kMaxRows; ++m) {
      const Vec<T> x = splat(left[m * row]);
#pragma GCC unroll 8
      for (int v = 0; v < kMaxVectors; ++v) acc[m][v] += abs<T>(x - b[v]);
    }
  }
  Aside<T>{tile}.template end<kMaxRows, kMaxVectors>(acc);
}

// ---- what the threads share of a sample ----

template <class T>
struct Shared {
  typedef typename Types<T>::Int Int;
  int64_t n, m, c, wide, stride, panels, blocks;  // wide: m in whole blocks; stride of a strip's rows; panels of y, of its turn
  T* columns;  // y as (panel, c, block) for the distances
  T* turned;   // y as (panel of c, m, block) for products with it, or null
  T* base;     // what a column adds to its distances; infinite beyond the last
  uint64_t* key;
  int64_t *order, *head, *next;  // of columns whose rows are equal, the first and the one that follows, in a ring

  // Panels of y, by all threads of the region.
  void pack(const Args& a, const T* y) const {
    constexpr int64_t block = block_columns<T>();
    const Strided<T> across{y, 1, c}, down{y, c, 1};
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      pack_columns(across, 0, c, p * block, m, block, columns + p * block * c);
      for (int64_t j = p * block; j < (p + 1) * block; ++j) {
        base[j] = j >= m ? std::numeric_limits<T>::infinity() : a.distance == Args::kCosine ? T(1) : T(0);
        if (j < m && a.distance == Args::kL2) base[j] = squares(y + j * c);
      }
    }
#pragma omp for schedule(static)
    for (int64_t j = 0; j < m; ++j) key[j] = mixed(y + j * c), order[j] = head[j] = next[j] = j;
#pragma omp single
    link(y);
    if (!turned) return;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < blocks; ++p) pack_columns(down, 0, m, p * block, c, block, turned + p * block * m);
  }

  // A number that equal rows share.
  uint64_t mixed(const T* row) const {
    constexpr int n = 16;
    uint32_t part[n] = {};
    const int64_t words = c * int64_t(sizeof(T) / 4);
    const char* bytes = reinterpret_cast<const char*>(row);
    int64_t k = 0;
    for (; k + n <= words; k += n) {
      uint32_t word[n];
      memcpy(word, bytes + k * 4, sizeof word);
      for (int l = 0; l < n; ++l) part[l] = (part[l] ^ word[l]) * 0x9e3779b1u;
    }
    for (; k < words; ++k) {
      uint32_t word;
      memcpy(&word, bytes + k * 4, sizeof word);
      part[k % n] = (part[k % n] ^ word) * 0x9e3779b1u;
    }
    uint64_t all = 0;
    for (uint32_t p : part) all = (all ^ p) * 0x9e3779b97f4a7c15u;
    return all;
  }

  // Rings of equal columns in ascending order. A row that shares its key with another but is not equal stays alone.
  void link(const T* y) const {
    std::sort(order, order + m, [this](int64_t p, int64_t q) { return key[p] < key[q] || (key[p] == key[q] && p < q); });
    for (int64_t k = 1; k < m; ++k) {
      const int64_t j = order[k], first = head[order[k - 1]];
      if (key[j] != key[first] || memcmp(y + j * c, y + first * c, size_t(c) * sizeof(T))) continue;
      head[j] = first, next[j] = first, next[order[k - 1]] = j;
    }
  }

  T squares(const T* row) const {
    T sum[8] = {};
    int64_t k = 0;
    for (; k + 8 <= c; k += 8)
      for (int l = 0; l < 8; ++l) sum[l] += row[k + l] * row[k + l];
    for (; k < c; ++k) sum[0] += row[k] * row[k];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
};

// The distances of `rows` rows x (whole tiles of them, dense) to all columns; and each row's least by lane and its vector.
template <class T>
void distances(const Args& a, const Shared<T>& s, const T* x, int64_t rows, T* strip, T* least, typename Types<T>::Int* where) {
  typedef typename Types<T>::Int Int;
  constexpr int n = lanes<T>();
  constexpr int64_t block = block_columns<T>();
  alignas(64) T tile[kMaxRows * block];
  T own[kStrip] = {};
  if (a.distance == Args::kL2)
    for (int64_t i = 0; i < rows; ++i) own[i] = s.squares(x + i * s.c);
  for (int64_t i = 0; i < up(rows, kMaxRows) * n; ++i) least[i] = std::numeric_limits<T>::infinity(), where[i] = 0;
  const T factor = a.distance == Args::kCosine ? T(-1) : a.distance == Args::kL2 ? T(-2) : T(1);
  for (int64_t p = 0; p < s.panels; ++p)
    for (int64_t first = 0; first < rows; first += kMaxRows) {
      const T* panel = s.columns + p * block * s.c;
      if (a.distance == Args::kL1)
        l1_tile(tile, x + first * s.c, s.c, panel, s.c);
      else
        product_tile(tile, x + first * s.c, s.c, panel, s.c);
      for (int64_t m = 0; m < kMaxRows; ++m) {
        T* to = strip + (first + m) * s.stride + p * block;
        Vec<T> low = load(least + (first + m) * n);
        Mask<T> at;
        memcpy(&at, where + (first + m) * n, sizeof at);
        for (int v = 0; v < kMaxVectors; ++v) {
          Vec<T> d = load(tile + m * block + v * n) * factor + (load(s.base + p * block + v * n) + own[first + m]);
          d = d < T(0) ? Vec<T>{} : d;  // a NaN stays
          store(to + v * n, d);
          const Mask<T> less = d < low;
          low = less ? d : low;
          at = less ? Mask<T>{} + Int(p * kMaxVectors + v) : at;
        }
        store(least + (first + m) * n, low);
        memcpy(where + (first + m) * n, &at, sizeof at);
      }
    }
}

// The lowest column of a row's least distance.
template <class T>
int64_t lowest(const T* least, const typename Types<T>::Int* where) {
  int64_t found = where[0] * lanes<T>();
  T low = least[0];
  for (int l = 1; l < lanes<T>(); ++l) {
    const int64_t column = where[l] * lanes<T>() + l;
    if (least[l] < low || (least[l] == low && column < found)) low = least[l], found = column;
  }
  return found;
}

// One distance as float64 has it: 1 - x.y of near duplicates has lost its digits in float32.
template <class T>
T exact(const Args& a, const T* x, const T* y, int64_t c) {
  constexpr int n = 8;
  double part[n] = {};
  const double first = a.distance == Args::kCosine ? 1 : 0;
  for (int64_t k = 0; k < c; k += n)
    for (int l = 0; l < n && k + l < c; ++l) {
      const double p = double(x[k + l]), q = double(y[k + l]);
      part[l] += a.distance == Args::kCosine ? -p * q : a.distance == Args::kL2 ? (p - q) * (p - q) : std::fabs(p - q);
    }
  double sum = first;
  for (double p : part) sum += p;
  return sum < 0 ? T(0) : T(sum);
}

// d to exp(u), u <= 0, in place; their sum, and the sum of u exp(u).
template <class T>
__attribute__((noinline)) void soften(T* row, int64_t wide, T m, T scale, T& total, T& moment) {
  constexpr int n = lanes<T>();
  Vec<T> sums[kMaxVectors] = {}, moments[kMaxVectors] = {};
  for (int64_t j = 0; j < wide; j += block_columns<T>())
#pragma GCC unroll 4
    for (int v = 0; v < kMaxVectors; ++v) {
      Vec<T> u = (m - load(row + j + v * n)) * scale;
      u = u > T(0) ? Vec<T>{} : u;
      const Vec<T> c = u < Types<T>::kExpMin ? splat(Types<T>::kExpMin) : u;
      const Vec<T> e = u < Types<T>::kExpMin ? Vec<T>{} : exp_in_range<T>(c);
      store(row + j + v * n, e);
      sums[v] += e;
      moments[v] += e * c;
    }
  Vec<T> all = sums[0], weighted = moments[0];
  for (int v = 1; v < kMaxVectors; ++v) all += sums[v], weighted += moments[v];
  total = sum<T>(all), moment = sum<T>(weighted);
}

template <class T>
T scale_of(const Args& a, T m) {
  const double scale = 1 / ((double(m) + a.eps) * a.bandwidth);
  const double largest = double(std::numeric_limits<T>::max()) * 1e-3;
  return T(scale < largest ? scale : largest);
}

// row = row * share + weight * P_i
template <class T>
void add_prior(const Args& a, int64_t i, T share, T* row) {
  const T *down = static_cast<const T*>(a.prior_rows) + i * a.prior_height, *across = static_cast<const T*>(a.prior_columns) + i * a.prior_width;
  for (int64_t r = 0; r < a.prior_height; ++r, row += a.prior_width) {
    const T weight = T(a.prior_weight) * down[r];
    for (int64_t c = 0; c < a.prior_width; ++c) row[c] = row[c] * share + weight * across[c];
  }
}

// out (rows, blocks of c) = strip (rows, m) times y, in runs of terms whose panel lies in the second-level cache.
template <class T>
void times_targets(const Shared<T>& s, const T* strip, int64_t rows, T* out) {
  constexpr int64_t block = block_columns<T>();
  alignas(64) T tile[kMaxRows * block];
  const int64_t runs = inner_runs(s.m), ld = s.blocks * block;
  for (int64_t p = 0; p < s.blocks; ++p)
    for (int64_t run_ = 0; run_ < runs; ++run_) {
      const int64_t k0 = s.m * run_ / runs, count = s.m * (run_ + 1) / runs - k0;
      for (int64_t first = 0; first < rows; first += kMaxRows) {
        product_tile(tile, strip + first * s.stride + k0, s.stride, s.turned + (p * s.m + k0) * block, count);
        for (int64_t m = 0; m < kMaxRows; ++m) {
          T* to = out + (first + m) * ld + p * block;
          for (int64_t j = 0; j < block; ++j) to[j] = run_ ? to[j] + tile[m * block + j] : tile[m * block + j];
        }
      }
    }
}

// Writes a value to a column and to those that are equal, and gives their number.
template <class T>
int64_t set_equal(const Shared<T>& s, T* row, int64_t column, T value) {
  int64_t count = 0, j = column;
  do row[j] = value, ++count, j = s.next[j];
  while (j != column);
  return count;
}

// The maxima so far of each column and their rows, with `rows` rows more, lower ones first.
template <class T>
__attribute__((noinline)) void raise(const T* strip, int64_t stride, int64_t wide, int64_t rows, const T* share, int64_t row, T* best,
           typename Types<T>::Int* owner) {
  typedef typename Types<T>::Int Int;
  constexpr int n = lanes<T>();
  for (int64_t j = 0; j < wide; j += block_columns<T>()) {
    Vec<T> high[kMaxVectors];
    Mask<T> at[kMaxVectors];
    for (int v = 0; v < kMaxVectors; ++v) high[v] = load(best + j + v * n);
    memcpy(at, owner + j, sizeof at);
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kMaxVectors; ++v) {
        const Vec<T> s = load(strip + i * stride + j + v * n) * share[i];
        const Mask<T> more = s > high[v];
        high[v] = more ? s : high[v];
        at[v] = more ? Mask<T>{} + Int(row + i) : at[v];
      }
    for (int v = 0; v < kMaxVectors; ++v) store(best + j + v * n, high[v]);
    memcpy(owner + j, at, sizeof at);
  }
}

// ---- memory, all from the caller: first what the threads share, then what each has ----

struct Cursor {
  char* at;
  int64_t used = 0;
  template <class U>
  U* take(int64_t count) {
    U* found = at ? reinterpret_cast<U*>(at + used) : nullptr;
    used += up(count * int64_t(sizeof(U)), 64);
    return found;
  }
};

template <class T>
struct Own {  // of a thread
  typedef typename Types<T>::Int Int;
  T *x, *strip, *least, *best, *out;
  Int *where, *owner;
};

template <class T>
Own<T> own_of(Cursor& cursor, const Shared<T>& s, bool strip, bool maxima, bool turned) {
  typedef typename Types<T>::Int Int;
  Own<T> o{};
  o.x = cursor.take<T>(kStrip * s.c);
  o.strip = strip ? cursor.take<T>(kStrip * s.stride) : nullptr;
  o.least = cursor.take<T>(kStrip * lanes<T>());
  o.where = cursor.take<Int>(kStrip * lanes<T>());
  o.best = maxima ? cursor.take<T>(s.wide) : nullptr;
  o.owner = maxima ? cursor.take<Int>(s.wide) : nullptr;
  o.out = turned ? cursor.take<T>(kStrip * s.blocks * block_columns<T>()) : nullptr;
  return o;
}

template <class T>
Shared<T> shared_of(Cursor& cursor, const Args& a, bool turned) {
  constexpr int64_t block = block_columns<T>();
  Shared<T> s{};
  s.n = a.n, s.m = a.m, s.c = a.c;
  s.wide = up(a.m, block), s.panels = s.wide / block, s.blocks = up(a.c, block) / block;
  s.stride = s.wide + lanes<T>();  // rows a power of two apart would meet in few sets of a cache
  s.columns = cursor.take<T>(s.wide * a.c);
  s.base = cursor.take<T>(s.wide);
  s.key = cursor.take<uint64_t>(a.m);
  s.order = cursor.take<int64_t>(a.m);
  s.head = cursor.take<int64_t>(a.m);
  s.next = cursor.take<int64_t>(a.m);
  s.turned = turned ? cursor.take<T>(s.blocks * block * a.m) : nullptr;
  return s;
}

int threads_for(const Args& a) { return a.n * a.m * a.c < 1 << 17 ? 1 : a.threads; }  // waking threads costs more than that

// ---- forward ----

template <class T>
struct Forward {
  typedef typename Types<T>::Int Int;
  const Args& a;
  const Shared<T>& s;
  const T *x, *y;
  T *value, *statistics, *mean;
  int64_t *winner, *nearest;

  // Rows from `row` on; whether all of them are numbers.
  bool strip(const Own<T>& o, int64_t row, int64_t rows) const {
    memcpy(o.x, x + row * s.c, size_t(rows * s.c) * sizeof(T));
    memset(o.x + rows * s.c, 0, size_t((up(rows, kMaxRows) - rows) * s.c) * sizeof(T));
    distances(a, s, o.x, rows, o.strip, o.least, o.where);
    const bool prior = a.prior_rows;
    T share[kStrip], rest[kStrip] = {};  // rest: of exp(u) but for what equals the nearest
    double totals[kStrip];
    bool wrong[kStrip] = {};
    bool numbers = true;
    for (int64_t i = 0; i < rows; ++i) {
      T* at = o.strip + i * s.stride;
      const int64_t lowest_ = lowest<T>(o.least + i * lanes<T>(), o.where + i * lanes<T>());
      const T base = at[lowest_];
      T m = base;
      if (sizeof(T) == 4) m = exact(a, o.x + i * s.c, y + lowest_ * s.c, s.c);
      T moment;
      const int64_t equal = set_equal(s, at, lowest_, std::numeric_limits<T>::infinity());
      soften(at, s.wide, base, scale_of(a, m), rest[i], moment);
      const double total = totals[i] = double(equal) + double(rest[i]);
      if (m - m != T(0)) moment = m - m;  // not a number where the distance is none, or infinite
      statistics[row + i] = m;
      statistics[s.n + row + i] = T(double(equal - 1) + double(rest[i]));
      statistics[2 * s.n + row + i] = T(-a.bandwidth * double(moment) / total);
      nearest[row + i] = lowest_;
      numbers = numbers && moment == moment;
      wrong[i] = moment != moment;
      share[i] = T((prior ? 1 - a.prior_weight : 1.0) / total);
      if (a.over_targets && !prior) value[row + i] = wrong[i] ? moment : share[i], winner[row + i] = lowest_;
    }
    if (mean) {
      times_targets(s, o.strip, rows, o.out);
      for (int64_t i = 0; i < rows; ++i) {
        const T *from = o.out + i * s.blocks * block_columns<T>(), *near = y + nearest[row + i] * s.c;
        const T part = T(1 / totals[i]);
        for (int64_t k = 0; k < s.c; ++k) mean[(row + i) * s.c + k] = (from[k] - rest[i] * near[k]) * part;
      }
    }
    for (int64_t i = 0; i < rows; ++i) set_equal(s, o.strip + i * s.stride, nearest[row + i], T(1));
    if (prior)
      for (int64_t i = 0; i < rows; ++i) {
        T* at = o.strip + i * s.stride;
        add_prior(a, row + i, share[i], at);
        share[i] = T(1);
        if (!a.over_targets) continue;
        int64_t high = 0;
        for (int64_t j = 1; j < s.m; ++j)
          if (at[j] > at[high]) high = j;
        value[row + i] = wrong[i] ? std::numeric_limits<T>::quiet_NaN() : at[high], winner[row + i] = high;
      }
    if (!a.over_targets) raise(o.strip, s.stride, s.wide, rows, share, row, o.best, o.owner);
    return numbers;
  }
};

template <class T>
void forward(const Args& a) {
  typedef typename Types<T>::Int Int;
  const int threads = threads_for(a);
  Cursor cursor{static_cast<char*>(a.work)};
  const Shared<T> s = shared_of<T>(cursor, a, a.mean);
  T** all_best = cursor.take<T*>(threads);
  Int** all_owner = cursor.take<Int*>(threads);
  if (!a.work) {
    const int64_t before = cursor.used;
    own_of(cursor, s, true, !a.over_targets, a.mean);
    *a.bytes = before + (cursor.used - before) * threads;
    return;
  }
  int members = 0;
  bool numbers = true;
#pragma omp parallel num_threads(threads)
  {
    Own<T> o{};
#pragma omp critical
    {
      o = own_of(cursor, s, true, !a.over_targets, a.mean);
      all_best[members] = o.best, all_owner[members] = o.owner;
      ++members;
    }
    for (int64_t b = 0; b < a.b; ++b) {
      const T *x = static_cast<const T*>(a.x) + b * a.n * a.c, *y = static_cast<const T*>(a.y) + b * a.m * a.c;
      const int64_t found = a.over_targets ? a.n : a.m;
      T* value = static_cast<T*>(a.value) + b * found;
      int64_t* winner = a.winner + b * found;
      const Forward<T> f{a, s, x, y, value, static_cast<T*>(a.statistics) + b * 3 * a.n,
                         a.mean ? static_cast<T*>(a.mean) + b * a.n * a.c : nullptr, winner, a.nearest + b * a.n};
#pragma omp single
      numbers = true;
      s.pack(a, y);
      if (!a.over_targets) {
        for (int64_t j = 0; j < s.wide; ++j) o.best[j] = T(-1), o.owner[j] = 0;
      }
      // Each thread takes its strips in order, so that of equal rows it keeps the lowest.
#pragma omp for schedule(monotonic : dynamic, 1)
      for (int64_t strip = 0; strip < (a.n + kStrip - 1) / kStrip; ++strip) {
        const int64_t row = strip * kStrip, rows = a.n - row < kStrip ? a.n - row : kStrip;
        if (!f.strip(o, row, rows)) {
#pragma omp atomic write
          numbers = false;
        }
      }
      if (a.over_targets) continue;
#pragma omp for schedule(static)
      for (int64_t j = 0; j < a.m; ++j) {
        T high = all_best[0][j];
        Int at = all_owner[0][j];
        for (int t = 1; t < members; ++t) {
          const T other = all_best[t][j];
          if (other > high || (other == high && all_owner[t][j] < at)) high = other, at = all_owner[t][j];
        }
        value[j] = numbers ? high : std::numeric_limits<T>::quiet_NaN(), winner[j] = at;
      }
    }
  }
}

// ---- backward ----

// sum over k of weight[k * step] sign(own - others_k), into out (c,)
template <class T>
void signs(const T* own, const T* others, const T* weight, int64_t step, int64_t count, int64_t c, T* out, T factor) {
  constexpr int n = lanes<T>();
  for (int64_t from = 0; from < c; from += n) {
    const int part = c - from < n ? int(c - from) : n;
    const Vec<T> x = part == n ? load(own + from) : load_part(own + from, part);
    Vec<T> sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const T* other = others + k * c + from;
      const Vec<T> difference = x - (part == n ? load(other) : load_part(other, part)), w = splat(weight[k * step]);
      sum += (difference > T(0) ? w : Vec<T>{}) - (difference < T(0) ? w : Vec<T>{});
    }
    for (int l = 0; l < part; ++l) out[from + l] += factor * sum[l];
  }
}

template <class T>
struct Backward {
  const Args& a;
  const Shared<T>& s;
  const T *x, *y, *grad, *value, *statistics, *mean;
  const int64_t *winner, *nearest;
  T *dx, *dy;
  const int64_t *start, *wins;  // where the columns begin that a row won, and the columns

  T share() const { return T(a.prior_rows ? 1 - a.prior_weight : 1.0); }
  int64_t gradient_of(int64_t row, int64_t column) const { return a.over_targets ? row : column; }

  // dx of a row from the kept mean, all of it relative to the nearest: W y = (V O - sum over its columns of g' A (y - y_nearest)) /
  // (h r) + rbar y_nearest, O = sum_j A (y_j - y_nearest).
  void from_mean(int64_t i) const {
    const double log_total = std::log1p(double(statistics[s.n + i]));
    const T scale = scale_of(a, statistics[i]);
    const T *near = y + nearest[i] * s.c, *o = mean + i * s.c;
    T* to = dx + i * s.c;
    double v = 0, weighted = 0;
    for (int64_t k = start[i]; k < start[i + 1]; ++k) {
      const int64_t at = gradient_of(i, wins[k]);
      const T g = share() * grad[at] * value[at];
      if (g == T(0)) continue;
      v += double(g);
      const T *from = y + wins[k] * s.c, factor = -g * scale;
      if (!memcmp(from, near, size_t(s.c) * sizeof(T))) continue;
      weighted -= double(g) * a.bandwidth * (std::log(double(value[at])) + log_total);
      for (int64_t c = 0; c < s.c; ++c) to[c] += factor * (from[c] - near[c]);
    }
    const T own = T((weighted - v * double(statistics[2 * s.n + i])) * double(scale)), all = T(v) * scale;
    for (int64_t c = 0; c < s.c; ++c) to[c] = -(to[c] + all * o[c] + own * near[c]);
    if (a.distance == Args::kL2)
      for (int64_t c = 0; c < s.c; ++c) to[c] = 2 * (to[c] + own * x[i * s.c + c]);
  }

  // W of `rows` gathered rows, in place of their distances, and dx from it.
  void strip(const Own<T>& o, const int64_t* list, const T* gathered, int64_t rows, T* w) const {
    double near_sum[kStrip], v_of[kStrip], total_of[kStrip];
    distances(a, s, gathered, rows, w, o.least, o.where);
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t i = list[k], near = nearest[i];
      T* at = w + k * s.stride;
      const T m = statistics[i], scale = scale_of(a, m), base = at[near];
      T rest, moment;
      const int64_t equal = set_equal(s, at, near, std::numeric_limits<T>::infinity());
      soften(at, s.wide, base, scale, rest, moment);
      const double total = double(equal) + double(rest), r = double(m) + a.eps;
      // Sums over what the row won of g' A, of those that do not equal the nearest, and of g' A u.
      double v = m - m == T(0) ? 0 : double(m - m), others = 0, weighted = 0;
      for (int64_t q = start[i]; q < start[i + 1]; ++q) {
        const bool nearest_too = s.head[wins[q]] == s.head[near];
        const T e = nearest_too ? T(1) : at[wins[q]];
        o.best[q - start[i]] = e;
        if (e == T(0)) continue;
        const double g = double(share()) * double(grad[gradient_of(i, wins[q])]) * double(e) / total;
        v += g;
        if (!nearest_too) others += g, weighted += g * std::log(double(e));
      }
      const T all = T(v / total) * scale;
      const bool clamped = m == T(0) && a.distance != Args::kL1;  // nothing flows through a distance of zero
      if (clamped)
        for (int64_t j = 0; j < s.wide; ++j) at[j] = at[j] == T(1) ? T(0) : at[j] * all;
      else
        for (int64_t j = 0; j < s.wide; ++j) at[j] *= all;
      for (int64_t q = start[i]; q < start[i + 1]; ++q) {
        const T e = o.best[q - start[i]];
        if (s.head[wins[q]] != s.head[near] && !(clamped && e == T(1))) at[wins[q]] = won(i, q, e, v, total, scale);
      }
      // For dx those that equal the nearest are one with it.
      const double own = (v * double(moment) / total - weighted) / r;
      near_sum[k] = clamped ? 0 : (others - v * double(rest) / total) * double(scale) + own;
      v_of[k] = clamped ? 0 : v, total_of[k] = total;
      at[near] = T(near_sum[k]);
    }
    if (dx) of_rows(o, list, gathered, rows, w);
    if (!dy) return;
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t i = list[k], near = nearest[i];
      if (s.next[near] == near || v_of[k] == 0) continue;
      T* at = w + k * s.stride;
      const T scale = scale_of(a, statistics[i]);
      double sum = near_sum[k];
      set_equal(s, at, near, T(v_of[k] / total_of[k] * double(scale)));
      for (int64_t q = start[i]; q < start[i + 1]; ++q)
        if (s.head[wins[q]] == s.head[near]) at[wins[q]] = won(i, q, T(1), v_of[k], total_of[k], scale);
      for (int64_t j = s.next[near]; j != near; j = s.next[j]) sum -= double(at[j]);
      at[near] = T(sum);
    }
  }

  // W of a column that a row won, but for the nearest.
  T won(int64_t i, int64_t q, T e, double v, double total, T scale) const {
    return T(double(e) / total * (v - double(share()) * double(grad[gradient_of(i, wins[q])])) * double(scale));
  }

  void of_rows(const Own<T>& o, const int64_t* list, const T* gathered, int64_t rows, T* w) const {
    if (a.distance == Args::kL1) {
      for (int64_t k = 0; k < rows; ++k) signs(gathered + k * s.c, y, w + k * s.stride, 1, s.m, s.c, dx + list[k] * s.c, T(1));
      return;
    }
    times_targets(s, w, rows, o.out);
    for (int64_t k = 0; k < rows; ++k) {
      const T* from = o.out + k * s.blocks * block_columns<T>();
      T *to = dx + list[k] * s.c, total = T(0);
      for (int64_t c = 0; c < s.c; ++c) to[c] = -from[c];
      if (a.distance != Args::kL2) continue;
      for (int64_t j = 0; j < s.m; ++j) total += w[k * s.stride + j];
      for (int64_t c = 0; c < s.c; ++c) to[c] = 2 * (to[c] + total * gathered[k * s.c + c]);
    }
  }

  // What `count` rows, whose W and x are dense, add to (W^T x)^T as (panel of columns, channel, block), by all threads of the
  // region: in that order W is the right-hand side as it lies. For l1, to dy itself.
  void columns(const T* w, const T* gathered, int64_t count, T* packed, T* across, T* sums) const {
    constexpr int64_t block = block_columns<T>();
    const int64_t down = (s.c + kMaxRows - 1) / kMaxRows;
    if (a.distance == Args::kL1) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < s.m; ++j) signs(y + j * s.c, gathered, w + j, s.stride, count, s.c, dy + j * s.c, T(1));
      return;
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < down; ++tile)
      for (int64_t k = 0; k < count; ++k)
        for (int64_t m = 0; m < kMaxRows; ++m) {
          const int64_t c = tile * kMaxRows + m;
          packed[(tile * count + k) * kMaxRows + m] = c < s.c ? gathered[k * s.c + c] : T(0);
        }
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < s.panels; ++p) {
      const T* panel = w + p * block;
      alignas(64) T tile[kMaxRows * block];
      for (int64_t first = 0; first < down; ++first) {
        transposed_tile(tile, packed + first * count * kMaxRows, panel, s.stride, count);
        T* to = across + (p * down + first) * kMaxRows * block;
        for (int64_t k = 0; k < kMaxRows * block; ++k) to[k] += tile[k];
      }
      if (a.distance == Args::kL2)
        for (int64_t k = 0; k < count; ++k)
          for (int64_t j = 0; j < block; ++j) sums[p * block + j] += panel[k * s.stride + j];
    }
  }

  void finish(const T* across, const T* sums) const {
    constexpr int64_t block = block_columns<T>();
    const int64_t down = (s.c + kMaxRows - 1) / kMaxRows;
#pragma omp for schedule(static)
    for (int64_t j = 0; j < s.m; ++j) {
      const T* from = across + j / block * down * kMaxRows * block + j % block;
      T* to = dy + j * s.c;
      if (a.distance == Args::kL2)
        for (int64_t c = 0; c < s.c; ++c) to[c] = 2 * (sums[j] * y[j * s.c + c] - from[c * block]);
      else
        for (int64_t c = 0; c < s.c; ++c) to[c] = -from[c * block];
    }
  }
};

template <class T>
void backward(const Args& a) {
  const int threads = threads_for(a);
  const bool turned = a.dx && a.distance != Args::kL1;
  Cursor cursor{static_cast<char*>(a.work)};
  const Shared<T> s = shared_of<T>(cursor, a, turned);
  const int64_t found = a.over_targets ? a.n : a.m, held = a.dy ? kRowsAtOnce : 0;
  int64_t* start = cursor.take<int64_t>(a.n + 1);
  int64_t* wins = cursor.take<int64_t>(found);
  int64_t* list = cursor.take<int64_t>(a.n);
  T* gathered = cursor.take<T>(held * a.c);
  T* w = cursor.take<T>(held * s.stride);
  const int64_t channels = up(a.c, kMaxRows), added = a.dy && a.distance != Args::kL1 ? channels * s.wide : 0;
  T* packed = cursor.take<T>(held * channels);
  T* across = cursor.take<T>(added);
  T* sums = cursor.take<T>(a.dy ? s.wide : 0);
  const int64_t before = cursor.used;
  if (!a.work) {
    own_of(cursor, s, !a.dy, true, turned);
    *a.bytes = before + (cursor.used - before) * threads;
    return;
  }
  for (int64_t b = 0; b < a.b; ++b) {
    const int64_t rows_at = b * a.n * a.c, columns_at = b * a.m * a.c;
    Backward<T> f{a, s, static_cast<const T*>(a.x) + rows_at, static_cast<const T*>(a.y) + columns_at,
                  static_cast<const T*>(a.grad) + b * found, static_cast<const T*>(a.value) + b * found,
                  static_cast<const T*>(a.statistics) + b * 3 * a.n,
                  a.mean ? static_cast<const T*>(a.mean) + rows_at : nullptr, a.winner + b * found, a.nearest + b * a.n,
                  a.dx ? static_cast<T*>(a.dx) + rows_at : nullptr, a.dy ? static_cast<T*>(a.dy) + columns_at : nullptr,
                  start, wins};
    for (int64_t i = 0; i <= a.n; ++i) start[i] = 0;
    // What each row won, by counting; without a gradient it is not won.
    for (int64_t j = 0; j < found; ++j)
      if (f.grad[j] != T(0)) ++start[a.over_targets ? j : f.winner[j]];
    int64_t sum_ = 0;
    for (int64_t i = 0; i <= a.n; ++i) sum_ += start[i], start[i] = sum_;
    for (int64_t j = found - 1; j >= 0; --j)
      if (f.grad[j] != T(0)) wins[--start[a.over_targets ? j : f.winner[j]]] = a.over_targets ? f.winner[j] : j;
    int64_t active = 0, kept = a.n;  // rows to do in full from the front, those that the mean serves from the back
    const bool means = a.mean && !a.dy && !a.prior_rows && a.distance != Args::kL1;
    for (int64_t i = 0; i < a.n; ++i) {
      if (f.dx) memset(f.dx + i * a.c, 0, size_t(a.c) * sizeof(T));
      if (start[i] == start[i + 1]) continue;
      if (means && f.statistics[i] > T(0))
        list[--kept] = i;
      else
        list[active++] = i;
    }
    if (f.dy) memset(f.dy, 0, size_t(a.m * a.c) * sizeof(T));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = kept; k < a.n; ++k) f.from_mean(list[k]);
    if (!active) continue;
    memset(across, 0, size_t(added) * sizeof(T));
    if (a.dy) memset(sums, 0, size_t(s.wide) * sizeof(T));
    const int64_t batch = a.dy ? held : active;
    Cursor rest = cursor;
#pragma omp parallel num_threads(threads)
    {
      Own<T> o{};
#pragma omp critical
      o = own_of(rest, s, !a.dy, true, turned);
      s.pack(a, f.y);
      for (int64_t first = 0; first < active; first += batch) {
        const int64_t count = active - first < batch ? active - first : batch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t strip = 0; strip < (count + kStrip - 1) / kStrip; ++strip) {
          const int64_t at = strip * kStrip, rows = count - at < kStrip ? count - at : kStrip;
          T* to = a.dy ? gathered + at * a.c : o.x;
          for (int64_t k = 0; k < rows; ++k) memcpy(to + k * a.c, f.x + list[first + at + k] * a.c, size_t(a.c) * sizeof(T));
          memset(to + rows * a.c, 0, size_t((up(rows, kMaxRows) - rows) * a.c) * sizeof(T));
          f.strip(o, list + first + at, to, rows, a.dy ? w + at * s.stride : o.strip);
        }
        if (a.dy) f.columns(w, gathered, count, packed, across, sums);
      }
      if (added) f.finish(across, sums);
    }
  }
}

}  // namespace

GENFAST_KERNEL(contextual_similarity, ContextualArgs, forward<T>(a))
GENFAST_KERNEL(contextual_similarity_backward, ContextualArgs, backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
