// The body of the pixel program kernel (csrc/cuda/pixel_program.cuh) on a CPU.
#include "cuda/pixel_program.cuh"

#include "block.h"

extern "C" bool pixel_program(const genfast::cuda::PixelProgramArgs* a, int64_t group, int warps, int lanes, bool backwards) {
  for (int64_t first = 0; first < a->n; first += group) {
    const int64_t last = first + group < a->n ? first + group : a->n;
    const auto body = [=](int rank) {
      const host::Team team{rank, warps * lanes};
      genfast::cuda::Engine<host::Team>(team, *a, a->program, first, last).rows();
    };
    if (!host::run(warps, lanes, backwards, body)) return false;
  }
  return true;
}
