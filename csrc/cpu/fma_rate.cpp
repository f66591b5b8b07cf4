// What a core's vector units multiply and add at their fastest: independent chains in registers, which no memory holds up and
// which are enough to hide each other's latency. The ceiling that benchmarks quote beside the library's product.
#include "kernels.h"
#include "vec.h"

namespace genfast {
namespace GENFAST_ISA {
namespace {

constexpr int kChains = 12;

template <class T>
void chains(int64_t rounds, T* out) {
  Vec<T> sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat(T(i));
  const Vec<T> factor = splat(T(0.5)), term = splat(T(1));
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + term;
  }
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  store(out, sums[0]);
}

}  // namespace

void fma_rate(const FmaRateArgs& a) {
  *a.flops = double(a.threads) * double(a.rounds) * 2 * kChains * (a.is_double ? lanes<double>() : lanes<float>());
#pragma omp parallel for schedule(static, 1) num_threads(a.threads)
  for (int i = 0; i < a.threads; ++i) {
    void* out = static_cast<char*>(a.out) + i * 64;
    a.is_double ? chains(a.rounds, static_cast<double*>(out)) : chains(a.rounds, static_cast<float*>(out));
  }
}

}  // namespace GENFAST_ISA
}  // namespace genfast
