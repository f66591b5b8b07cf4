// The pybind11 module genfast._cpu: raw pointers in, raw pointers out, the instruction set chosen once at import.
// genfast/ops checks every argument before it calls here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace genfast {
void bind_guard(py::module_& m);  // guard.cpp
}

using namespace genfast;

namespace {

using Address = std::uintptr_t;

enum class Isa { kBase, kV3, kV4 };

// The best level this processor has, or the one GENFAST_CPU_ISA names if the processor has that.
Isa detect() {
#ifdef GENFAST_X86_LEVELS
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const char* asked = std::getenv("GENFAST_CPU_ISA");
  if (v4 && (!asked || !std::strcmp(asked, "v4") || !*asked)) return Isa::kV4;
  if (v3 && (!asked || std::strcmp(asked, "base"))) return Isa::kV3;
#endif
  return Isa::kBase;
}

const Isa isa = detect();

const char* isa_name() {
  switch (isa) {
    case Isa::kV4: return "x86-64-v4 (AVX-512)";
    case Isa::kV3: return "x86-64-v3 (AVX2)";
    default: return "baseline";
  }
}

#ifdef GENFAST_X86_LEVELS
#define GENFAST_CALL(kernel, args)                 \
  do {                                             \
    py::gil_scoped_release release;                \
    if (isa == Isa::kV4)                           \
      v4::kernel(args);                            \
    else if (isa == Isa::kV3)                      \
      v3::kernel(args);                            \
    else                                           \
      base::kernel(args);                          \
  } while (0)
#else
#define GENFAST_CALL(kernel, args)  \
  do {                              \
    py::gil_scoped_release release; \
    base::kernel(args);             \
  } while (0)
#endif

template <class T = void>
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

View view(Address data, int64_t n, int64_t c, int64_t s) { return {ptr<>(data), n, c, s}; }

void bind_affine_coupling(py::module_& m) {
  m.def("affine_coupling", [](Address x, Address params, Address y, Address logdet, Address alpha, Address mask, int threads,
                              bool is_double, int64_t xn, int64_t xc, int64_t xs, int64_t pn, int64_t pc, int64_t ps, int64_t n,
                              int64_t c, int64_t s, int64_t width, int64_t r_offset, int64_t t_offset, int64_t step, int scale,
                              bool last, bool inverse, bool channels_last, bool shift_first) {
    AffineCouplingArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.params = view(params, pn, pc, ps);
    a.y = ptr<>(y);
    a.logdet = ptr<>(logdet);
    a.alpha = ptr<>(alpha);
    a.mask = ptr<const uint8_t>(mask);
    a.n = n, a.c = c, a.s = s, a.width = width, a.r_offset = r_offset, a.t_offset = t_offset, a.step = step;
    a.scale = scale, a.last = last, a.inverse = inverse, a.channels_last = channels_last, a.shift_first = shift_first;
    a.threads = threads;
    GENFAST_CALL(affine_coupling, a);
  });
  m.def("affine_coupling_backward",
        [](bool is_double, Address grad_y, int64_t gn, int64_t gc, int64_t gs, Address grad_logdet, Address kept, int64_t kn,
           int64_t kc, int64_t ks, Address params, int64_t pn, int64_t pc, int64_t ps, Address dx, Address dparams,
           Address alpha, Address dalpha, Address mask, int64_t n, int64_t c, int64_t s, int64_t width, int64_t r_offset,
           int64_t t_offset, int64_t step, int scale, bool last, bool inverse, bool keep_output, bool channels_last,
           bool shift_first, int threads) {
          AffineCouplingArgs a{};
          a.is_double = is_double;
          a.x = view(kept, kn, kc, ks);
          a.grad_y = view(grad_y, gn, gc, gs);
          a.params = view(params, pn, pc, ps);
          a.y = ptr<>(dx);
          a.params_out = ptr<>(dparams);
          a.grad_logdet = ptr<>(grad_logdet);
          a.alpha = ptr<>(alpha);
          a.grad_alpha = ptr<>(dalpha);
          a.mask = ptr<const uint8_t>(mask);
          a.n = n, a.c = c, a.s = s, a.width = width, a.r_offset = r_offset, a.t_offset = t_offset, a.step = step;
          a.scale = scale, a.last = last, a.inverse = inverse, a.keep_output = keep_output;
          a.channels_last = channels_last, a.shift_first = shift_first, a.threads = threads;
          GENFAST_CALL(affine_coupling_backward, a);
        });
}

void bind_actnorm(py::module_& m) {
  m.def("actnorm", [](bool is_double, Address x, int64_t xn, int64_t xc, int64_t xs, Address scale, Address bias, Address y,
                      Address logdet, int64_t n, int64_t c, int64_t s, bool channels_last, bool log_scale, bool inverse,
                      int threads) {
    ActNormArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.scale = ptr<>(scale), a.bias = ptr<>(bias), a.y = ptr<>(y), a.logdet = ptr<>(logdet);
    a.n = n, a.c = c, a.s = s, a.channels_last = channels_last, a.log_scale = log_scale, a.inverse = inverse;
    a.threads = threads;
    GENFAST_CALL(actnorm, a);
  });
  m.def("actnorm_backward", [](bool is_double, Address grad_y, int64_t gn, int64_t gc, int64_t gs, Address grad_logdet,
                               Address x, int64_t xn, int64_t xc, int64_t xs, Address scale, Address bias, Address dx,
                               Address ds, Address db, int64_t n, int64_t c, int64_t s, bool channels_last, bool log_scale,
                               bool inverse, int threads) {
    ActNormArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.grad_y = view(grad_y, gn, gc, gs);
    a.grad_logdet = ptr<>(grad_logdet), a.scale = ptr<>(scale), a.bias = ptr<>(bias), a.y = ptr<>(dx);
    a.grad_scale = ptr<>(ds), a.grad_bias = ptr<>(db);
    a.n = n, a.c = c, a.s = s, a.channels_last = channels_last, a.log_scale = log_scale, a.inverse = inverse;
    a.threads = threads;
    GENFAST_CALL(actnorm_backward, a);
  });
}

void bind_invertible_conv1x1(py::module_& m) {
  m.def("channel_mix", [](bool is_double, Address x, int64_t xn, int64_t xc, int64_t xs, int64_t first, Address x_b, int64_t bn,
                          int64_t bc, int64_t bs, Address weight, bool transposed, Address bias, Address y, Address y_b,
                          int64_t n, int64_t c, int64_t s, int64_t split, bool channels_last, int threads) {
    ChannelMixArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.x_b = view(x_b, bn, bc, bs);
    a.first = first, a.split = split;
    a.weight = ptr<>(weight), a.bias = ptr<>(bias), a.transposed = transposed;
    a.y = ptr<>(y), a.y_b = ptr<>(y_b);
    a.n = n, a.c = c, a.s = s, a.channels_last = channels_last, a.threads = threads;
    GENFAST_CALL(channel_mix, a);
  });
  m.def("channel_mix_weight_grad",
        [](bool is_double, Address d, int64_t dn, int64_t dc, int64_t ds, int64_t split, Address d_b, int64_t en, int64_t ec,
           int64_t es, Address x, int64_t xn, int64_t xc, int64_t xs, int64_t first, Address x_b, int64_t bn, int64_t bc,
           int64_t bs, Address grad_weight, Address grad_bias, int64_t n, int64_t c, int64_t s, bool channels_last,
           int threads) {
          ChannelMixArgs a{};
          a.is_double = is_double;
          a.grad = view(d, dn, dc, ds);
          a.grad_b = view(d_b, en, ec, es);
          a.x = view(x, xn, xc, xs);
          a.x_b = view(x_b, bn, bc, bs);
          a.first = first, a.split = split;
          a.grad_weight = ptr<>(grad_weight), a.grad_bias = ptr<>(grad_bias);
          a.n = n, a.c = c, a.s = s, a.channels_last = channels_last, a.threads = threads;
          GENFAST_CALL(channel_mix_weight_grad, a);
        });
  m.def("plu_weight", [](bool is_double, Address perm, Address lower, Address upper, Address sign_s, Address log_s,
                         Address scale, Address bias, Address weight, Address folded, Address logdet, int64_t c, bool log_scale,
                         int64_t batch, int64_t positions) {
    PluArgs a{};
    a.is_double = is_double, a.log_scale = log_scale;
    a.perm = ptr<const int64_t>(perm), a.lower = ptr<>(lower), a.upper = ptr<>(upper), a.sign_s = ptr<>(sign_s);
    a.log_s = ptr<>(log_s), a.scale = ptr<>(scale), a.bias = ptr<>(bias);
    a.weight = ptr<>(weight), a.folded = ptr<>(folded), a.logdet = ptr<>(logdet);
    a.c = c, a.batch = batch, a.positions = positions;
    GENFAST_CALL(plu_weight, a);
  });
  m.def("plu_weight_backward",
        [](bool is_double, Address grad_weight, Address grad_folded, Address grad_logdet, Address perm, Address lower,
           Address upper, Address sign_s, Address log_s, Address scale, Address bias, Address grad_lower, Address grad_upper,
           Address grad_log_s, Address grad_scale, Address grad_bias, int64_t c, bool log_scale, int64_t batch,
           int64_t positions) {
          PluArgs a{};
          a.is_double = is_double, a.log_scale = log_scale;
          a.grad_weight = ptr<>(grad_weight), a.grad_folded = ptr<>(grad_folded), a.grad_logdet = ptr<>(grad_logdet);
          a.perm = ptr<const int64_t>(perm), a.lower = ptr<>(lower), a.upper = ptr<>(upper), a.sign_s = ptr<>(sign_s);
          a.log_s = ptr<>(log_s), a.scale = ptr<>(scale), a.bias = ptr<>(bias);
          a.grad_lower = ptr<>(grad_lower), a.grad_upper = ptr<>(grad_upper), a.grad_log_s = ptr<>(grad_log_s);
          a.grad_scale = ptr<>(grad_scale), a.grad_bias = ptr<>(grad_bias);
          a.c = c, a.batch = batch, a.positions = positions;
          GENFAST_CALL(plu_weight_backward, a);
        });
}

void bind_squeeze(py::module_& m) {
  m.def("squeeze", [](Address x, Address y, int threads, bool is_double, int64_t n, int64_t c, int64_t h, int64_t w,
                      int64_t factor, bool space_to_depth, bool inverse, bool channels_last) {
    SqueezeArgs a{is_double, ptr<>(x), ptr<>(y), n, c, h, w, factor, space_to_depth, inverse, channels_last, threads};
    GENFAST_CALL(squeeze, a);
  });
}

// sizes: relu, tap_count, kernel, n, cin, cout, groups, d, h, w; then the taps, four numbers each.
MaskedConvArgs masked_conv_args(bool is_double, Address sizes, Address weight, Address bias, Address centre, int threads) {
  const int64_t* s = ptr<const int64_t>(sizes);
  MaskedConvArgs a{};
  a.is_double = is_double, a.relu = s[0] != 0;
  a.weight = ptr<>(weight), a.bias = ptr<>(bias), a.centre = ptr<const uint8_t>(centre);
  a.tap_count = s[1], a.kernel = s[2], a.n = s[3], a.cin = s[4], a.cout = s[5], a.groups = s[6];
  a.d = s[7], a.h = s[8], a.w = s[9], a.taps = s + 10, a.threads = threads;
  return a;
}

// Strides are addresses of five numbers each: n, c, d, h, w.
void bind_masked_conv(py::module_& m) {
  m.def("masked_conv", [](bool is_double, Address sizes, Address x, Address x_stride, Address weight, Address bias,
                          Address centre, Address y, Address y_stride, int threads) {
    MaskedConvArgs a = masked_conv_args(is_double, sizes, weight, bias, centre, threads);
    a.x = ptr<>(x), a.x_stride = ptr<const int64_t>(x_stride), a.y = ptr<>(y), a.y_stride = ptr<const int64_t>(y_stride);
    GENFAST_CALL(masked_conv, a);
  });
  m.def("masked_conv_backward", [](bool is_double, Address sizes, Address grad_y, Address grad_stride, Address saved,
                                   Address saved_stride, Address x, Address x_stride, Address weight, Address centre, Address dx,
                                   Address dx_stride, Address grad_weight, Address grad_bias, int threads) {
    MaskedConvArgs a = masked_conv_args(is_double, sizes, weight, 0, centre, threads);
    a.grad_y = ptr<>(grad_y), a.grad_stride = ptr<const int64_t>(grad_stride);
    a.saved = ptr<>(saved), a.saved_stride = ptr<const int64_t>(saved_stride);
    a.x = ptr<>(x), a.x_stride = ptr<const int64_t>(x_stride), a.y = ptr<>(dx), a.y_stride = ptr<const int64_t>(dx_stride);
    a.grad_weight = ptr<>(grad_weight), a.grad_bias = ptr<>(grad_bias);
    GENFAST_CALL(masked_conv_backward, a);
  });
}

void bind_pixel_program(py::module_& m) {
  m.def("pixel_program", [](Address program, Address weights, Address statics, Address cache, Address images, Address uniforms,
                            Address record, Address faults, int64_t record_size, int64_t n, int64_t group, int64_t first_row,
                            int64_t last_row, int64_t given, int64_t period, int64_t active, float temperature, int threads) {
    PixelProgramArgs a{};
    a.program = ptr<const int64_t>(program), a.weights = ptr<const float>(weights), a.statics = ptr<const int64_t>(statics);
    a.cache = ptr<float>(cache), a.images = ptr<int64_t>(images), a.uniforms = ptr<const float>(uniforms);
    a.record = ptr<float>(record), a.faults = ptr<int64_t>(faults), a.record_size = record_size, a.n = n, a.group = group;
    a.first_row = first_row, a.last_row = last_row, a.given = given, a.period = period, a.active = active;
    a.temperature = temperature, a.threads = threads;
    GENFAST_CALL(pixel_program, a);
  });
  m.def("lanes", [] { return isa == Isa::kV4 ? 16 : isa == Isa::kV3 ? 8 : 4; }, "float32 values in a vector");
}

void bind_discretized_logistic_mixture(py::module_& m) {
  const auto common = [](LogisticMixtureArgs& a, Address params, int64_t pn, int64_t pc, int64_t ps, int64_t n, int64_t s,
                         int64_t mixtures, int64_t channels, int64_t levels, bool is_double, bool channels_last, int threads) {
    a.is_double = is_double, a.channels_last = channels_last, a.threads = threads;
    a.params = view(params, pn, pc, ps);
    a.n = n, a.s = s, a.mixtures = mixtures, a.channels = channels, a.levels = levels;
  };
  m.def("logistic_mixture_nll",
        [common](Address params, Address x, Address grad, Address out, int threads, bool backward, bool is_double, int64_t pn,
                 int64_t pc, int64_t ps, int64_t xn, int64_t xc, int64_t xs, int x_bytes, bool x_signed, int64_t n, int64_t s,
                 int64_t mixtures, int64_t channels, int64_t levels, bool channels_last, bool stream) {
          LogisticMixtureArgs a{};
          common(a, params, pn, pc, ps, n, s, mixtures, channels, levels, is_double, channels_last, threads);
          a.x = view(x, xn, xc, xs);
          a.x_bytes = x_bytes, a.x_signed = x_signed, a.stream = stream;
          a.grad = ptr<>(grad);
          (backward ? a.grad_params : a.nll) = ptr<>(out);
          if (backward)
            GENFAST_CALL(logistic_mixture_nll_backward, a);
          else
            GENFAST_CALL(logistic_mixture_nll, a);
        });
  m.def("logistic_mixture_sample",
        [common](Address params, Address uniforms, Address samples, double temperature, int threads, bool is_double, int64_t pn,
                 int64_t pc, int64_t ps, int64_t n, int64_t s, int64_t mixtures, int64_t channels, int64_t levels) {
          LogisticMixtureArgs a{};
          common(a, params, pn, pc, ps, n, s, mixtures, channels, levels, is_double, false, threads);
          a.uniforms = ptr<const float>(uniforms), a.samples = ptr<int64_t>(samples), a.temperature = temperature;
          GENFAST_CALL(logistic_mixture_sample, a);
          for (int64_t i = 0; i < n * channels * s; ++i)
            if (a.samples[i] < 0) return i;
          return int64_t{-1};
        },
        "The first element that was drawn from parameters that are not finite, or -1.");
}

void bind_gated_activation(py::module_& m) {
  const auto common = [](GatedActivationArgs& a, Address x, Address bias, Address out, int threads, bool is_double, int64_t xn,
                         int64_t xc, int64_t xs, int64_t bn, int64_t bc, int64_t bs, int64_t n, int64_t c, int64_t s,
                         int64_t groups, int bias_mode, bool channels_last) {
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.bias = view(bias, bn, bc, bs);
    a.y = ptr<>(out);
    a.n = n, a.c = c, a.s = s, a.groups = groups, a.bias_mode = bias_mode;
    a.channels_last = channels_last, a.threads = threads;
  };
  m.def("gated_activation",
        [common](Address x, Address bias, Address y, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs, int64_t bn,
                 int64_t bc, int64_t bs, int64_t n, int64_t c, int64_t s, int64_t groups, int bias_mode, bool channels_last) {
          GatedActivationArgs a{};
          common(a, x, bias, y, threads, is_double, xn, xc, xs, bn, bc, bs, n, c, s, groups, bias_mode, channels_last);
          GENFAST_CALL(gated_activation, a);
        });
  m.def("gated_activation_backward",
        [common](Address x, Address bias, Address dx, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs,
                 int64_t bn, int64_t bc, int64_t bs, int64_t n, int64_t c, int64_t s, int64_t groups, int bias_mode,
                 bool channels_last, Address grad, int64_t gn, int64_t gc, int64_t gs, Address grad_bias) {
          GatedActivationArgs a{};
          common(a, x, bias, dx, threads, is_double, xn, xc, xs, bn, bc, bs, n, c, s, groups, bias_mode, channels_last);
          a.grad = view(grad, gn, gc, gs);
          a.grad_bias = ptr<>(grad_bias);
          GENFAST_CALL(gated_activation_backward, a);
        });
}

void bind_bias_act(py::module_& m) {
  const auto common = [](Address x, Address bias, Address out, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs,
                         int64_t n, int64_t c, int64_t s, bool channels_last, int act, double alpha, double gain,
                         double clamp) {
    BiasActArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.bias = ptr<>(bias), a.y = ptr<>(out);
    a.n = n, a.c = c, a.s = s, a.act = act;
    a.alpha = alpha, a.gain = gain, a.clamp = clamp;
    a.channels_last = channels_last, a.threads = threads;
    return a;
  };
  m.def("bias_act", [common](Address x, Address bias, Address y, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs,
                             int64_t n, int64_t c, int64_t s, bool channels_last, int act, double alpha, double gain,
                             double clamp) {
    const BiasActArgs a =
        common(x, bias, y, threads, is_double, xn, xc, xs, n, c, s, channels_last, act, alpha, gain, clamp);
    GENFAST_CALL(bias_act, a);
  });
  m.def("bias_act_backward", [common](Address x, Address bias, Address dx, int threads, bool is_double, int64_t xn, int64_t xc,
                                      int64_t xs, int64_t n, int64_t c, int64_t s, bool channels_last, int act, double alpha,
                                      double gain, double clamp, Address grad, int64_t gn, int64_t gc, int64_t gs,
                                      Address grad_bias) {
    BiasActArgs a = common(x, bias, dx, threads, is_double, xn, xc, xs, n, c, s, channels_last, act, alpha, gain, clamp);
    a.grad = view(grad, gn, gc, gs);
    a.grad_bias = ptr<>(grad_bias);
    GENFAST_CALL(bias_act_backward, a);
  });
  m.def("bias_act_second", [common](Address x, Address bias, Address out, int threads, bool is_double, int64_t xn, int64_t xc,
                                    int64_t xs, int64_t n, int64_t c, int64_t s, bool channels_last, int act, double alpha,
                                    double gain, double clamp, Address grad, int64_t gn, int64_t gc, int64_t gs,
                                    Address grad_bias, Address grad_dx, int64_t en, int64_t ec, int64_t es) {
    BiasActArgs a = common(x, bias, out, threads, is_double, xn, xc, xs, n, c, s, channels_last, act, alpha, gain, clamp);
    a.grad = view(grad, gn, gc, gs);
    a.grad_dx = view(grad_dx, en, ec, es);
    a.grad_bias = ptr<>(grad_bias);
    GENFAST_CALL(bias_act_second, a);
  });
}

void bind_pixel_norm(py::module_& m) {
  const auto common = [](Address x, Address out, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs, int64_t n,
                         int64_t c, int64_t s, bool channels_last, double eps) {
    PixelNormArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.y = ptr<>(out);
    a.n = n, a.c = c, a.s = s, a.eps = eps;
    a.channels_last = channels_last, a.threads = threads;
    return a;
  };
  m.def("pixel_norm", [common](Address x, Address y, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs, int64_t n,
                               int64_t c, int64_t s, bool channels_last, double eps) {
    const PixelNormArgs a = common(x, y, threads, is_double, xn, xc, xs, n, c, s, channels_last, eps);
    GENFAST_CALL(pixel_norm, a);
  });
  m.def("pixel_norm_backward", [common](Address x, Address dx, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs,
                                        int64_t n, int64_t c, int64_t s, bool channels_last, double eps, Address grad,
                                        int64_t gn, int64_t gc, int64_t gs) {
    PixelNormArgs a = common(x, dx, threads, is_double, xn, xc, xs, n, c, s, channels_last, eps);
    a.grad = view(grad, gn, gc, gs);
    GENFAST_CALL(pixel_norm_backward, a);
  });
}

void bind_minibatch_stddev(py::module_& m) {
  const auto common = [](Address x, Address out, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs, int64_t n,
                         int64_t c, int64_t s, bool channels_last, int64_t group, int64_t features, double eps) {
    MinibatchStddevArgs a{};
    a.is_double = is_double;
    a.x = view(x, xn, xc, xs);
    a.y = ptr<>(out);
    a.n = n, a.c = c, a.s = s, a.group = group, a.features = features, a.eps = eps;
    a.channels_last = channels_last, a.threads = threads;
    return a;
  };
  m.def("minibatch_stddev", [common](Address x, Address y, int threads, bool is_double, int64_t xn, int64_t xc, int64_t xs,
                                     int64_t n, int64_t c, int64_t s, bool channels_last, int64_t group, int64_t features,
                                     double eps) {
    const MinibatchStddevArgs a =
        common(x, y, threads, is_double, xn, xc, xs, n, c, s, channels_last, group, features, eps);
    GENFAST_CALL(minibatch_stddev, a);
  });
  m.def("minibatch_stddev_backward", [common](Address x, Address dx, int threads, bool is_double, int64_t xn, int64_t xc,
                                              int64_t xs, int64_t n, int64_t c, int64_t s, bool channels_last, int64_t group,
                                              int64_t features, double eps, Address grad, int64_t gn, int64_t gc, int64_t gs) {
    MinibatchStddevArgs a = common(x, dx, threads, is_double, xn, xc, xs, n, c, s, channels_last, group, features, eps);
    a.grad = view(grad, gn, gc, gs);
    GENFAST_CALL(minibatch_stddev_backward, a);
  });
}

void bind_autoregressive_inverse(py::module_& m) {
  m.def("autoregressive_inverse", [](bool is_double, Address code, Address packed, Address statics, Address z, Address x,
                                     Address logdet, Address units, int64_t stride, int transform,
                                     const std::vector<double>& options, int64_t n, int threads) {
    DegreeOrderedArgs a{};
    a.is_double = is_double, a.code = ptr<int64_t>(code), a.packed = ptr<>(packed), a.statics = ptr<>(statics);
    a.z = ptr<>(z), a.x = ptr<>(x), a.logdet = ptr<>(logdet), a.units = ptr<>(units), a.stride = stride;
    a.transform = transform, a.options = options.data(), a.option_count = int64_t(options.size()), a.n = n, a.threads = threads;
    GENFAST_CALL(autoregressive_inverse, a);
  });
  m.def("autoregressive_inverse_sweep", [](bool is_double, Address code, Address packed, Address statics, Address z,
                                           Address units, Address deltas, int64_t stride, Address grad_x, Address grad_logdet,
                                           Address grad_z, int transform, const std::vector<double>& options, int64_t n,
                                           int threads) {
    DegreeOrderedArgs a{};
    a.is_double = is_double, a.code = ptr<int64_t>(code), a.packed = ptr<>(packed), a.statics = ptr<>(statics);
    a.z = ptr<>(z), a.units = ptr<>(units), a.deltas = ptr<>(deltas), a.stride = stride;
    a.grad_x = ptr<>(grad_x), a.grad_logdet = ptr<>(grad_logdet), a.grad_z = ptr<>(grad_z);
    a.transform = transform, a.options = options.data(), a.option_count = int64_t(options.size()), a.n = n, a.threads = threads;
    GENFAST_CALL(autoregressive_inverse_sweep, a);
  });
  m.def("autoregressive_inverse_weights", [](bool is_double, Address code, Address units, Address deltas, int64_t stride,
                                             Address grad_packed, int64_t n, int threads) {
    DegreeOrderedArgs a{};
    a.is_double = is_double, a.code = ptr<int64_t>(code), a.units = ptr<>(units), a.deltas = ptr<>(deltas), a.stride = stride;
    a.grad_packed = ptr<>(grad_packed), a.n = n, a.threads = threads;
    GENFAST_CALL(autoregressive_inverse_weights, a);
  });
}

void bind_pixel_rnn(py::module_& m) {
  m.def("pixel_rnn", [](bool is_double, bool diagonal, Address gates, int64_t gn, int64_t gc, int64_t gs, Address weight,
                        Address h0, Address c0, Address h, Address kept, int64_t n, int64_t hidden, int64_t height,
                        int64_t width, int64_t taps, bool channels_last, int threads) {
    PixelRnnArgs a{};
    a.is_double = is_double, a.diagonal = diagonal;
    a.gates = view(gates, gn, gc, gs);
    a.weight = ptr<>(weight), a.h0 = ptr<>(h0), a.c0 = ptr<>(c0), a.out = ptr<>(h), a.kept = ptr<>(kept);
    a.n = n, a.hidden = hidden, a.height = height, a.width = width, a.taps = taps;
    a.channels_last = channels_last, a.threads = threads;
    GENFAST_CALL(pixel_rnn, a);
  });
  m.def("pixel_rnn_backward",
        [](bool is_double, bool diagonal, Address grad_h, int64_t gn, int64_t gc, int64_t gs, Address grad_kept, Address kept,
           Address weight, Address h0, Address c0, Address dgates, Address dweight, Address dh0, Address dc0, int64_t n,
           int64_t hidden, int64_t height, int64_t width, int64_t taps, bool channels_last, int threads) {
          PixelRnnArgs a{};
          a.is_double = is_double, a.diagonal = diagonal;
          a.grad_h = view(grad_h, gn, gc, gs);
          a.grad_kept = ptr<>(grad_kept), a.kept = ptr<>(kept), a.weight = ptr<>(weight);
          a.h0 = ptr<>(h0), a.c0 = ptr<>(c0), a.out = ptr<>(dgates);
          a.grad_weight = ptr<>(dweight), a.grad_h0 = ptr<>(dh0), a.grad_c0 = ptr<>(dc0);
          a.n = n, a.hidden = hidden, a.height = height, a.width = width, a.taps = taps;
          a.channels_last = channels_last, a.threads = threads;
          GENFAST_CALL(pixel_rnn_backward, a);
        });
}

void bind_nade(py::module_& m) {
  const auto common = [](bool is_double, int activation, Address x, Address weight, Address readout, Address hidden_bias,
                         bool own, Address rescale, int64_t n, int64_t d, int64_t p, int64_t h, int threads) {
    NadeArgs a{};
    a.is_double = is_double, a.own_hidden_bias = own, a.activation = activation, a.x = ptr<>(x);
    a.weight = ptr<>(weight), a.readout = ptr<>(readout), a.hidden_bias = ptr<>(hidden_bias), a.rescale = ptr<>(rescale);
    a.n = n, a.d = d, a.p = p, a.h = h, a.threads = threads;
    return a;
  };
  m.def("nade", [common](bool is_double, int activation, Address x, Address weight, Address readout, Address hidden_bias,
                         bool own, Address rescale, int64_t n, int64_t d, int64_t p, int64_t h, int threads, Address bias, int kind,
                         Address uniforms, Address known, Address out) {
    NadeArgs a = common(is_double, activation, x, weight, readout, hidden_bias, own, rescale, n, d, p, h, threads);
    a.bias = ptr<>(bias), a.kind = kind, a.uniforms = ptr<>(uniforms), a.known = ptr<const uint8_t>(known), a.out = ptr<>(out);
    GENFAST_CALL(nade, a);
  });
  m.def("nade_backward", [common](bool is_double, int activation, Address x, Address weight, Address readout,
                                  Address hidden_bias, bool own, Address rescale, int64_t n, int64_t d, int64_t p, int64_t h,
                                  int threads, Address grad, Address dx, Address dweight, Address dreadout, Address dbias,
                                  Address dhidden_bias, Address drescale) {
    NadeArgs a = common(is_double, activation, x, weight, readout, hidden_bias, own, rescale, n, d, p, h, threads);
    a.grad = ptr<>(grad), a.grad_x = ptr<>(dx), a.grad_weight = ptr<>(dweight), a.grad_readout = ptr<>(dreadout);
    a.grad_bias = ptr<>(dbias), a.grad_hidden_bias = ptr<>(dhidden_bias), a.grad_rescale = ptr<>(drescale);
    GENFAST_CALL(nade, a);
  });
}

void bind_linear(py::module_& m) {
  m.def("linear", [](bool is_double, Address a, int64_t a_row, int64_t a_inner, Address b, int64_t b_inner, int64_t b_column,
                     Address bias, Address out, Address bits, int bits_mode, double slope, int64_t rows, int64_t columns,
                     int64_t inner, int threads) {
    LinearArgs args{};
    args.is_double = is_double;
    args.a = ptr<>(a), args.a_row = a_row, args.a_inner = a_inner;
    args.b = ptr<>(b), args.b_inner = b_inner, args.b_column = b_column;
    args.bias = ptr<>(bias), args.out = ptr<>(out), args.bits = ptr<uint8_t>(bits);
    args.bits_mode = bits_mode, args.slope = slope;
    args.rows = rows, args.columns = columns, args.inner = inner, args.threads = threads;
    GENFAST_CALL(linear, args);
  });
}

void bind_masked_linear(py::module_& m) {
  m.def("masked_linear", [](bool is_double, bool relu, Address rows, Address columns, Address counts, Address x, int64_t x_row,
                            Address weight, int64_t weight_row, Address bias, Address out, int64_t n, int64_t outputs,
                            int64_t inputs, int threads) {
    bool fits = true;
    MaskedLinearArgs a{};
    a.is_double = is_double, a.relu = relu, a.fits = &fits;
    a.rows = ptr<int64_t>(rows), a.columns = ptr<int64_t>(columns), a.counts = ptr<int64_t>(counts);
    a.x = ptr<>(x), a.x_row = x_row, a.weight = ptr<>(weight), a.weight_row = weight_row;
    a.bias = ptr<>(bias), a.out = ptr<>(out);
    a.n = n, a.outputs = outputs, a.inputs = inputs, a.threads = threads;
    GENFAST_CALL(masked_linear, a);
    return fits;
  });
  m.def("masked_linear_backward", [](bool is_double, Address rows, Address columns, Address counts, Address grad, int64_t grad_row,
                                     Address x, int64_t x_row, Address weight, int64_t weight_row, Address y, int64_t y_row,
                                     Address dx, Address dw, Address db, int64_t n, int64_t outputs, int64_t inputs, int threads) {
    bool fits = true;
    MaskedLinearArgs a{};
    a.is_double = is_double, a.fits = &fits;
    a.rows = ptr<int64_t>(rows), a.columns = ptr<int64_t>(columns), a.counts = ptr<int64_t>(counts);
    a.grad = ptr<>(grad), a.grad_row = grad_row, a.x = ptr<>(x), a.x_row = x_row;
    a.weight = ptr<>(weight), a.weight_row = weight_row, a.y = ptr<>(y), a.y_row = y_row;
    a.dx = ptr<>(dx), a.dw = ptr<>(dw), a.db = ptr<>(db);
    a.n = n, a.outputs = outputs, a.inputs = inputs, a.threads = threads;
    GENFAST_CALL(masked_linear_backward, a);
    return fits;
  });
}

void bind_activation(py::module_& m) {
  m.def("leaky_relu_bits", [](bool is_double, bool apply, Address x, Address y, Address bits, double slope, int64_t rows,
                              int64_t columns, int threads) {
    LeakyReluArgs a{};
    a.is_double = is_double, a.apply = apply;
    a.x = ptr<>(x), a.y = ptr<>(y), a.bits = ptr<uint8_t>(bits);
    a.slope = slope, a.rows = rows, a.columns = columns, a.threads = threads;
    GENFAST_CALL(leaky_relu_bits, a);
  });
  m.def("activation", [](bool is_double, bool second, Address x, Address grad, Address tangent, Address cotangent, Address y,
                         int64_t size, int kind, int threads) {
    ActivationArgs a{};
    a.is_double = is_double, a.second = second;
    a.x = ptr<>(x), a.grad = ptr<>(grad), a.tangent = ptr<>(tangent), a.cotangent = ptr<>(cotangent), a.y = ptr<>(y);
    a.size = size, a.kind = kind, a.threads = threads;
    GENFAST_CALL(activation, a);
  });
}

void bind_upfirdn2d(py::module_& m) {
  m.def("upfirdn2d", [](Address x, Address filter, Address y, double gain, int threads, bool is_double, bool separable,
                        bool flip, bool channels_last, int64_t n, int64_t c, int64_t h, int64_t w, int64_t oh, int64_t ow,
                        int64_t fh, int64_t fw, int64_t upx, int64_t upy, int64_t downx, int64_t downy, int64_t padx0,
                        int64_t pady0, int64_t xn, int64_t xc, int64_t xh) {
    Upfirdn2dArgs a{is_double, separable, flip, channels_last, ptr<>(x), ptr<>(filter), ptr<>(y), gain, n, c, h, w, oh, ow,
                    fh, fw, upx, upy, downx, downy, padx0, pady0, xn, xc, xh, threads};
    GENFAST_CALL(upfirdn2d, a);
  });
}

void bind_modulated_conv(py::module_& m) {
  m.def("channel_scale_backward", [](bool is_double, Address grad, int64_t gn, int64_t gc, int64_t gs, Address x, int64_t xn,
                                     int64_t xc, int64_t xs, Address scale, Address dx, Address grad_scale,
                                     Address grad_noise, int64_t n, int64_t c, int64_t s, bool channels_last, int threads) {
    ChannelScaleArgs a{};
    a.is_double = is_double, a.channels_last = channels_last, a.threads = threads;
    a.grad = view(grad, gn, gc, gs);
    a.x = view(x, xn, xc, xs);
    a.scale = ptr<>(scale), a.dx = ptr<>(dx), a.grad_scale = ptr<>(grad_scale), a.grad_noise = ptr<>(grad_noise);
    a.n = n, a.c = c, a.s = s;
    GENFAST_CALL(channel_scale_backward, a);
  });
  m.def("tap_energy", [](bool is_double, Address weight, Address out, int64_t rows, int64_t taps, int threads) {
    TapEnergyArgs a{is_double, ptr<>(weight), ptr<>(out), rows, taps, threads};
    GENFAST_CALL(tap_energy, a);
  });
}

void bind_interpolate(py::module_& m) {
  m.def("interpolate_backward", [](bool is_double, Address grad, Address real, Address fake, Address epsilon,
                                   Address grad_real, Address grad_fake, Address grad_epsilon, int threads, int64_t n,
                                   int64_t d, int64_t grad_stride, int64_t real_stride, int64_t fake_stride) {
    InterpolateArgs a{};
    a.is_double = is_double, a.grad = ptr<>(grad), a.real = ptr<>(real), a.fake = ptr<>(fake), a.epsilon = ptr<>(epsilon);
    a.grad_real = ptr<>(grad_real), a.grad_fake = ptr<>(grad_fake), a.grad_epsilon = ptr<>(grad_epsilon);
    a.n = n, a.d = d, a.grad_stride = grad_stride, a.real_stride = real_stride, a.fake_stride = fake_stride;
    a.threads = threads;
    GENFAST_CALL(interpolate_backward, a);
  });
}

void bind_sample_norm(py::module_& m) {
  m.def("sample_norm", [](bool is_double, bool squared, Address x, Address out, int threads, int64_t n, int64_t d,
                          int64_t x_stride) {
    SampleNormArgs a{is_double, squared, ptr<>(x), nullptr, nullptr, ptr<>(out), n, d, x_stride, threads};
    GENFAST_CALL(sample_norm, a);
  });
  m.def("sample_norm_backward", [](bool is_double, bool squared, Address grad, Address x, Address norm, Address dx, int threads,
                                   int64_t n, int64_t d, int64_t x_stride) {
    SampleNormArgs a{is_double, squared, ptr<>(x), ptr<>(grad), ptr<>(norm), ptr<>(dx), n, d, x_stride, threads};
    GENFAST_CALL(sample_norm_backward, a);
  });
}

void bind_spectral_norm(py::module_& m) {
  m.def("spectral_norm", [](bool is_double, Address weight, Address u, Address v, Address sigma, Address out, bool from_v,
                            int64_t iterations, double eps, int64_t a_size, int64_t h, int64_t b, int threads) {
    SpectralNormArgs a{};
    a.is_double = is_double, a.from_v = from_v, a.weight = ptr<>(weight), a.u = ptr<>(u), a.v = ptr<>(v);
    a.sigma = ptr<>(sigma), a.out = ptr<>(out), a.iterations = iterations, a.eps = eps;
    a.a = a_size, a.h = h, a.b = b, a.threads = threads;
    GENFAST_CALL(spectral_norm, a);
  });
  m.def("spectral_norm_backward", [](bool is_double, Address grad, Address grad_sigma, Address weight, Address u, Address v,
                                     Address sigma, Address dweight, int64_t a_size, int64_t h, int64_t b, int threads) {
    SpectralNormArgs a{};
    a.is_double = is_double, a.weight = ptr<>(weight), a.grad = ptr<>(grad), a.grad_sigma = ptr<>(grad_sigma);
    a.u = ptr<>(u), a.v = ptr<>(v), a.sigma = ptr<>(sigma), a.out = ptr<>(dweight);
    a.a = a_size, a.h = h, a.b = b, a.threads = threads;
    GENFAST_CALL(spectral_norm_backward, a);
  });
}

void bind_minibatch_discrimination(py::module_& m) {
  m.def("pairwise_l1", [](bool is_double, bool include_self, Address x, Address grad, Address tangent, Address out,
                          Address grad_m, int64_t n, int64_t b, int64_t c, int threads) {
    PairwiseL1Args a{is_double, include_self, ptr<>(x), ptr<>(grad), ptr<>(tangent), ptr<>(out), ptr<>(grad_m), n, b, c, threads};
    GENFAST_CALL(pairwise_l1, a);
  });
}

void bind_diagonal_gaussian(py::module_& m) {
  using Rows = std::pair<Address, int64_t>;
  const auto common = [](bool is_double, Rows mean, Rows log_variance, Rows noise, Rows prior_mean, Rows prior_log_variance,
                         int64_t n, int64_t d, int threads) {
    const auto rows = [](Rows r) { return DiagonalGaussianArgs::Rows{ptr<>(r.first), r.second}; };
    DiagonalGaussianArgs a{};
    a.is_double = is_double, a.n = n, a.d = d, a.threads = threads;
    a.mean = rows(mean), a.log_variance = rows(log_variance), a.noise = rows(noise);
    a.prior_mean = rows(prior_mean), a.prior_log_variance = rows(prior_log_variance);
    return a;
  };
  m.def("diagonal_gaussian", [common](bool is_double, Rows mean, Rows log_variance, Rows noise, Rows prior_mean,
                                      Rows prior_log_variance, int64_t n, int64_t d, int threads, Address kl,
                                      Address dimension, Address z) {
    DiagonalGaussianArgs a = common(is_double, mean, log_variance, noise, prior_mean, prior_log_variance, n, d, threads);
    a.kl = ptr<>(kl), a.dimension = ptr<>(dimension), a.z = ptr<>(z);
    GENFAST_CALL(diagonal_gaussian, a);
  });
  m.def("diagonal_gaussian_backward",
        [common](bool is_double, Rows mean, Rows log_variance, Rows noise, Rows prior_mean, Rows prior_log_variance, int64_t n,
                 int64_t d, int threads, Address grad_kl, Address grad_dimension, Rows grad_z, Address grad_mean,
                 Address grad_log_variance, Address grad_noise, Address grad_prior_mean, Address grad_prior_log_variance) {
          DiagonalGaussianArgs a = common(is_double, mean, log_variance, noise, prior_mean, prior_log_variance, n, d, threads);
          a.grad_kl = ptr<>(grad_kl), a.grad_dimension = ptr<>(grad_dimension);
          a.grad_z = {ptr<>(grad_z.first), grad_z.second};
          a.grad_mean = ptr<>(grad_mean), a.grad_log_variance = ptr<>(grad_log_variance), a.grad_noise = ptr<>(grad_noise);
          a.grad_prior_mean = ptr<>(grad_prior_mean), a.grad_prior_log_variance = ptr<>(grad_prior_log_variance);
          GENFAST_CALL(diagonal_gaussian_backward, a);
        });
}

void bind_contextual_similarity(py::module_& m) {
  // Without memory to work in, how many bytes of it to bring.
  m.def("contextual_similarity", [](bool backward, bool is_double, bool over_targets, int distance, Address x, Address y,
                                    Address prior_rows, Address prior_columns, Address value, Address winner,
                                    Address statistics, Address nearest, Address mean, Address grad, Address dx, Address dy,
                                    Address work, double prior_weight, double bandwidth, double eps, int64_t b, int64_t n,
                                    int64_t rows_y, int64_t c, int64_t height, int64_t width, int threads) -> int64_t {
    ContextualArgs a{};
    int64_t bytes = 0;
    a.is_double = is_double, a.over_targets = over_targets, a.distance = distance;
    a.x = ptr<>(x), a.y = ptr<>(y), a.prior_rows = ptr<>(prior_rows), a.prior_columns = ptr<>(prior_columns);
    a.value = ptr<>(value), a.statistics = ptr<>(statistics), a.mean = ptr<>(mean);
    a.winner = ptr<int64_t>(winner), a.nearest = ptr<int64_t>(nearest);
    a.grad = ptr<>(grad), a.dx = ptr<>(dx), a.dy = ptr<>(dy);
    a.work = ptr<>(work), a.bytes = work ? nullptr : &bytes;
    a.prior_weight = prior_weight, a.bandwidth = bandwidth, a.eps = eps;
    a.b = b, a.n = n, a.m = rows_y, a.c = c, a.prior_height = height, a.prior_width = width, a.threads = threads;
    if (backward)
      GENFAST_CALL(contextual_similarity_backward, a);
    else
      GENFAST_CALL(contextual_similarity, a);
    return bytes;
  });
}

void bind_gram_matrix(py::module_& m) {
  m.def("gram_matrix", [](bool is_double, Address x, int64_t xn, int64_t xc, int64_t xs, Address target, int64_t target_stride,
                          Address out, Address value, double scale, double shift, double factor, int64_t n, int64_t c, int64_t s,
                          bool channels_last, int threads) {
    GramArgs a{};
    a.is_double = is_double, a.channels_last = channels_last, a.threads = threads;
    a.x = view(x, xn, xc, xs);
    a.target = ptr<>(target), a.target_stride = target_stride, a.out = ptr<>(out), a.value = ptr<>(value);
    a.scale = scale, a.shift = shift, a.factor = factor;
    a.n = n, a.c = c, a.s = s;
    GENFAST_CALL(gram_matrix, a);
  });
  m.def("gram_matrix_backward", [](bool is_double, bool symmetrize, Address x, int64_t xn, int64_t xc, int64_t xs, Address matrix,
                                   Address grad, Address out, double scale, double shift, int64_t n, int64_t c, int64_t s,
                                   bool channels_last, int threads) {
    GramBackwardArgs a{};
    a.is_double = is_double, a.channels_last = channels_last, a.symmetrize = symmetrize, a.threads = threads;
    a.x = view(x, xn, xc, xs);
    a.matrix = ptr<>(matrix), a.grad = ptr<>(grad), a.out = ptr<>(out);
    a.scale = scale, a.shift = shift;
    a.n = n, a.c = c, a.s = s;
    GENFAST_CALL(gram_matrix_backward, a);
  });
}

void bind_pairwise(py::module_& m) {
  m.def("pairwise", [](bool is_double, bool exclude_diagonal, int mode, int kernel, const std::vector<double>& scales,
                       int64_t degree, double offset, Address x, Address y, Address x_grad, Address y_grad, Address out,
                       Address index, int64_t k, int64_t b, int64_t n, int64_t rows, int64_t c, int threads) {
    PairwiseArgs a{};
    a.is_double = is_double, a.exclude_diagonal = exclude_diagonal, a.mode = mode, a.kernel = kernel;
    a.x = ptr<>(x), a.y = ptr<>(y), a.x_grad = ptr<>(x_grad), a.y_grad = ptr<>(y_grad), a.out = ptr<>(out);
    a.index = ptr<int64_t>(index), a.scales = scales.data(), a.count = int64_t(scales.size());
    a.degree = degree, a.offset = offset, a.k = k, a.b = b, a.n = n, a.m = rows, a.c = c, a.threads = threads;
    GENFAST_CALL(pairwise, a);
  });
}

void bind_spline(py::module_& m) {
  // A part is (data, grad, count, stride).
  m.def("spline", [](bool is_double, bool backward, bool inverse, bool zuko, int bins, int tails,
                     const std::vector<double>& o, Address x, Address grad_y, int64_t grad_y_step, Address grad_logdet,
                     int64_t grad_logdet_step, Address y, Address logdet, Address dx,
                     const std::vector<std::tuple<Address, Address, int64_t, int64_t>>& parts, int64_t n, int threads) {
    bool outside = false;
    SplineArgs a{};
    a.is_double = is_double, a.backward = backward, a.inverse = inverse, a.zuko = zuko;
    a.bins = bins, a.tails = tails;
    a.left = o[0], a.right = o[1], a.bottom = o[2], a.top = o[3];
    a.min_width = o[4], a.min_height = o[5], a.min_derivative = o[6];
    a.log_slope = std::log(o[7]), a.logit_scale = o[8];
    a.x = ptr<>(x), a.grad_y = ptr<>(grad_y), a.grad_logdet = ptr<>(grad_logdet);
    a.grad_y_step = grad_y_step, a.grad_logdet_step = grad_logdet_step;
    a.y = ptr<>(y), a.logdet = ptr<>(logdet), a.dx = ptr<>(dx);
    for (const auto& [data, grad, count, stride] : parts)
      a.parts[a.part_count++] = {ptr<>(data), ptr<>(grad), count, stride};
    a.n = n, a.outside = &outside, a.threads = threads;
    GENFAST_CALL(spline, a);
    return outside;
  });
}

void bind_fma_rate(py::module_& m) {
  m.def("fma_rate", [](bool is_double, Address out, int64_t rounds, int threads) {
    double flops = 0;
    FmaRateArgs a{is_double, ptr<>(out), &flops, rounds, threads};
    GENFAST_CALL(fma_rate, a);
    return flops;
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "genfast's C++ kernels";
  m.def("isa", &isa_name, "The instruction set in use; GENFAST_CPU_ISA=v4|v3|base asks for a lower one.");
  bind_guard(m);
  bind_affine_coupling(m);
  bind_actnorm(m);
  bind_invertible_conv1x1(m);
  bind_squeeze(m);
  bind_masked_conv(m);
  bind_pixel_program(m);
  bind_gated_activation(m);
  bind_discretized_logistic_mixture(m);
  bind_pixel_rnn(m);
  bind_nade(m);
  bind_linear(m);
  bind_masked_linear(m);
  bind_activation(m);
  bind_bias_act(m);
  bind_pixel_norm(m);
  bind_minibatch_stddev(m);
  bind_upfirdn2d(m);
  bind_modulated_conv(m);
  bind_interpolate(m);
  bind_sample_norm(m);
  bind_spectral_norm(m);
  bind_minibatch_discrimination(m);
  bind_diagonal_gaussian(m);
  bind_contextual_similarity(m);
  bind_gram_matrix(m);
  bind_pairwise(m);
  bind_autoregressive_inverse(m);
  bind_spline(m);
  bind_fma_rate(m);
}
