// The pybind11 module genfast._cuda: raw device pointers and a stream in. It imports without a GPU or a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace genfast::cuda;

namespace {

using Address = std::uintptr_t;

template <class T = float>
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* op, int error) {
  if (error) throw std::runtime_error(std::string("genfast::") + op + ": CUDA said: " + failure(error));
}

PluArgs factors(Address perm, Address lower, Address upper, Address sign_s, Address log_s, Address scale, Address bias,
                int64_t c, bool log_scale, int64_t batch, int64_t positions) {
  PluArgs a{};
  a.log_scale = log_scale;
  a.perm = ptr<const int64_t>(perm);
  a.lower = ptr(lower), a.upper = ptr(upper), a.sign_s = ptr(sign_s), a.log_s = ptr(log_s);
  a.scale = ptr(scale), a.bias = ptr(bias);
  a.c = c, a.batch = batch, a.positions = positions;
  return a;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "genfast's CUDA kernels";
  m.attr("archs") = GENFAST_CUDA_ARCHS;
  m.def("plu_weight", [](Address stream, Address perm, Address lower, Address upper, Address sign_s, Address log_s,
                         Address scale, Address bias, Address weight, Address folded, Address logdet, int64_t c, bool log_scale,
                         int64_t batch, int64_t positions) {
    PluArgs a = factors(perm, lower, upper, sign_s, log_s, scale, bias, c, log_scale, batch, positions);
    a.weight = ptr(weight), a.folded = ptr(folded), a.logdet = ptr(logdet);
    py::gil_scoped_release release;
    check("plu_weight", plu_weight(a, stream));
  });
  m.def("plu_weight_backward",
        [](Address stream, Address workspace, Address inverse_perm, Address grad_weight, Address grad_folded,
           Address grad_logdet, Address perm, Address lower, Address upper, Address sign_s, Address log_s, Address scale,
           Address bias, Address grad_lower, Address grad_upper, Address grad_log_s, Address grad_scale, Address grad_bias,
           int64_t c, bool log_scale, int64_t batch, int64_t positions) {
          PluArgs a = factors(perm, lower, upper, sign_s, log_s, scale, bias, c, log_scale, batch, positions);
          a.workspace = ptr(workspace), a.inverse_perm = ptr<int64_t>(inverse_perm);
          a.grad_weight = ptr(grad_weight), a.grad_folded = ptr(grad_folded), a.grad_logdet = ptr(grad_logdet);
          a.grad_lower = ptr(grad_lower), a.grad_upper = ptr(grad_upper), a.grad_log_s = ptr(grad_log_s);
          a.grad_scale = ptr(grad_scale), a.grad_bias = ptr(grad_bias);
          py::gil_scoped_release release;
          check("plu_weight_backward", plu_weight_backward(a, stream));
        });
  m.def("pixel_program", [](Address stream, Address program, Address weights, Address statics, Address cache, Address images,
                            Address uniforms, Address record, Address scratch, Address faults, int64_t code,
                            int64_t weight_floats, int64_t image_floats, int64_t record_size, int64_t n, int32_t first_row, int32_t last_row,
                            int32_t given, float temperature) {
    PixelProgramArgs a{};
    a.program = ptr<const int32_t>(program), a.weights = ptr<const float>(weights), a.statics = ptr<const int64_t>(statics);
    a.cache = ptr(cache), a.images = ptr<int64_t>(images), a.uniforms = ptr<const float>(uniforms), a.record = ptr(record);
    a.scratch = ptr<double>(scratch), a.faults = ptr<int64_t>(faults), a.code = code, a.weight_floats = weight_floats;
    a.image_floats = image_floats, a.record_size = record_size, a.n = n;
    a.first_row = first_row, a.last_row = last_row, a.given = given, a.temperature = temperature;
    py::gil_scoped_release release;
    check("pixel_program", pixel_program(a, stream));
  });
  m.def("degree_ordered_scratch", [](int64_t n, int64_t rows) {
    int64_t floats = 0;
    check("autoregressive_inverse", degree_ordered_scratch(n, rows, &floats));
    return floats;
  });
  m.def("degree_ordered", [](Address stream, Address item_list, Address tables, Address order, Address weights,
                             Address statics, Address z, Address x, Address logdet, Address scratch, int64_t n, int64_t rows,
                             int64_t statics_width, int32_t items, int32_t inputs, int32_t width, int32_t given,
                             int32_t transform, int32_t bins, int32_t tails, bool inverse, bool zuko,
                             const std::vector<float>& options) {
    DegreeOrderedArgs a{};
    a.item_list = ptr<const int32_t>(item_list), a.tables = ptr<const int32_t>(tables), a.order = ptr<const int32_t>(order);
    a.weights = ptr(weights), a.statics = ptr(statics), a.z = ptr(z), a.x = ptr(x), a.logdet = ptr(logdet);
    a.scratch = ptr(scratch), a.n = n, a.rows = rows, a.statics_width = statics_width, a.items = items, a.inputs = inputs;
    a.width = width, a.given = given, a.transform = transform, a.bins = bins, a.tails = tails;
    a.inverse = inverse, a.zuko = zuko;
    for (size_t i = 0; i < options.size() && i < std::size(a.options); ++i) a.options[i] = options[i];
    py::gil_scoped_release release;
    check("autoregressive_inverse", degree_ordered(a, stream));
  });
  m.def("degree_ordered_backward", [](Address stream, Address item_list, Address tables, Address order, Address weights,
                                      Address grad_x, Address slopes, Address by_value, Address constant, Address kept,
                                      Address scratch, int64_t n, int64_t units, int32_t items, int32_t inputs,
                                      int32_t width) {
    DegreeOrderedArgs a{};
    a.item_list = ptr<const int32_t>(item_list), a.tables = ptr<const int32_t>(tables), a.order = ptr<const int32_t>(order);
    a.weights = ptr(weights), a.z = ptr(grad_x), a.slopes = ptr(slopes), a.by_value = ptr(by_value);
    a.constant = ptr(constant), a.kept = ptr(kept), a.scratch = ptr(scratch);
    a.n = n, a.rows = a.units = units, a.items = items, a.inputs = inputs, a.width = width;
    py::gil_scoped_release release;
    check("autoregressive_inverse_backward", degree_ordered_backward(a, stream));
  });
  m.def("pixel_rnn", [](Address stream, bool diagonal, Address gates, Address weight, Address h0, Address c0, Address h,
                        Address kept, Address carry, int64_t n, int64_t hidden, int64_t depth, int64_t height, int64_t width,
                        int64_t taps) {
    PixelRnnArgs a{};
    a.diagonal = diagonal, a.gates = ptr(gates), a.weight = ptr(weight), a.h0 = ptr(h0), a.c0 = ptr(c0);
    a.h = ptr(h), a.kept = ptr(kept), a.carry = ptr(carry);
    a.n = n, a.hidden = hidden, a.depth = depth, a.height = height, a.width = width, a.taps = taps;
    py::gil_scoped_release release;
    check(diagonal ? "diagonal_lstm" : "row_lstm", pixel_rnn(a, stream));
  });
  m.def("pixel_rnn_backward", [](Address stream, bool diagonal, Address grad_h, Address grad_kept, Address kept,
                                 Address weight, Address c0, Address dgates, Address carry, int64_t n, int64_t hidden,
                                 int64_t height, int64_t width, int64_t taps) {
    PixelRnnArgs a{};
    a.diagonal = diagonal, a.grad_h = ptr(grad_h), a.grad_kept = ptr(grad_kept), a.kept = ptr(kept);
    a.weight = ptr(weight), a.c0 = ptr(c0), a.dgates = ptr(dgates), a.carry = ptr(carry);
    a.n = n, a.hidden = hidden, a.depth = hidden, a.height = height, a.width = width, a.taps = taps;
    py::gil_scoped_release release;
    check(diagonal ? "diagonal_lstm_backward" : "row_lstm_backward", pixel_rnn_backward(a, stream));
  });
}
