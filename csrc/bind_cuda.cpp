// The pybind11 module genfast._cuda: every kernel of cuda/kernels.h as a Kernel (kernel_type.h). It imports without a GPU or a
// driver.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "kernel_type.h"

namespace py = pybind11;
using namespace genfast;
using namespace genfast::cuda;

namespace {

void check(const char* op, int error) {
  if (error) throw std::runtime_error(std::string("genfast::") + op + ": CUDA said: " + failure(error));
}

}  // namespace

#define GENFAST_ADD(kernel, Args, op)                                                       \
  if (!add_kernel<Args>(m.ptr(), #kernel, [](const void* args) {                            \
        const Args& a = *static_cast<const Args*>(args);                                    \
        check(op, kernel(a));                                                               \
      }))                                                                                   \
    throw py::error_already_set();

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "genfast's CUDA kernels";
  m.attr("archs") = GENFAST_CUDA_ARCHS;
  m.def("degree_ordered_scratch", [](int64_t n, int64_t rows) {
    int64_t floats = 0;
    check("autoregressive_inverse", degree_ordered_scratch(n, rows, &floats));
    return floats;
  });
  GENFAST_KERNELS(GENFAST_ADD)
}
