// The body of the pixel program kernel (pixel_program.cu), written once for a GPU and for the test that emulates it.
//
// A Team is what runs a group of images together: `rank` of `size` threads, in warps of `lanes`; `sync` and `sync_warp` wait
// for its threads, `exchange(x, mask)` gives the x of the thread whose lane differs by `mask`.
#pragma once

#include <stdio.h>

#include "kernels.h"
#include "portable.cuh"

#ifndef GENFAST_ISA
#define GENFAST_ISA cuda
#endif
#include "cpu/mixture.h"

namespace genfast {
namespace cuda {

// As genfast/programs/pixel_program.py writes them, in 32 bits.
enum Kind : int32_t {
  kConv, kCopy, kAdd, kRelu, kElu, kTanh, kSigmoid, kScale, kGate, kLinearGate, kConcatElu, kStatic, kEmbed, kInput,
  kCategorical, kMixture,
};

struct BufferInfo {
  int32_t offset, rows, columns, left, stride, scale;
};

struct Step {
  int32_t kind, scale, out, out_offset, count, a, a_offset, b, b_offset, weight, bias, first, segments, stride, up, relu, arg0,
      arg1, barrier, phase;
};

struct Tap {
  int32_t dr, dc, channel, length;
};

// Read where it lies at each use: a thread's registers hold sums.
class Program {
 public:
  GENFAST_DEVICE explicit Program(const int32_t* numbers) : numbers_(numbers) {}
  GENFAST_DEVICE int32_t begin() const { return numbers_[1]; }
  GENFAST_DEVICE int32_t pixel() const { return numbers_[2]; }
  GENFAST_DEVICE int32_t end() const { return numbers_[3]; }
  GENFAST_DEVICE int32_t height() const { return numbers_[4]; }
  GENFAST_DEVICE int32_t width() const { return numbers_[5]; }
  GENFAST_DEVICE int32_t channels() const { return numbers_[6]; }
  GENFAST_DEVICE int32_t uniforms() const { return numbers_[8]; }
  GENFAST_DEVICE int32_t levels() const { return numbers_[9]; }
  GENFAST_DEVICE const BufferInfo* buffers() const { return reinterpret_cast<const BufferInfo*>(numbers_ + 10); }
  GENFAST_DEVICE const Step* steps() const { return reinterpret_cast<const Step*>(buffers() + numbers_[0]); }
  GENFAST_DEVICE const Tap* taps() const { return reinterpret_cast<const Tap*>(steps() + begin() + pixel() + end()); }

 private:
  const int32_t* numbers_;
};

// What a step is run on: `count` columns of an image's row, `apart` from one another, or `count` images at one place.
struct Points {
  int64_t image;
  int32_t row, column, count, apart;
  bool images;
};

GENFAST_DEVICE void multiply(float4& sum, float a, const float4& w) {
  sum.x += a * w.x;
  sum.y += a * w.y;
  sum.z += a * w.z;
  sum.w += a * w.w;
}

template <class Team>
class Engine {
 public:
  // Images [first, last), whose feature maps follow one another.
  GENFAST_DEVICE Engine(const Team& team, const PixelProgramArgs& a, const int32_t* code, int64_t first, int64_t last)
      : team_(team), a_(a), p_(code), first_(first), images_(int32_t(last - first)) {}

  // Rows [first_row, last_row): each its beginning, its pixels, its end.
  GENFAST_DEVICE void rows() {
    for (int32_t r = a_.first_row; r < a_.last_row; ++r)
      for (int32_t phase = -1; phase <= p_.width(); ++phase) {
        const bool begins = phase < 0, ends = phase == p_.width();
        const Step* steps = p_.steps() + (begins ? 0 : ends ? p_.begin() + p_.pixel() : p_.begin());
        run_list(steps, begins ? p_.begin() : ends ? p_.end() : p_.pixel(), r, begins || ends ? -1 : phase);
      }
  }

 private:
  const Team team_;
  const PixelProgramArgs& a_;
  const Program p_;
  const int64_t first_;
  const int32_t images_;

  // c < 0: over the whole row. Waits before the first step, and before every other that reads what was written since.
  GENFAST_DEVICE void run_list(const Step* steps, int32_t count, int32_t r, int32_t c) {
    bool pending = true;
    for (int32_t i = 0; i < count; ++i) {
      const Step& s = steps[i];
      pending = pending || s.barrier;
      if (r % s.scale || (c >= 0 && c % s.scale)) continue;
      Points points;
      points.row = r / s.scale;
      if (points.row % s.up != s.phase / s.up) continue;
      int32_t repeats = 1, first = 0, step = 1;
      if (c >= 0) {
        points.column = c / s.scale;
        if (points.column % s.up != s.phase % s.up) continue;
        points.images = true;
        points.count = images_;
      } else {
        first = s.phase % s.up;
        step = s.up;
        const int32_t columns = (p_.width() / s.scale - first + step - 1) / step;
        points.images = columns < images_;
        points.count = points.images ? images_ : columns;
        repeats = points.images ? columns : images_;
        points.column = first;
      }
      if (pending) team_.sync();
      pending = false;
      points.image = first_;
      points.apart = points.images ? 0 : step;
      for (int32_t k = 0; k < repeats; ++k) {
        if (s.kind != kConv)
          s.kind < kCategorical ? elementwise(s, points) : draw(s, points);
        else if (points.count > 4)
          product<8>(s, points);
        else if (points.count > 1)
          product<4>(s, points);
        else
          product<1>(s, points);
        if (points.images)
          points.column += step;
        else
          ++points.image;
      }
    }
  }

  GENFAST_DEVICE float* image(int64_t n) const { return a_.cache + n * a_.image_floats; }

  // A place in an image's feature maps; row may lie above the image by less than the ring's height.
  GENFAST_DEVICE int32_t place(int32_t buffer, int32_t row, int32_t column) const {
    const BufferInfo& b = p_.buffers()[buffer];
    return b.offset + int32_t(uint32_t(row + b.rows) % uint32_t(b.rows) * b.columns + b.left + column) * b.stride;
  }

  // How far apart the points lie in a buffer whose columns are `apart` from one to the next.
  GENFAST_DEVICE int32_t distance(const Points& points, int32_t buffer, int32_t apart) const {
    return points.images ? int32_t(a_.image_floats) : apart * p_.buffers()[buffer].stride;
  }

  // A thread makes four columns at M points, so a row of weights is read in whole lines and serves M products each; where
  // that leaves threads idle, `split` of a warp's lanes share the products of one such tile.
  template <int M>
  GENFAST_DEVICE void product(const Step& s, const Points& points) const {
    const int32_t groups = s.count / 4, units = groups * ((points.count + M - 1) / M), lanes = team_.lanes();
    int32_t split = 1;
    while (split < lanes && units * split * 2 <= team_.size) split *= 2;
    const int32_t across = lanes / split, lane = team_.rank % lanes, slice = lane / across;
    const int32_t source_row = points.row * s.stride / s.up, source_column = points.column * s.stride / s.up;
    const int32_t apart = distance(points, s.a, s.stride);  // an upsampled row is written `up` apart, from neighbours
    const int32_t add_apart = s.b < 0 ? 0 : distance(points, s.b, s.up);
    const float* base = image(points.image);
    for (int32_t start = team_.rank / lanes * across; start < units; start += team_.size / lanes * across) {
      const int32_t unit = smaller(start + lane % across, units - 1), tile = unit / groups, group = unit - tile * groups;
      const int32_t first = tile * M;
      // Asked for before the products, whose own way to the second cache then hides this one's.
      const float4 none{0.f, 0.f, 0.f, 0.f};
      const float4 bias = s.bias < 0 ? none : constant_at(reinterpret_cast<const float4*>(a_.weights + s.bias) + group);
      const float* add =
          s.b < 0 ? nullptr : image(points.image) + place(s.b, points.row, points.column) + s.b_offset + 4 * group;
      const float4 alone = M == 1 && add ? *reinterpret_cast<const float4*>(add + first * add_apart) : none;
      int32_t shift[M];
      float4 sum[M];
      GENFAST_UNROLL
      for (int m = 0; m < M; ++m) {
        shift[m] = smaller(first + m, points.count - 1) * apart;
        sum[m] = none;
      }
      const float4* weight = reinterpret_cast<const float4*>(a_.weights + s.weight) + group;
      for (int32_t t = 0; t < s.segments; ++t) {
        const Tap tap = p_.taps()[s.first + t];
        const int32_t at = place(s.a, source_row + tap.dr, source_column + tap.dc) + tap.channel;
        const float* a = base + at;
        int32_t whole = 0;
        if (!((at | apart) & 3)) {
          whole = tap.length & ~3;
          GENFAST_UNROLL_BY((M == 1 ? 4 : 1))
          for (int32_t k = 4 * slice; k < whole; k += 4 * split) {
            const float4* row = weight + k * groups;
            const float4 w0 = constant_at(row), w1 = constant_at(row + groups), w2 = constant_at(row + 2 * groups),
                         w3 = constant_at(row + 3 * groups);
            GENFAST_UNROLL
            for (int m = 0; m < M; ++m) {
              const float4 x = *reinterpret_cast<const float4*>(a + shift[m] + k);
              multiply(sum[m], x.x, w0);
              multiply(sum[m], x.y, w1);
              multiply(sum[m], x.z, w2);
              multiply(sum[m], x.w, w3);
            }
          }
        }
        for (int32_t k = whole + slice; k < tap.length; k += split) {
          const float4 w = constant_at(weight + k * groups);
          GENFAST_UNROLL
          for (int m = 0; m < M; ++m) multiply(sum[m], a[shift[m] + k], w);
        }
        weight += tap.length * groups;
      }
      for (int32_t mask = across; mask < lanes; mask *= 2) {
        GENFAST_UNROLL
        for (int m = 0; m < M; ++m) {
          sum[m].x += team_.exchange(sum[m].x, mask);
          sum[m].y += team_.exchange(sum[m].y, mask);
          sum[m].z += team_.exchange(sum[m].z, mask);
          sum[m].w += team_.exchange(sum[m].w, mask);
        }
      }
      if (slice || start + lane % across >= units) continue;
      const int32_t out_apart = distance(points, s.out, s.up);
      float* out = image(points.image) + place(s.out, points.row, points.column) + s.out_offset + 4 * group;
      GENFAST_UNROLL
      for (int m = 0; m < M; ++m) {
        if (first + m >= points.count) break;
        float4 y = {sum[m].x + bias.x, sum[m].y + bias.y, sum[m].z + bias.z, sum[m].w + bias.w};
        if (add) {
          const float4 z = M == 1 ? alone : *reinterpret_cast<const float4*>(add + (first + m) * add_apart);
          y = {y.x + z.x, y.y + z.y, y.z + z.z, y.w + z.w};
        }
        if (s.relu) y = {relu(y.x), relu(y.y), relu(y.z), relu(y.w)};
        *reinterpret_cast<float4*>(out + (first + m) * out_apart) = y;
      }
    }
  }

  GENFAST_DEVICE int64_t pixel(int64_t n, int32_t colour, int32_t r, int32_t c) const {
    return ((n * p_.channels() + colour) * p_.height() + r) * p_.width() + c;
  }

  GENFAST_DEVICE void elementwise(const Step& s, const Points& points) const {
    for (int32_t i = team_.rank; i < s.count * points.count; i += team_.size) {
      const int32_t point = i / s.count, k = i - point * s.count;
      const int64_t n = points.image + (points.images ? point : 0);
      const int32_t r = points.row, c = points.column + point * points.apart;
      const bool moved = s.kind == kCopy;
      float* out = image(n) + place(s.out, r, c) + s.out_offset + k;
      const float x = s.a < 0 ? 0.f : image(n)[place(s.a, moved ? r - s.arg0 : r, moved ? c - s.arg1 : c) + s.a_offset + k];
      const float y = s.b < 0 ? 0.f : image(n)[place(s.b, r, c) + s.b_offset + k];
      switch (s.kind) {
        case kCopy: *out = x; break;
        case kAdd: *out = x + y; break;
        case kRelu: *out = relu(x); break;
        case kElu: *out = elu(x); break;
        case kTanh: *out = tanhf(x); break;
        case kSigmoid: *out = logistic(x); break;
        case kScale: *out = x * a_.weights[s.weight]; break;
        case kGate: *out = tanhf(x) * logistic(y); break;
        case kLinearGate: *out = x * logistic(y); break;
        case kConcatElu:  // the second half lies arg0 channels on
          *out = elu(x);
          out[s.arg0] = elu(-x);
          break;
        case kStatic: {  // arg0: which map; its address, and its strides by image, row and column
          const int64_t* m = a_.statics + 4 * s.arg0;
          *out = reinterpret_cast<const float*>(m[0])[n * m[1] + r * m[2] + c * m[3] + k];
          break;
        }
        case kEmbed:  // arg0: which colour; a row of the table per level
          *out = a_.weights[s.weight + a_.images[pixel(n, s.arg0, r, c)] * s.arg1 + k];
          break;
        case kInput:  // arg0: which colour
          *out = float(a_.images[pixel(n, s.arg0, r, c)]) * a_.weights[s.weight] + a_.weights[s.weight + 1];
          break;
        default: break;
      }
    }
  }

  // A warp for each image.
  GENFAST_DEVICE void draw(const Step& s, const Points& points) const {
    const int32_t lanes = team_.lanes(), lane = team_.rank % lanes, r = points.row, c = points.column;
    for (int32_t i = team_.rank / lanes; i < points.count; i += team_.size / lanes) {
      const int64_t n = points.image + i;
      const float* params = image(n) + place(s.a, r, c) + s.a_offset;
      if (a_.record) {
        float* to = a_.record + ((n * p_.height() + r) * p_.width() + c) * a_.record_size + s.arg1;
        for (int32_t k = lane; k < s.count; k += lanes) to[k] = params[k];
      }
      if (r < a_.given) continue;
      if (s.kind == kCategorical) {
        categorical(s, n, r, c, params);
      } else {
        float faulty = 0.f;  // also of components that are not chosen
        for (int32_t k = s.arg0 + lane; k < s.count; k += lanes) faulty = params[k] - params[k] == 0.f ? faulty : 1.f;
        for (int32_t mask = 1; mask < lanes; mask *= 2) faulty = fmaxf(faulty, team_.exchange(faulty, mask));
        if (lane == 0) mixture(s, n, r, c, params, faulty == 0.f);
      }
    }
  }

  GENFAST_DEVICE void mixture(const Step& s, int64_t n, int32_t r, int32_t c, const float* params, bool finite) const {
    const int64_t plane = int64_t(p_.height()) * p_.width(), at = int64_t(r) * p_.width() + c;
    int64_t* levels = a_.images + n * p_.channels() * plane + at;
    const bool drawn = sample_mixture<float>(params, 1, s.arg0, p_.channels(), p_.levels(), a_.temperature,
                                             a_.uniforms + n * p_.uniforms() * plane + at, plane, levels, plane);
    if (drawn && finite) return;
    fault(n, 0, r, c);
    for (int32_t colour = 0; colour < p_.channels(); ++colour) levels[colour * plane] = 0;
  }

  // Keeps the first place of an image at which its logits or parameters say nothing that could be drawn, and prints it, since
  // whoever launched this does not wait.
  GENFAST_DEVICE void fault(int64_t n, int32_t colour, int32_t r, int32_t c) const {
    if (a_.faults[n]) return;
    a_.faults[n] = 1 + (int64_t(r) * p_.width() + c) * p_.channels() + colour;
#ifdef __CUDA_ARCH__
    printf("genfast: sample: what image %lld of its part is drawn from is not finite at row %d, column %d, colour %d\n",
           static_cast<long long>(n), int(r), int(c), int(colour));
#endif
  }

  // The smallest level whose cumulative probability exceeds the uniform number. One lane adds up, in the order of the CPU's
  // engine, or a pixel could fall on another level than there and change every pixel after it.
  GENFAST_DEVICE void categorical(const Step& s, int64_t n, int32_t r, int32_t c, const float* logits) const {
    const int32_t lanes = team_.lanes(), lane = team_.rank % lanes;
    const float inverse = 1.f / a_.temperature;
    double* sums = a_.scratch + n * p_.levels();
    float most = logits[0];
    for (int32_t k = lane; k < s.count; k += lanes) most = fmaxf(most, logits[k]);
    for (int32_t mask = 1; mask < lanes; mask *= 2) most = fmaxf(most, team_.exchange(most, mask));
    for (int32_t k = lane; k < s.count; k += lanes) sums[k] = double(expf((logits[k] - most) * inverse));
    team_.sync_warp();
    if (lane == 0) {
      double total = 0;
      GENFAST_UNROLL_BY(8)
      for (int32_t k = 0; k < s.count; ++k) sums[k] = total += sums[k];
      if (total != total) fault(n, s.arg0, r, c);
      const double u = double(a_.uniforms[((n * p_.uniforms() + s.arg0) * p_.height() + r) * p_.width() + c]) * total;
      int32_t low = 0, high = s.count - 1;
      while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (sums[middle] > u)
          high = middle;
        else
          low = middle + 1;
      }
      a_.images[pixel(n, s.arg0, r, c)] = low;
    }
    team_.sync_warp();  // the next colour's sums go to the same place
  }
};

}  // namespace cuda
}  // namespace genfast
