// The pybind11 module genfast._cpu: every kernel of cpu/kernels.h as a Kernel (kernel_type.h) that runs the instruction set
// chosen once at import. genfast/ops checks every argument before it calls here.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"
#include "kernel_type.h"

namespace py = pybind11;

namespace genfast {
void bind_guard(py::module_& m);     // guard.cpp
void bind_contents(py::module_& m);  // contents.cpp
}

using namespace genfast;

namespace {

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

template <class Args, void (*kernel)(const Args&)>
void run(const void* args) {
  kernel(*static_cast<const Args*>(args));
}

#ifdef GENFAST_X86_LEVELS
#define GENFAST_RUN(kernel, Args) \
  (isa == Isa::kV4 ? run<Args, v4::kernel> : isa == Isa::kV3 ? run<Args, v3::kernel> : run<Args, base::kernel>)
#else
#define GENFAST_RUN(kernel, Args) run<Args, base::kernel>
#endif
#define GENFAST_ADD(kernel, Args) \
  if (!add_kernel<Args>(m.ptr(), #kernel, GENFAST_RUN(kernel, Args))) throw py::error_already_set();

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "genfast's C++ kernels";
  m.def("isa", &isa_name, "The instruction set in use; GENFAST_CPU_ISA=v4|v3|base asks for a lower one.");
  m.def("lanes", [] { return isa == Isa::kV4 ? 16 : isa == Isa::kV3 ? 8 : 4; }, "float32 values in a vector");
  bind_guard(m);
  bind_contents(m);
  GENFAST_KERNELS(GENFAST_ADD)
}
