// The pixel program engine: a causal network as a flat list of steps over cached feature maps, run pixel by pixel.
//
// genfast/programs/pixel_program.py writes the list. Steps come in three lists: those of the row's beginning (whatever depends on rows
// above only: products over the whole row, bound by the FMA rate), those of each pixel (left taps, centre taps, 1 x 1s, the
// sampling itself; for one image bound by reading their weights from the second-level cache), and those of the row's end.
// A feature map is a ring of rows, (row, column, channel) with zero columns beside them, so a tap is an offset and what lies
// outside the image is zero. Every activation is computed once: a sample costs the multiplications of one forward pass.
//
// From as many images as threads on, each thread runs the whole program on images of its own and never waits; below that the
// threads share the products of each row. A step on a set of points is the same whether they are the columns of a row or the
// images at a pixel: rows of a product with a constant distance.
#include <math.h>
#include <string.h>

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gemm.h"
#include "kernels.h"
#include "mixture.h"
#include "workspace.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

using F = float;

constexpr int64_t kShared = 1 << 19;  // products of a row from which on threads share it: some ten times what meeting costs

// As genfast/programs/pixel_program.py writes them.
enum Kind : int64_t {
  kConv, kCopy, kAdd, kRelu, kElu, kTanh, kSigmoid, kScale, kGate, kLinearGate, kConcatElu, kStatic, kEmbed, kInput,
  kCategorical, kMixture,
};

struct BufferInfo {
  int64_t offset, rows, columns, left, stride, scale;
};

struct Step {
  int64_t kind, scale, out, out_offset, count, a, a_offset, b, b_offset, weight, bias, first, segments, stride, up, relu, arg0,
      arg1, barrier, phase;
};

struct Tap {
  int64_t dr, dc, channel, length;
};

struct Program {
  int64_t buffers, begin, pixel, end, height, width, channels, image_floats, uniforms, levels;
  const BufferInfo* buffer;
  const Step* step;
  const Tap* tap;

  explicit Program(const int64_t* p)
      : buffers(p[0]), begin(p[1]), pixel(p[2]), end(p[3]), height(p[4]), width(p[5]), channels(p[6]), image_floats(p[7]),
        uniforms(p[8]), levels(p[9]) {
    buffer = reinterpret_cast<const BufferInfo*>(p + 10);
    step = reinterpret_cast<const Step*>(buffer + buffers);
    tap = reinterpret_cast<const Tap*>(step + begin + pixel + end);
  }

  // Of what is computed at the beginning of a row.
  int64_t row_products() const {
    int64_t products = 0;
    for (const Step* s = step; s < step + begin; ++s)
      for (const Tap* t = tap + s->first; t < tap + s->first + s->segments; ++t)
        products += width / s->scale / s->up * s->count * t->length;
    return products;
  }

  // The most segments of a convolution, and the most levels that one step draws from.
  int64_t most_segments() const {
    int64_t most = 0;
    for (const Step* s = step; s < step + begin + pixel + end; ++s)
      if (s->kind == kConv) most = std::max(most, s->segments);
    return most;
  }
  int64_t most_levels() const {
    int64_t most = 0;
    for (const Step* s = step; s < step + begin + pixel + end; ++s)
      if (s->kind == kCategorical) most = std::max(most, s->count);
    return most;
  }
};

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
int64_t modulo(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

struct Tile {
  const F *bias, *add;  // either may be null
  F* out;
  int64_t add_ld, ld;
  bool relu;

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void begin(Vec<F> (&acc)[MR][NV]) const {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const Vec<F> b = bias ? load(bias + v * lanes<F>()) : Vec<F>{};
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[m][v] = add ? b + load(add + m * add_ld + v * lanes<F>()) : b;
    }
  }

  template <int MR, int NV>
  GENFAST_INLINE_MEMBER void end(Vec<F> (&acc)[MR][NV]) const {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v)
        store(out + m * ld + v * lanes<F>(), relu ? (acc[m][v] < 0.f ? Vec<F>{} : acc[m][v]) : acc[m][v]);  // NaN stays
  }
};

// The points that a step is run on: `count` of them from (row, column) of image `image`, either columns or images apart.
struct Points {
  int64_t image, row, column, count;
  bool images;
};

// What the threads of a team work in, made before the region in which engines run.
struct TeamMemory {
  PerThread<Segment> segments;
  PerThread<F> weights;  // of the levels that a step draws from

  TeamMemory(int threads, const Program& p)
      : segments(threads, p.most_segments()), weights(threads, padded<F>(p.most_levels())) {}
};

class Engine {
 public:
  Engine(const PixelProgramArgs& a, const Program& p, const TeamMemory& memory, int64_t first, int64_t last, int member, int members)
      : a_(a),
        p_(p),
        first_(first),
        last_(last),
        member_(member),
        members_(members),
        segments_(memory.segments.get()),
        level_weights_(memory.weights.get()) {}

  void rows(int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      if (r > r0) wait();  // for the end of the row above
      if (r % a_.period >= a_.active) {
        if (member_ == 0) clear(r);
        continue;
      }
      row_steps(p_.step, p_.begin, r);
      wait();
      if (member_ == 0)
        for (int64_t c = 0; c < p_.width; ++c) pixel_steps(r, c);
      wait();
      row_steps(p_.step + p_.begin + p_.pixel, p_.end, r);
    }
  }

 private:
  const PixelProgramArgs& a_;
  const Program& p_;
  const int64_t first_, last_;  // images
  const int member_, members_;  // of the threads that share these images
  Segment* const segments_;
  F* const level_weights_;

  void wait() {
    if (members_ > 1) {
#pragma omp barrier
    }
  }

  // Between the frames of a video lies what their convolutions see outside them.
  void clear(int64_t r) {
    for (int64_t n = first_; n < last_; ++n)
      for (int64_t b = 0; b < p_.buffers; ++b) {
        const BufferInfo& info = p_.buffer[b];
        memset(at(b, n, r, 0), 0, size_t((info.columns - info.left) * info.stride) * sizeof(F));
      }
  }

  int64_t image_row(int64_t r) const { return r / a_.period * a_.active + r % a_.period; }

  // Of colour `colour` at a pixel, for images and uniform numbers.
  int64_t pixel_of(int64_t n, int64_t colours, int64_t colour, int64_t r, int64_t c) const {
    return ((n * colours + colour) * p_.height + image_row(r)) * p_.width + c;
  }

  F* at(int64_t buffer, int64_t image, int64_t row, int64_t column) const {
    const BufferInfo& b = p_.buffer[buffer];
    return a_.cache + image * p_.image_floats + b.offset +
           (modulo(row, b.rows) * b.columns + b.left + column) * b.stride;
  }

  void row_steps(const Step* steps, int64_t count, int64_t r) {
    for (int64_t i = 0; i < count; ++i) {
      const Step& s = steps[i];
      if (s.barrier) wait();
      if (r % s.scale) continue;
      const int64_t row = r / s.scale, width = p_.width / s.scale, images = last_ - first_;
      if (s.kind == kConv && row % s.up != s.phase / s.up) continue;
      const int64_t from = s.kind == kConv ? s.phase % s.up : 0, step = s.kind == kConv ? s.up : 1;
      if ((width - from + step - 1) / step < images) {
        for (int64_t c = from; c < width; c += step) run(s, {first_, row, c, images, true}, true);
      } else if (s.kind == kConv) {
        conv_images(s, row, from, (width - from + step - 1) / step);
      } else {
        for (int64_t n = first_; n < last_; ++n) run(s, {n, row, 0, width, false}, true);
      }
    }
  }

  void pixel_steps(int64_t r, int64_t c) {
    const Step* steps = p_.step + p_.begin;
    for (int64_t i = 0; i < p_.pixel; ++i) {
      const Step& s = steps[i];
      if (s.scale > 1 && (r % s.scale || c % s.scale)) continue;
      const int64_t row = r / s.scale, column = c / s.scale;
      if (s.up > 1 && (row % s.up != s.phase / s.up || column % s.up != s.phase % s.up)) continue;
      run(s, {first_, row, column, last_ - first_, true}, false);
    }
  }

  void run(const Step& s, const Points& points, bool shared) {
    if (s.kind == kConv) {
      gather(s, points.row);
      const int64_t k = terms(s);
      int64_t unit = 0;
      for (int64_t block = 0; block < s.count; block += block_columns<F>()) {
        place(s, block);
        for (int64_t t = 0; t < tiles(points.count); ++t, ++unit)
          if (!shared || unit % members_ == member_) conv_tile(s, points, block, k, t);
      }
      return;
    }
    if (shared && members_ > 1 && member_) return;  // too little to share
    elementwise(s, points);
  }

  // All images of a row: the block of columns outermost, so that its panel stays in the cache.
  void conv_images(const Step& s, int64_t row, int64_t column, int64_t count) {
    gather(s, row);
    const int64_t k = terms(s);
    int64_t unit = 0;
    for (int64_t block = 0; block < s.count; block += block_columns<F>()) {
      place(s, block);
      for (int64_t n = first_; n < last_; ++n)
        for (int64_t t = 0; t < tiles(count); ++t, ++unit)
          if (unit % members_ == member_) conv_tile(s, {n, row, column, count, false}, block, k, t);
    }
  }

  // The step's taps as offsets from the source's row 0, column 0, for an output row.
  void gather(const Step& s, int64_t row) {
    const BufferInfo& b = p_.buffer[s.a];
    const int64_t source = row * s.stride / s.up;
    for (int64_t i = 0; i < s.segments; ++i) {
      const Tap& t = p_.tap[s.first + i];
      segments_[i] = {(modulo(source + t.dr, b.rows) * b.columns + b.left + t.dc) * b.stride + t.channel, 0, t.length};
    }
  }

  // Of each sum of a step whose taps are gathered.
  int64_t terms(const Step& s) const {
    int64_t k = 0;
    for (int64_t i = 0; i < s.segments; ++i) k += segments_[i].length;
    return k;
  }

  static int64_t width_of(const Step& s, int64_t block) {
    return std::min(block_columns<F>(), padded<F>(s.count - block));
  }

  void place(const Step& s, int64_t block) {
    int64_t at = 0;
    const int64_t width = width_of(s, block);
    for (int64_t i = 0; i < s.segments; ++i) {
      segments_[i].b = at * width;
      at += segments_[i].length;
    }
  }

  void conv_tile(const Step& s, const Points& points, int64_t block, int64_t k, int64_t t) const {
    const BufferInfo &source = p_.buffer[s.a], &target = p_.buffer[s.out];
    const int64_t width = width_of(s, block), first = tile_start(points.count, t), height = tile_start(points.count, t + 1) - first;
    const int64_t image = points.image + (points.images ? first : 0);
    const int64_t column = points.column + (points.images ? 0 : first * s.up);
    const F* a = a_.cache + image * p_.image_floats + source.offset + column * s.stride / s.up * source.stride;
    Tile tile;
    tile.bias = s.bias < 0 ? nullptr : a_.weights + s.bias + block;
    tile.add = nullptr;
    tile.add_ld = 0;
    if (s.b >= 0) {
      tile.add = at(s.b, image, points.row, column) + s.b_offset + block;
      tile.add_ld = points.images ? p_.image_floats : s.up * p_.buffer[s.b].stride;
    }
    tile.out = at(s.out, image, points.row, column) + s.out_offset + block;
    tile.ld = points.images ? p_.image_floats : s.up * target.stride;
    tile.relu = s.relu != 0;
    GENFAST_ISA::run<F>(height, width / lanes<F>(), tile, a, points.images ? p_.image_floats : s.stride * source.stride, 1,
                        segments_, s.segments, a_.weights + s.weight + block * k, width);
  }

  // A function of each vector of channels; the last one must not reach into the next pixel.
  template <class Function>
  static void each(F* out, int64_t count, const Function& function) {
    int64_t k = 0;
    for (; k + lanes<F>() <= count; k += lanes<F>()) store(out + k, function(k));
    if (k < count) store_part(out + k, function(k), int(count - k));
  }

  static Vec<F> elu(Vec<F> x) {
    const Vec<F> low = x < -80.f ? splat(-80.f) : (x > 0.f ? Vec<F>{} : x);
    return x > 0.f ? x : exp_minus_one<F>(low);
  }

  static Vec<F> logistic(Vec<F> x) { return 1.f / (1.f + exp<F>(-x)); }

  void elementwise(const Step& s, const Points& points) const {
    for (int64_t i = 0; i < points.count; ++i) {
      const int64_t n = points.image + (points.images ? i : 0), r = points.row, c = points.column + (points.images ? 0 : i);
      F* out = s.out < 0 ? nullptr : at(s.out, n, r, c) + s.out_offset;
      const F* a = s.a < 0 ? nullptr : at(s.a, n, s.kind == kCopy ? r - s.arg0 : r, s.kind == kCopy ? c - s.arg1 : c) + s.a_offset;
      const F* b = s.b < 0 ? nullptr : at(s.b, n, r, c) + s.b_offset;
      switch (s.kind) {
        case kCopy: each(out, s.count, [&](int64_t k) { return load(a + k); }); break;
        case kAdd: each(out, s.count, [&](int64_t k) { return load(a + k) + load(b + k); }); break;
        case kRelu: each(out, s.count, [&](int64_t k) { return load(a + k) < 0.f ? Vec<F>{} : load(a + k); }); break;
        case kElu: each(out, s.count, [&](int64_t k) { return elu(load(a + k)); }); break;
        case kTanh: each(out, s.count, [&](int64_t k) { return tanh<F>(load(a + k)); }); break;
        case kSigmoid: each(out, s.count, [&](int64_t k) { return logistic(load(a + k)); }); break;
        case kScale: {
          const F factor = a_.weights[s.weight];
          each(out, s.count, [&](int64_t k) { return load(a + k) * factor; });
          break;
        }
        case kGate: each(out, s.count, [&](int64_t k) { return tanh<F>(load(a + k)) * logistic(load(b + k)); }); break;
        case kLinearGate: each(out, s.count, [&](int64_t k) { return load(a + k) * logistic(load(b + k)); }); break;
        case kConcatElu:  // the second half lies arg0 channels on
          each(out, s.count, [&](int64_t k) { return elu(load(a + k)); });
          each(out + s.arg0, s.count, [&](int64_t k) { return elu(-load(a + k)); });
          break;
        case kStatic: {  // arg0: which map; its strides by image, row, column; channels as the buffer has them
          const int64_t* m = a_.statics + 4 * s.arg0;
          const F* fixed = reinterpret_cast<const F*>(m[0]) + n * m[1] + image_row(r) * m[2] + c * m[3];
          each(out, s.count, [&](int64_t k) { return load(fixed + k); });
          break;
        }
        case kEmbed: {  // arg0: which colour; a row of the table per level
          const int64_t level = a_.images[pixel_of(n, p_.channels, s.arg0, r, c)];
          const F* row = a_.weights + s.weight + level * s.arg1;
          each(out, s.count, [&](int64_t k) { return load(row + k); });
          break;
        }
        case kInput: {  // arg0: which colour
          const F* scale = a_.weights + s.weight;
          *out = F(a_.images[pixel_of(n, p_.channels, s.arg0, r, c)]) * scale[0] + scale[1];
          break;
        }
        case kCategorical: categorical(s, n, r, c, a); break;
        case kMixture: mixture(s, n, r, c, a); break;
        default: break;
      }
    }
  }

  void record(const Step& s, int64_t n, int64_t r, int64_t c, const F* a) const {
    if (a_.record) memcpy(a_.record + pixel_of(n, 1, 0, r, c) * a_.record_size + s.arg1, a, size_t(s.count) * sizeof(F));
  }

  // Keeps the first place of an image at which its logits or parameters say nothing that could be drawn.
  void fault(int64_t n, int64_t colour, int64_t r, int64_t c) const {
    if (!a_.faults[n]) a_.faults[n] = 1 + (image_row(r) * p_.width + c) * p_.channels + colour;
  }

  // The smallest level whose cumulative probability exceeds the uniform number.
  void categorical(const Step& s, int64_t n, int64_t r, int64_t c, const F* logits) const {
    record(s, n, r, c, logits);
    if (image_row(r) < a_.given) return;
    const int64_t levels = s.count;
    const F inverse = 1.f / a_.temperature;
    F most = logits[0];
    for (int64_t k = 1; k < levels; ++k) most = std::max(most, logits[k]);
    F* const weight = level_weights_;
    for (int64_t k = 0; k < levels; k += lanes<F>()) store(weight + k, exp<F>((load(logits + k) - most) * inverse));
    double total = 0;
    for (int64_t k = 0; k < levels; ++k) total += double(weight[k]);
    if (total != total) fault(n, s.arg0, r, c);  // NaN, infinity, or -infinity throughout, which leave no difference to the most
    const double u = double(uniform(n, s.arg0, r, c)) * total;
    double sum = 0;
    int64_t level = 0;
    for (; level < levels - 1; ++level) {
      sum += double(weight[level]);
      if (sum > u) break;
    }
    a_.images[pixel_of(n, p_.channels, s.arg0, r, c)] = level;
  }

  void mixture(const Step& s, int64_t n, int64_t r, int64_t c, const F* params) const {
    record(s, n, r, c, params);
    if (image_row(r) < a_.given) return;
    const int64_t plane = p_.height * p_.width, at = image_row(r) * p_.width + c;
    int64_t* levels = a_.images + n * p_.channels * plane + at;
    bool drawn = sample_mixture<F>(params, 1, s.arg0, p_.channels, p_.levels, a_.temperature,
                                   a_.uniforms + n * p_.uniforms * plane + at, plane, levels, plane);
    for (int64_t k = s.arg0; k < s.count; ++k) drawn = drawn && params[k] - params[k] == 0;  // also of components not chosen
    if (drawn) return;
    fault(n, 0, r, c);
    for (int64_t colour = 0; colour < p_.channels; ++colour) levels[colour * plane] = 0;
  }

  F uniform(int64_t n, int64_t index, int64_t r, int64_t c) const {
    return a_.uniforms[pixel_of(n, p_.uniforms, index, r, c)];
  }
};

}  // namespace

void pixel_program(const PixelProgramArgs& a) {
  const Program p(a.program);
  if (a.n < a.threads && p.row_products() >= kShared) {
    const TeamMemory memory(a.threads, p);
#pragma omp parallel num_threads(a.threads)
    {
#ifdef _OPENMP
      Engine(a, p, memory, 0, a.n, omp_get_thread_num(), omp_get_num_threads()).rows(a.first_row, a.last_row);
#else
      Engine(a, p, memory, 0, a.n, 0, 1).rows(a.first_row, a.last_row);
#endif
    }
    return;
  }
  const int64_t groups = std::min<int64_t>(a.n, std::max<int64_t>(a.threads, (a.n + a.group - 1) / a.group));
  const int threads = int(std::min<int64_t>(a.threads, groups));  // one that has no images would only spin
  const TeamMemory memory(threads, p);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t g = 0; g < groups; ++g)
    Engine(a, p, memory, a.n * g / groups, a.n * (g + 1) / groups, 0, 1).rows(a.first_row, a.last_row);
}

}  // namespace GENFAST_ISA
}  // namespace genfast
