// Sampling a discretised mixture of logistics (PixelCNN++ 1701.05517 sec. 2.1) at one position, for whoever samples.
//
// params holds P = 10 K (3 channels) or 3 K (1 channel) values, `stride` apart: [K logits | for each channel K means,
// K log-scales, K coefficients (3 channels only)]. uniforms holds 1 + channels values in (0, 1), `ustride` apart.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define GENFAST_ANYWHERE __host__ __device__
#else
#define GENFAST_ANYWHERE
#endif

namespace genfast {
namespace GENFAST_ISA {

// Levels of all channels, `ostride` apart. In double throughout: a pixel that rounding puts on another level would change
// every pixel that is drawn after it. False, and a level of -1, where the logits or the chosen component are not finite; a
// logit of -infinity only forbids its component.
template <class T>
GENFAST_ANYWHERE inline bool sample_mixture(const T* params, int64_t stride, int64_t mixtures, int64_t channels,
                                            int64_t levels, T temperature, const float* uniforms, int64_t ustride, int64_t* out,
                                            int64_t ostride) {
  const double heat = double(temperature);
  double top = double(params[0]);
  for (int64_t k = 1; k < mixtures; ++k) top = ::fmax(top, double(params[k * stride]));
  constexpr int64_t kKept = 64;  // weights of so many components are kept from the sum for the search
  double kept[kKept], total = 0;
  const auto weight = [&](int64_t k) { return ::exp((double(params[k * stride]) - top) / heat); };
  for (int64_t k = 0; k < mixtures; ++k) {
    const double w = weight(k);
    if (k < kKept) kept[k] = w;
    total += w;
  }
  const double wanted = double(uniforms[0]) * total;
  int64_t chosen = 0;
  for (double sum = 0; chosen < mixtures - 1; ++chosen) {
    sum += chosen < kKept ? kept[chosen] : weight(chosen);
    if (sum > wanted) break;
  }
  const int64_t each = channels == 3 ? 3 : 2;
  const double half = double(levels - 1) / 2;
  double before[3] = {0, 0, 0};
  bool finite = total == total;
  for (int64_t c = 0; c < channels; ++c) {
    const T* block = params + (mixtures + c * each * mixtures + chosen) * stride;
    double mean = double(block[0]);
    const double log_scale = double(block[mixtures * stride]);
    if (c > 0) {  // the coefficients of red to green, red to blue and green to blue stand in the blocks of the three channels
      const T* coeffs = params + (mixtures + 2 * mixtures + chosen) * stride;
      const int64_t step = each * mixtures * stride;
      mean += ::tanh(double(coeffs[c == 1 ? 0 : step])) * before[0];
      if (c == 2) mean += ::tanh(double(coeffs[2 * step])) * before[1];
    }
    double u = double(uniforms[(1 + c) * ustride]);
    u = u < 1e-5 ? 1e-5 : u > 1 - 1e-5 ? 1 - 1e-5 : u;
    double value = mean + ::exp(log_scale < -7 ? -7 : log_scale) * heat * ::log(u / (1 - u));
    finite = finite && value - value == 0;
    value = value < -1 ? -1 : value > 1 ? 1 : value;
    const double level = finite ? ::nearbyint((value + 1) * half) : -1;
    before[c] = level / half - 1;
    out[c * ostride] = int64_t(level);
  }
  return finite;
}

}  // namespace GENFAST_ISA
}  // namespace genfast
