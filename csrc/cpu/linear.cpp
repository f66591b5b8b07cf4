// The three products of a linear layer, y = x W^T (+ bias), dx = b W and dW = b^T t, with what follows in the epilogue:
// leaky relu, whose signs are kept as one bit an element, or the signs that were kept.
//
// out (rows, columns) = sum over k of a[row, k] b[k, column] over the panels of gemm.h; FLOPs 2 rows columns inner, bound by the
// FMA rate. The epilogue is done on the accumulators: it saves a pass that reads and writes the output, and 31 of 32 bits of
// what a backward keeps.
#include "dtype_switch.h"
#include "gemm.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

template <class T, int kBits>
struct Epilogue {
  T* out;
  const T* bias;
  uint8_t* bits;
  int64_t columns, bytes;
  T slope;

  void operator()(const T* tile, int64_t row, int64_t height, int64_t column, int64_t width) const {
    const int64_t left = columns - column;
    if (left >= width && width == block_columns<T>())
      store_tile<true>(tile, row, height, column, block_columns<T>());
    else
      store_tile<false>(tile, row, height, column, left < width ? left : width);
  }

 private:
  // The first `count` columns; kWhole: all of a block's.
  template <bool kWhole>
  GENFAST_INLINE_MEMBER void store_tile(const T* tile, int64_t row, int64_t height, int64_t column, int64_t count) const {
    constexpr int n = lanes<T>();
    const int64_t width = padded<T>(count);
    for (int64_t m = 0; m < height; ++m, tile += width) {
      uint8_t* at = bits + (row + m) * bytes + column / 8;
      T* to = out + (row + m) * columns + column;
      uint64_t signs = kBits == LinearArgs::kApply ? read(at, count, column) : 0;
      for (int64_t j = 0; j < count; j += n) {
        const int part = kWhole || count - j >= n ? n : int(count - j);
        Vec<T> y = load(tile + j);
        if (bias) y += part == n ? load(bias + column + j) : load_part(bias + column + j, part);
        if (kBits != LinearArgs::kNone) {
          const Mask<T> on = kBits == LinearArgs::kMake ? Mask<T>(y > T(0)) : spread<T>(signs >> j);
          if (kBits == LinearArgs::kMake) signs |= collect<T>(on) << j;
          y = on ? y : rest(y);
        }
        part == n ? store(to + j, y) : store_part(to + j, y, part);
      }
      if (kBits == LinearArgs::kMake) write(at, signs, count, column);
    }
  }

  // slope y, and 0 for slope 0 whatever y; a NaN, which has no sign, stays one where the sign is y's own.
  GENFAST_INLINE_MEMBER Vec<T> rest(Vec<T> y) const {
    if (slope != T(0)) return y * slope;
    return kBits == LinearArgs::kMake ? (y == y ? Vec<T>{} : y) : Vec<T>{};
  }

  // The bits of `count` columns, at most 64; a tile narrower than a byte begins within one.
  static GENFAST_INLINE_MEMBER uint64_t read(const uint8_t* p, int64_t count, int64_t column) {
    uint64_t found = 0;
    if (count == 64) {
      memcpy(&found, p, 8);
      return found;
    }
    for (int64_t i = 0; i < (count + column % 8 + 7) / 8; ++i) found |= uint64_t(p[i]) << (8 * i);
    return found >> (column % 8);
  }

  static GENFAST_INLINE_MEMBER void write(uint8_t* p, uint64_t signs, int64_t count, int64_t column) {
    if (count == 64) {
      memcpy(p, &signs, 8);
      return;
    }
    signs &= (uint64_t(1) << count) - 1;
    if (column % 8) {
      *p = uint8_t(*p | signs << (column % 8));
      return;
    }
    for (int64_t i = 0; i < (count + 7) / 8; ++i) p[i] = uint8_t(signs >> (8 * i));
  }
};

template <class T, int kBits>
void multiply_with(const LinearArgs& a, int threads) {
  T* out = static_cast<T*>(a.out);
  const Epilogue<T, kBits> end{out, static_cast<const T*>(a.bias), a.bits, a.columns, (a.columns + 7) / 8, T(a.slope)};
  const Strided<T> left{static_cast<const T*>(a.a), a.a_row, a.a_inner}, right{static_cast<const T*>(a.b), a.b_inner, a.b_column};
  product<T>(a.rows, a.columns, a.inner, left, right, out, a.columns, threads, end);
}

template <class T>
void multiply_any(const LinearArgs& a) {
  const int threads = a.rows * a.columns * a.inner < 1 << 17 ? 1 : a.threads;  // waking threads costs more than a small product
  if (a.bits_mode == LinearArgs::kMake) return multiply_with<T, LinearArgs::kMake>(a, threads);
  if (a.bits_mode == LinearArgs::kApply) return multiply_with<T, LinearArgs::kApply>(a, threads);
  multiply_with<T, LinearArgs::kNone>(a, threads);
}

}  // namespace

GENFAST_KERNEL(linear, LinearArgs, multiply_any<T>(a))

}  // namespace GENFAST_ISA
}  // namespace genfast
