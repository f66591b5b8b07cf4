// Invertible 1x1 convolution (Glow 1807.03039 sec. 3.2): y = W x + b at every position, and its gradients.
//
// x (N, C, S) may come, and y may go, as two halves of the channels, so that a chain of coupling steps neither splits nor
// concatenates; an activation norm before it is folded into W and b (plu_weight). One pass over the data: 2 C FLOPs and 8
// bytes (float) an element, so memory-bound up to C of about 50, then bound by the FMA rate. The backward is the same
// product with W transposed, and grad W = sum d x^T, a second pass over d and x.
//
// NCHW: vectors run along positions, W is broadcast. channels_last: vectors run along output channels, x is broadcast.
// Partial sums of grad W are kept per group of work, whose cut does not depend on the thread count.
#include <math.h>
#include <stdlib.h>

#include <stdexcept>
#include <string>

#include "dtype_switch.h"
#include "vec.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int64_t kSerial = 1 << 13;
constexpr int64_t kGroups = 16;
constexpr int64_t kPanel = 32;  // positions in a packed channels_last tile

template <class T>
struct Halves {  // the channels [0, first) of one view and the rest of another
  View a, b;
  int64_t first;
  const T* at(int64_t n, int64_t c, int64_t s) const {
    const View& v = c < first ? a : b;
    return static_cast<const T*>(v.data) + n * v.n + (c < first ? c : c - first) * v.c + s * v.s;
  }
};

// Vectors (S = 1) become one sample with N positions.
ChannelMixArgs flattened(ChannelMixArgs a) {
  if (a.s != 1 || !a.channels_last) return a;
  View* const views[] = {&a.x, &a.x_b, &a.grad, &a.grad_b};
  for (View* v : views) {
    v->s = v->n;
    v->n = 0;
  }
  a.s = a.n;
  a.n = a.n ? 1 : 0;
  return a;
}

template <class T, int kRows, int kVecs, bool kPart>
GENFAST_INLINE void mix_block(const Halves<T>& x, const T* w, int64_t wo, int64_t wi, const T* bias, T* const* y, int64_t n,
                              int64_t s, int64_t channels, int part) {
  constexpr int L = lanes<T>();
  Vec<T> acc[kRows][kVecs];
  for (int o = 0; o < kRows; ++o)
    for (int v = 0; v < kVecs; ++v) acc[o][v] = splat(bias ? bias[o] : T(0));
  for (int64_t i = 0; i < channels; ++i) {
    const T* p = x.at(n, i, s);
    Vec<T> in[kVecs];
    for (int v = 0; v < kVecs; ++v) in[v] = kPart ? load_part(p, part) : load(p + v * L);
    for (int o = 0; o < kRows; ++o) {
      const Vec<T> weight = splat(w[o * wo + i * wi]);
      for (int v = 0; v < kVecs; ++v) acc[o][v] += weight * in[v];
    }
  }
  for (int o = 0; o < kRows; ++o)
    for (int v = 0; v < kVecs; ++v) {
      if (kPart)
        store_part(y[o] + s, acc[o][v], part);
      else
        store(y[o] + s + v * L, acc[o][v]);
    }
}

template <class T, int kRows>
void mix_rows(const Halves<T>& x, const T* w, int64_t wo, int64_t wi, const T* bias, T* const* y, int64_t n, int64_t from,
              int64_t to, int64_t channels) {
  constexpr int L = lanes<T>();
  int64_t s = from;
  for (; s + 2 * L <= to; s += 2 * L) mix_block<T, kRows, 2, false>(x, w, wo, wi, bias, y, n, s, channels, 0);
  for (; s + L <= to; s += L) mix_block<T, kRows, 1, false>(x, w, wo, wi, bias, y, n, s, channels, 0);
  if (s < to) mix_block<T, kRows, 1, true>(x, w, wo, wi, bias, y, n, s, channels, int(to - s));
}

template <class T>
void mix_first(const ChannelMixArgs& a) {
  const Halves<T> x{a.x, a.x_b, a.first};
  const T *w = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const int64_t wo = a.transposed ? 1 : a.c, wi = a.transposed ? a.c : 1;
  constexpr int64_t kTile = 16 * lanes<T>();
  const int64_t tiles = (a.s + kTile - 1) / kTile;
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < a.n * tiles; ++item) {
    const int64_t n = item / tiles, from = item % tiles * kTile, to = from + kTile < a.s ? from + kTile : a.s;
    for (int64_t o = 0; o < a.c;) {
      const int64_t rows = a.c - o >= 6 ? 6 : a.c - o;
      T* y[6];
      for (int64_t k = 0; k < rows; ++k)
        y[k] = o + k < a.split ? static_cast<T*>(a.y) + (n * a.split + o + k) * a.s
                               : static_cast<T*>(a.y_b) + (n * (a.c - a.split) + o + k - a.split) * a.s;
      const T *wr = w + o * wo, *br = bias ? bias + o : nullptr;
      switch (rows) {
        case 6: mix_rows<T, 6>(x, wr, wo, wi, br, y, n, from, to, a.c); break;
        case 5: mix_rows<T, 5>(x, wr, wo, wi, br, y, n, from, to, a.c); break;
        case 4: mix_rows<T, 4>(x, wr, wo, wi, br, y, n, from, to, a.c); break;
        case 3: mix_rows<T, 3>(x, wr, wo, wi, br, y, n, from, to, a.c); break;
        case 2: mix_rows<T, 2>(x, wr, wo, wi, br, y, n, from, to, a.c); break;
        default: mix_rows<T, 1>(x, wr, wo, wi, br, y, n, from, to, a.c); break;
      }
      o += rows;
    }
  }
}

// `count` positions of all channels as rows of `pitch`, zero behind the channels.
template <class T>
void pack_rows(const View& va, const View& vb, int64_t first, int64_t channels, int64_t pitch, int64_t n, int64_t s,
               int64_t count, T* to) {
  for (int64_t p = 0; p < count; ++p, to += pitch) {
    const T* in = static_cast<const T*>(va.data) + n * va.n + (s + p) * va.s;
    for (int64_t c = 0; c < first; ++c) to[c] = in[c];
    if (first < channels) {
      in = static_cast<const T*>(vb.data) + n * vb.n + (s + p) * vb.s;
      for (int64_t c = first; c < channels; ++c) to[c] = in[c - first];
    }
    for (int64_t c = channels; c < pitch; ++c) to[c] = 0;
  }
}

template <class T, int kRows>
GENFAST_INLINE void last_block(const T* x, const T* w, const T* bias, T* y, int64_t channels, int64_t pitch) {
  Vec<T> acc[kRows];
  for (int p = 0; p < kRows; ++p) acc[p] = load(bias);
  for (int64_t i = 0; i < channels; ++i) {
    const Vec<T> weight = load(w + i * pitch);
    for (int p = 0; p < kRows; ++p) acc[p] += splat(x[p * pitch + i]) * weight;
  }
  for (int p = 0; p < kRows; ++p) store(y + p * pitch, acc[p]);
}

template <class T>
void mix_last(const ChannelMixArgs& a) {
  constexpr int L = lanes<T>();
  const int64_t pitch = (a.c + L - 1) / L * L;
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const Workspace<T> matrix((a.c + 1) * pitch, Workspace<T>::kZeros);
  T* w = matrix.get();  // (in, out), padded; then the bias
  for (int64_t o = 0; o < a.c; ++o) {
    for (int64_t i = 0; i < a.c; ++i) w[i * pitch + o] = a.transposed ? weight[i * a.c + o] : weight[o * a.c + i];
    w[a.c * pitch + o] = bias ? bias[o] : T(0);
  }
  const int64_t tiles = (a.s + kPanel - 1) / kPanel;
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
  const PerThread<T> panels(threads, 2 * kPanel * pitch);
#pragma omp parallel num_threads(threads)
  {
    T* x = panels.get();
    T* y = x + kPanel * pitch;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < a.n * tiles; ++item) {
      const int64_t n = item / tiles, s = item % tiles * kPanel, count = a.s - s < kPanel ? a.s - s : kPanel;
      pack_rows(a.x, a.x_b, a.first, a.c, pitch, n, s, count, x);
      for (int64_t o = 0; o < pitch; o += L) {
        int64_t p = 0;
        for (; p + 8 <= count; p += 8)
          last_block<T, 8>(x + p * pitch, w + o, w + a.c * pitch + o, y + p * pitch + o, a.c, pitch);
        for (; p < count; ++p)
          last_block<T, 1>(x + p * pitch, w + o, w + a.c * pitch + o, y + p * pitch + o, a.c, pitch);
      }
      const int64_t rest = a.c - a.split;
      T* out = static_cast<T*>(a.y) + (n * a.s + s) * a.split;
      for (int64_t p = 0; p < count; ++p)
        for (int64_t c = 0; c < a.split; ++c) *out++ = y[p * pitch + c];
      out = static_cast<T*>(a.y_b) + (n * a.s + s) * rest;
      for (int64_t p = 0; p < count && rest; ++p)
        for (int64_t c = a.split; c < a.c; ++c) *out++ = y[p * pitch + c];
    }
  }
}

// acc[o][i] += d[p][o] x[p][i..] over a panel of positions; sums is (C, pitch).
template <class T, int kRows>
GENFAST_INLINE void outer_block(const T* d, const T* x, T* sums, int64_t count, int64_t pitch) {
  Vec<T> acc[kRows] = {};
  for (int64_t p = 0; p < count; ++p) {
    const Vec<T> in = load(x + p * pitch);
    for (int o = 0; o < kRows; ++o) acc[o] += splat(d[p * pitch + o]) * in;
  }
  for (int o = 0; o < kRows; ++o) store(sums + o * pitch, load(sums + o * pitch) + acc[o]);
}

template <class T, int kRows, int kCols>
GENFAST_INLINE void dot_block(const T* const* d, const T* const* x, int64_t s, T* sums, int64_t pitch) {
  constexpr int L = lanes<T>();
  Vec<T> acc[kRows][kCols] = {};
  int64_t k = 0;
  for (; k < s; k += L) {
    const int part = int(s - k < L ? s - k : L);
    Vec<T> dv[kRows], xv[kCols];
    for (int o = 0; o < kRows; ++o) dv[o] = part == L ? load(d[o] + k) : load_part(d[o] + k, part);
    for (int i = 0; i < kCols; ++i) xv[i] = part == L ? load(x[i] + k) : load_part(x[i] + k, part);
    for (int o = 0; o < kRows; ++o)
      for (int i = 0; i < kCols; ++i) acc[o][i] += dv[o] * xv[i];
  }
  for (int o = 0; o < kRows; ++o)
    for (int i = 0; i < kCols; ++i) sums[o * pitch + i] += sum<T>(acc[o][i]);
}

template <class T>
void weight_grad_sample(const ChannelMixArgs& a, int64_t n, T* sums, T* bias_sums, int64_t pitch) {  // NCHW
  const Halves<T> d{a.grad, a.grad_b, a.split}, x{a.x, a.x_b, a.first};
  for (int64_t o = 0; o < a.c; ++o) {
    const T* p = d.at(n, o, 0);
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < a.s; ++k) total += p[k];
    bias_sums[o] += total;
  }
  for (int64_t o = 0; o < a.c; o += 4)
    for (int64_t i = 0; i < a.c; i += 4) {
      const T *dp[4], *xp[4];
      for (int64_t k = 0; k < 4; ++k) {
        dp[k] = d.at(n, o + k < a.c ? o + k : o, 0);
        xp[k] = x.at(n, i + k < a.c ? i + k : i, 0);
      }
      if (o + 4 <= a.c && i + 4 <= a.c) {
        dot_block<T, 4, 4>(dp, xp, a.s, sums + o * pitch + i, pitch);
      } else {
        for (int64_t k = 0; k < 4 && o + k < a.c; ++k)
          for (int64_t j = 0; j < 4 && i + j < a.c; ++j)
            dot_block<T, 1, 1>(dp + k, xp + j, a.s, sums + (o + k) * pitch + i + j, pitch);
      }
    }
}

template <class T>
void weight_grad_panel(const ChannelMixArgs& a, int64_t n, int64_t s, int64_t count, T* buffer, T* sums, T* bias_sums,
                       int64_t pitch) {  // channels_last
  T *d = buffer, *x = buffer + kPanel * pitch;
  pack_rows(a.grad, a.grad_b, a.split, a.c, pitch, n, s, count, d);
  pack_rows(a.x, a.x_b, a.first, a.c, pitch, n, s, count, x);
  for (int64_t p = 0; p < count; ++p)
#pragma omp simd
    for (int64_t o = 0; o < pitch; ++o) bias_sums[o] += d[p * pitch + o];
  for (int64_t i = 0; i < pitch; i += lanes<T>()) {
    int64_t o = 0;
    for (; o + 12 <= a.c; o += 12) outer_block<T, 12>(d + o, x + i, sums + o * pitch + i, count, pitch);
    for (; o + 4 <= a.c; o += 4) outer_block<T, 4>(d + o, x + i, sums + o * pitch + i, count, pitch);
    for (; o < a.c; ++o) outer_block<T, 1>(d + o, x + i, sums + o * pitch + i, count, pitch);
  }
}

template <class T>
void weight_grad(const ChannelMixArgs& a) {
  constexpr int L = lanes<T>();
  const int64_t pitch = (a.c + L - 1) / L * L, size = (a.c + 1) * pitch;
  const int64_t tiles = a.channels_last ? (a.s + kPanel - 1) / kPanel : 1;
  const int64_t items = a.n * tiles, groups = items < kGroups ? (items ? items : 1) : kGroups;
  const Workspace<T> all_sums(groups * size, Workspace<T>::kZeros);
  T* sums = all_sums.get();
  const int threads = a.n * a.c * a.s < kSerial ? 1 : a.threads;
  const PerThread<T> buffers(threads, 2 * kPanel * pitch);
#pragma omp parallel num_threads(threads)
  {
    T* buffer = buffers.get();
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      T *own = sums + g * size, *bias = own + a.c * pitch;
      for (int64_t item = items * g / groups; item < items * (g + 1) / groups; ++item) {
        const int64_t n = item / tiles, s = item % tiles * kPanel;
        if (a.channels_last)
          weight_grad_panel<T>(a, n, s, a.s - s < kPanel ? a.s - s : kPanel, buffer, own, bias, pitch);
        else
          weight_grad_sample<T>(a, n, own, bias, pitch);
      }
    }
  }
  T *dw = static_cast<T*>(a.grad_weight), *db = static_cast<T*>(a.grad_bias);
  for (int64_t o = 0; o <= a.c; ++o)  // the last row holds the bias
    for (int64_t i = 0; i < a.c; ++i) {
      T total = 0;
      for (int64_t g = 0; g < groups; ++g) total += sums[g * size + o * pitch + i];
      (o < a.c ? dw[o * a.c + i] : db[i]) = total;
    }
}

// ---- the C x C matrix W = P L (U + diag(sign e^log_s)), with the activation norm before it folded in ----

// The rows of the matrix are read and written where the permutation says, and it may come from a file.
void check_permutation(const PluArgs& a) {
  Workspace<uint8_t> seen(a.c, Workspace<uint8_t>::kZeros);
  for (int64_t i = 0; i < a.c; ++i) {
    const int64_t row = a.perm[i];
    if (row < 0 || row >= a.c || seen.get()[row]++)
      throw std::invalid_argument("invertible_conv1x1: perm is no permutation of 0 to " + std::to_string(a.c - 1) +
                                  ": perm[" + std::to_string(i) + "] is " + std::to_string(row));
  }
}

template <class T>
struct Plu {
  const PluArgs& a;
  int64_t c;
  Workspace<T> both;
  T *right, *product;  // (C, C) each: U + diag, and L (U + diag)
  explicit Plu(const PluArgs& args) : a(args), c(args.c), both(2 * c * c, Workspace<T>::kZeros) {
    check_permutation(args);
    right = both.get();
    product = right + c * c;
    const T *lower = static_cast<const T*>(a.lower), *upper = static_cast<const T*>(a.upper);
    for (int64_t i = 0; i < c; ++i) {
      right[i * c + i] = diagonal(i);
      memcpy(right + i * c + i + 1, upper + i * c + i + 1, size_t(c - i - 1) * sizeof(T));
    }
    for (int64_t i = 0; i < c; ++i) {
      T* row = product + i * c;
      memcpy(row, right + i * c, size_t(c) * sizeof(T));
      for (int64_t k = 0; k < i; ++k) {
        const T l = lower[i * c + k];
        const T* r = right + k * c;
#pragma omp simd
        for (int64_t j = k; j < c; ++j) row[j] += l * r[j];
      }
    }
  }
  T diagonal(int64_t i) const {
    return T(double(static_cast<const T*>(a.sign_s)[i]) * ::exp(double(static_cast<const T*>(a.log_s)[i])));
  }
  double scale(int64_t i) const {
    if (!a.scale) return 1;
    const double s = double(static_cast<const T*>(a.scale)[i]);
    return a.log_scale ? ::exp(s) : s;
  }
};

template <class T>
void plu_forward(const PluArgs& a) {
  const Plu<T> plu(a);
  const int64_t c = a.c;
  const T* bias = static_cast<const T*>(a.bias);
  T *weight = static_cast<T*>(a.weight), *folded = static_cast<T*>(a.folded);
  double unit = 0;
  for (int64_t i = 0; i < c; ++i) {
    unit += double(static_cast<const T*>(a.log_s)[i]);
    if (a.scale) unit += a.log_scale ? double(static_cast<const T*>(a.scale)[i]) : ::log(fabs(plu.scale(i)));
  }
  for (int64_t n = 0; n < a.batch; ++n) static_cast<T*>(a.logdet)[n] = T(double(a.positions) * unit);
  for (int64_t i = 0; i < c; ++i) {
    const T* row = plu.product + a.perm[i] * c;
    double b = 0;
    for (int64_t j = 0; j < c; ++j) {
      if (bias) b += double(row[j]) * double(bias[j]);
      weight[i * c + j] = row[j];
    }
    folded[i] = T(b);
  }
  if (!a.scale) return;
  for (int64_t j = 0; j < c; ++j) {
    const T s = T(plu.scale(j));
    for (int64_t i = 0; i < c; ++i) weight[i * c + j] *= s;
  }
}

template <class T>
void plu_backward(const PluArgs& a) {
  const Plu<T> plu(a);
  const int64_t c = a.c;
  const T *dw = static_cast<const T*>(a.grad_weight), *df = static_cast<const T*>(a.grad_folded);
  const T *lower = static_cast<const T*>(a.lower), *bias = static_cast<const T*>(a.bias);
  T *dl = static_cast<T*>(a.grad_lower), *du = static_cast<T*>(a.grad_upper), *dlog_s = static_cast<T*>(a.grad_log_s);
  double g = 0;
  for (int64_t n = 0; n < a.batch && a.grad_logdet; ++n) g += double(static_cast<const T*>(a.grad_logdet)[n]);
  g *= double(a.positions);
  const Workspace<T> sums(c * c + 2 * c, Workspace<T>::kZeros);
  T* da = sums.get();  // P^T grad W, then two rows of column sums
  T *ds = da + c * c, *s = ds + c;
  for (int64_t j = 0; j < c; ++j) s[j] = T(plu.scale(j));
  for (int64_t i = 0; i < c; ++i) {
    const int64_t k = a.perm[i];
    const T* w = plu.product + k * c;
    const T d_folded = df && bias ? df[i] : T(0);
    for (int64_t j = 0; j < c; ++j) {
      const T d = dw ? dw[i * c + j] : T(0);
      ds[j] += d * w[j];
      da[k * c + j] = d * s[j] + (bias ? d_folded * bias[j] : T(0));
    }
  }
  if (a.scale)
    for (int64_t j = 0; j < c; ++j)
      static_cast<T*>(a.grad_scale)[j] = T(a.log_scale ? double(ds[j]) * plu.scale(j) + g : double(ds[j]) + g / plu.scale(j));
  if (bias) {
    T* db = static_cast<T*>(a.grad_bias);
    memset(db, 0, size_t(c) * sizeof(T));
    for (int64_t i = 0; i < c && df; ++i) {
      const T* w = plu.product + a.perm[i] * c;
      for (int64_t j = 0; j < c; ++j) db[j] += df[i] * w[j];
    }
  }
  for (int64_t i = 0; i < c; ++i)  // tril(dA R^T, -1)
    for (int64_t k = 0; k < c; ++k) {
      T total = 0;
      if (k < i) {
        const T *x = da + i * c, *y = plu.right + k * c;
#pragma omp simd reduction(+ : total)
        for (int64_t j = k; j < c; ++j) total += x[j] * y[j];
      }
      dl[i * c + k] = total;
    }
  for (int64_t k = 0; k < c; ++k) {  // triu(L^T dA); the diagonal belongs to log_s
    T* row = du + k * c;
    memcpy(row, da + k * c, size_t(c) * sizeof(T));
    for (int64_t i = k + 1; i < c; ++i) {
      const T l = lower[i * c + k];
      const T* x = da + i * c;
#pragma omp simd
      for (int64_t j = k; j < c; ++j) row[j] += l * x[j];
    }
    dlog_s[k] = T(double(row[k]) * double(plu.diagonal(k)) + g);
    memset(row, 0, size_t(k + 1) * sizeof(T));
  }
}

}  // namespace

GENFAST_KERNEL(channel_mix, ChannelMixArgs, a.channels_last ? mix_last<T>(flattened(a)) : mix_first<T>(flattened(a)))
GENFAST_KERNEL(channel_mix_weight_grad, ChannelMixArgs, weight_grad<T>(flattened(a)))
GENFAST_KERNEL(plu_weight, PluArgs, plu_forward<T>(a))
GENFAST_KERNEL(plu_weight_backward, PluArgs, plu_backward<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
