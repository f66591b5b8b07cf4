// The body of the degree-ordered engine (csrc/cuda/autoregressive_inverse.cuh) on a CPU.
#include "cuda/autoregressive_inverse.cuh"

#include "block.h"

namespace {

using namespace genfast::cuda;

template <int M, int S, bool kBackward>
bool run(const DegreeOrderedArgs& a, int warps, bool backwards) {
  const int64_t floats = state_floats(a.rows, M * S);
  for (int64_t first = 0; first < a.n; first += M * S) {
    const size_t bytes = (size_t(floats) * sizeof(float) + 15) / 16 * 16;
    const std::unique_ptr<float, void (*)(void*)> state(static_cast<float*>(aligned_alloc(16, bytes)), free);
    for (int64_t i = 0; i < floats; ++i) state.get()[i] = NAN;
    const auto body = [&](int rank) {
      DegreeOrdered<M, S, kBackward, host::Team>({rank, warps * kLanes}, a, state.get(), first).run();
    };
    if (!host::run(warps, kLanes, backwards, body)) return false;
  }
  return true;
}

template <bool kBackward>
bool run(const DegreeOrderedArgs& a, int64_t group, int warps, bool backwards) {
  switch (group) {
    case 1: return run<1, 1, kBackward>(a, warps, backwards);
    case 2: return run<2, 1, kBackward>(a, warps, backwards);
    case 4: return run<4, 1, kBackward>(a, warps, backwards);
    case 8: return run<4, 2, kBackward>(a, warps, backwards);
    case 16: return run<4, 4, kBackward>(a, warps, backwards);
    default: return run<4, 8, kBackward>(a, warps, backwards);
  }
}

}  // namespace

extern "C" bool degree_ordered(const DegreeOrderedArgs* a, bool backward, int64_t group, int warps, bool backwards) {
  return backward ? run<true>(*a, group, warps, backwards) : run<false>(*a, group, warps, backwards);
}

extern "C" int64_t group_of(int64_t n, int64_t rows, int64_t processors, int64_t bytes) {
  return level_group(n, rows, processors, bytes);
}
