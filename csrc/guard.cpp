// The arguments of an op, looked at before a kernel may see them: one pass in C, since it is made on every call.
//
// A kernel takes addresses, so that a tensor of another dtype, without memory of its own or on another device would be read
// and written out of bounds. genfast/_registry.py asks here first, and says what was wrong where the answer is no; its
// _guard_in_python is the same in Python, for installations without this extension. No header of torch is needed: the
// getters of torch.Tensor are looked up once and called.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace genfast {
namespace {

// As in genfast/_registry.py.
enum GuardAnswer {
  kGuardRefused = 0, kGuardCpu = 1, kGuardCuda = 2, kGuardRequiresGrad = 4, kGuardOtherDtype = 8, kGuardEmpty = 16
};

struct GuardTypes {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *strided = nullptr, *layout = nullptr, *dtype = nullptr, *is_cpu = nullptr, *is_cuda = nullptr;
  PyObject *is_nested = nullptr, *requires_grad = nullptr, *is_neg = nullptr, *is_zero = nullptr;
  PyObject* numel = nullptr;
};

GuardTypes guard_types;

struct Signature {
  std::string kinds;                              // a letter an argument, as genfast/_registry.py writes it
  std::vector<std::vector<PyObject*>> cpu, cuda;  // of each argument the dtypes that the preferred kernel takes; not owned
};

PyObject* guard_get(PyObject* getter, PyObject* object) {
  return Py_TYPE(getter)->tp_descr_get(getter, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
}

// 1, 0, or -1 with a Python error set.
int guard_is(PyObject* value, PyObject* expected) {
  if (!value) return -1;
  const int same = value == expected;
  Py_DECREF(value);
  return same;
}

bool guard_scalar(char kind, PyObject* a) {
  switch (kind) {
    case 'i': return PyLong_CheckExact(a);
    case 'f': return PyFloat_CheckExact(a) || PyLong_CheckExact(a);
    case 'g': return a == Py_None || PyFloat_CheckExact(a) || PyLong_CheckExact(a);
    case 'b': return PyBool_Check(a);
    case 's': return PyUnicode_CheckExact(a);
    default: return false;
  }
}

bool guard_list(char kind, PyObject* a) {
  if (!PyList_CheckExact(a) && !PyTuple_Check(a)) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(a);
  for (Py_ssize_t i = 0; i < size; ++i)
    if (!guard_scalar(char(kind + 'a' - 'A'), PySequence_Fast_GET_ITEM(a, i))) return false;
  return true;
}

// guard(signature, args) -> GuardAnswer
PyObject* guard(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(given[1])) {
    PyErr_SetString(PyExc_TypeError, "guard: expected a signature and a tuple of arguments");
    return nullptr;
  }
  const auto* s = static_cast<const Signature*>(PyCapsule_GetPointer(given[0], "genfast.Signature"));
  if (!s) return nullptr;
  PyObject* args = given[1];
  const GuardTypes& types = guard_types;
  if (!types.tensor || PyTuple_GET_SIZE(args) != Py_ssize_t(s->kinds.size())) return PyLong_FromLong(kGuardRefused);
  long answer = 0, device = 0;
  for (size_t i = 0; i < s->kinds.size(); ++i) {
    PyObject* a = PyTuple_GET_ITEM(args, Py_ssize_t(i));
    const char kind = s->kinds[i];
    if (kind != 'T' && kind != 't' && kind != 'E') {
      if (kind < 'a' ? !guard_list(kind, a) : !guard_scalar(kind, a)) return PyLong_FromLong(kGuardRefused);
      continue;
    }
    if (a == Py_None && kind == 't') continue;
    if (Py_TYPE(a) != types.tensor && Py_TYPE(a) != types.parameter) return PyLong_FromLong(kGuardRefused);
    const int nested = guard_is(guard_get(types.is_nested, a), Py_True);
    if (nested < 0) return nullptr;
    if (nested) return PyLong_FromLong(kGuardRefused);
    const int strided = guard_is(guard_get(types.layout, a), types.strided);
    if (strided < 0) return nullptr;
    const int negative = strided ? guard_is(PyObject_CallOneArg(types.is_neg, a), Py_True) : 0;
    const int zero = strided ? guard_is(PyObject_CallOneArg(types.is_zero, a), Py_True) : 0;
    if (negative < 0 || zero < 0) return nullptr;
    if (!strided || negative || zero) return PyLong_FromLong(kGuardRefused);
    const int cpu = guard_is(guard_get(types.is_cpu, a), Py_True);
    const int cuda = cpu ? 0 : guard_is(guard_get(types.is_cuda, a), Py_True);
    const int grad = guard_is(guard_get(types.requires_grad, a), Py_True);
    if (cpu < 0 || cuda < 0 || grad < 0) return nullptr;
    const long here = cpu ? kGuardCpu : cuda ? kGuardCuda : 0;
    if (!here || (device && here != device)) return PyLong_FromLong(kGuardRefused);
    device = here;
    if (grad) answer |= kGuardRequiresGrad;
    PyObject* dtype = guard_get(types.dtype, a);
    if (!dtype) return nullptr;
    bool taken = false;
    for (PyObject* d : (cpu ? s->cpu : s->cuda)[i]) taken = taken || d == dtype;
    Py_DECREF(dtype);
    if (!taken) answer |= kGuardOtherDtype;
    if (kind == 'E') continue;
    PyObject* numel = PyObject_CallOneArg(types.numel, a);
    if (!numel) return nullptr;
    if (PyObject_Not(numel)) answer |= kGuardEmpty;
    Py_DECREF(numel);
  }
  return PyLong_FromLong(answer | device);
}

// signature(kinds, cpu, cuda) -> capsule; cpu and cuda hold a tuple of dtypes an argument, which must outlive it.
pybind11::object make_signature(const std::string& kinds, const pybind11::list& cpu, const pybind11::list& cuda) {
  auto made = std::make_unique<Signature>();
  made->kinds = kinds;
  for (auto* side : {&cpu, &cuda})
    for (const auto& dtypes : *side) {
      auto& out = side == &cpu ? made->cpu : made->cuda;
      out.emplace_back();
      for (const auto& d : dtypes) out.back().push_back(d.ptr());
    }
  if (made->cpu.size() != kinds.size() || made->cuda.size() != kinds.size())
    throw pybind11::value_error("signature: expected dtypes for every argument");
  PyObject* capsule = PyCapsule_New(made.release(), "genfast.Signature", [](PyObject* c) {
    delete static_cast<Signature*>(PyCapsule_GetPointer(c, "genfast.Signature"));
  });
  return pybind11::reinterpret_steal<pybind11::object>(capsule);
}

bool indices_within(std::uintptr_t address, int64_t count, int64_t size) {
  pybind11::gil_scoped_release release;
  const int64_t* index = reinterpret_cast<const int64_t*>(address);
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) outside |= index[i] < 0 || index[i] >= size;
  return !outside;
}

// Every number of a program that autoregressive_inverse.cpp and .cu use as an index, as those files read them.
std::string degree_program_error(std::uintptr_t address, int64_t length, int64_t z_columns, int64_t packed_length,
                                 int64_t statics_columns) {
  const int64_t* code = reinterpret_cast<const int64_t*>(address);
  constexpr int64_t kHeader = 9, kLayer = 11, kGroup = 7, kActivations = 9;
  if (length < kHeader) return "it is shorter than its header";
  for (int64_t i = 0; i < kHeader; ++i)
    if (code[i] < 0 || code[i] > INT32_MAX) return "number " + std::to_string(i) + " of its header is " + std::to_string(code[i]);
  const int64_t inputs = code[0], width = code[1], levels = code[2], layers = code[3], groups = code[4], units = code[5];
  const int64_t statics = code[6], packed = code[7], parameters = code[8];
  if (inputs != z_columns || packed != packed_length || statics != statics_columns)
    return "its header is not of these inputs, weights, contexts and gates";
  if (kHeader + inputs + levels + kLayer * layers + kGroup * groups > length) return "it is shorter than its header says";
  const int64_t *order = code + kHeader, *ends = order + inputs, *layer = ends + levels, *group = layer + kLayer * layers;
  // Whether numbers first .. first + count - 1 are among `size`.
  const auto fits = [](int64_t first, int64_t count, int64_t size) {
    return first >= 0 && count >= 0 && first <= size && count <= size - first;
  };
  const auto table = [&](int64_t first, int64_t count) {
    if (!fits(first, count, length)) return false;
    for (int64_t i = first; i < first + count; ++i)
      if (code[i] < 0 || code[i] >= units) return false;
    return true;
  };
  std::vector<bool> seen(size_t(inputs), false);
  for (int64_t i = 0; i < inputs; ++i) {
    if (order[i] < 0 || order[i] >= inputs || seen[size_t(order[i])]) return "its order is no permutation of the inputs";
    seen[size_t(order[i])] = true;
  }
  for (int64_t i = 0, last = 0; i < levels; last = ends[i++])
    if (ends[i] < last || ends[i] > inputs) return "its levels end outside of the inputs";
  if (inputs && (!levels || ends[levels - 1] != inputs)) return "its levels leave inputs out";
  if (!fits(parameters, inputs * width, units)) return "its parameters lie outside of its units";
  constexpr int64_t kSlack = 64;  // arrays end with whole vectors
  int64_t all = inputs + kSlack;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t* l = layer + kLayer * i;
    const int64_t kind = l[0], source = l[2], source_units = l[3], first = l[4], count = l[5], bias = l[6], residual = l[10];
    const std::string where = "layer " + std::to_string(i + 1);
    if (kind < 0 || kind > 1 || l[1] < 0 || l[1] >= kActivations) return where + " is of no kind or activation";
    if (!fits(source, source_units, units) || !fits(first, count, units)) return where + " lies outside of the units";
    if (bias >= 0 && !fits(bias, count, packed)) return where + " has a bias outside of packed";
    for (const int64_t column : {l[7], l[8]})
      if (column >= 0 && !fits(column, count, statics)) return where + " has a context or gate outside of statics";
    if (kind == 1 && !table(l[9], count)) return where + " takes from outside of the units";
    if (residual >= 0 && !table(residual, count)) return where + " adds what lies outside of the units";
    all += count + kSlack;
  }
  if (units > all) return "it has more units than its layers make";
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t* g = group + kGroup * i;
    const int64_t level = g[0], of = g[1], row = g[2], rows = g[3], count = g[4], weight = g[5], stride = g[6];
    const std::string where = "group " + std::to_string(i + 1);
    if (level < 0 || level >= levels || (i && level < g[-kGroup])) return where + " is of no level";
    if (of < 0 || of >= layers) return where + " is of no layer";
    const int64_t* l = layer + kLayer * of;
    if (!fits(row, rows, l[5])) return where + " has rows that its layer lacks";
    if (l[0] == 1) continue;
    if (!fits(l[2], count, units) || count > l[3]) return where + " reads outside of the units";
    if (stride < count || stride > packed || !fits(weight, rows * stride, packed)) return where + " has weights outside of packed";
  }
  return "";
}

// Every number of a program that flow_program.cpp uses as an index, as that file reads them. A step reads rows that were made
// before it, so that no row is read that nothing wrote.
std::string flow_program_error(std::uintptr_t address, int64_t length, int64_t option_count) {
  const int64_t* code = reinterpret_cast<const int64_t*>(address);
  constexpr int64_t kHeader = 8, kStep = 14, kActivations = 9, kMostBins = 64;
  if (length < kHeader) return "it is shorter than its header";
  for (int64_t i = 0; i < kHeader; ++i)
    if (code[i] < 0 || code[i] > INT64_MAX / 64) return "number " + std::to_string(i) + " of its header is " + std::to_string(code[i]);
  const int64_t inputs = code[0], contexts = code[1], rows = code[2], weights = code[3], count = code[4];
  const auto fits = [](int64_t first, int64_t size, int64_t limit) {
    return first >= 0 && size >= 0 && first <= limit && size <= limit - first;
  };
  if (rows > INT32_MAX || count > length / kStep || kHeader + kStep * count > length) return "it is shorter than its header says";
  int64_t made = inputs + contexts;  // rows that have been written so far
  if (inputs > rows || contexts > rows - inputs) return "it has fewer rows than inputs";
  // Whether a table of `size` numbers stands at `first`, each from 0 to limit - 1.
  const auto table = [&](int64_t first, int64_t size, int64_t limit) {
    if (!fits(first, size, length)) return false;
    for (int64_t i = first; i < first + size; ++i)
      if (code[i] < 0 || code[i] >= limit) return false;
    return true;
  };
  const auto optional = [&](int64_t first, int64_t size, int64_t limit) { return first < 0 || table(first, size, limit); };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* s = code + kHeader + kStep * i;
    const int64_t operation = s[0], first = s[1], units = s[2], kind = s[3], *f = s + 4;
    const std::string where = "step " + std::to_string(i + 1);
    if (units < 0 || units > rows) return where + " has no such number of units";
    const bool makes = operation != 5 && operation != 6;
    if (makes && (first != made || !fits(first, units, rows))) return where + " does not write the next rows";
    switch (operation) {
      case 0: {
        const int64_t weight = f[0], stride = f[1], bias = f[2], in = f[3];
        if (kind < 0 || kind >= kActivations - 2) return where + " has no such activation";
        if (in < 0 || in > rows || weight < 0 || stride < 0 || stride > weights) return where + " has no such weights";
        if (!table(f[4], in, made) || !optional(f[8], units, made)) return where + " reads what was not made";
        if (!table(f[5], in, weights) || !table(f[6], units, weights)) return where + " has weights outside of them";
        if (!optional(f[7], units, in + 1)) return where + " has more live inputs than inputs";
        int64_t column = 0, row = 0, last = 0;
        for (int64_t k = 0; k < in; ++k) column = code[f[5] + k] > column ? code[f[5] + k] : column;
        for (int64_t k = 0; k < units; ++k) {
          row = code[f[6] + k] > row ? code[f[6] + k] : row;
          if (f[7] >= 0 && code[f[7] + k] < last) return where + " has live inputs that do not rise";
          last = f[7] >= 0 ? code[f[7] + k] : 0;
        }
        if (stride && row > weights / stride) return where + " has weights outside of them";
        if (in && units && !fits(weight, row * stride + column + 1, weights)) return where + " has weights outside of them";
        if (bias >= 0 && units && !fits(bias, row + 1, weights)) return where + " has a bias outside of the weights";
        break;
      }
      case 1:
        if (kind < 0 || kind >= kActivations) return where + " has no such activation";
        if (!table(f[0], units, made) || !optional(f[1], units, made) || !optional(f[2], units, made))
          return where + " reads what was not made";
        break;
      case 2:
        if (kind < 0 || kind > 4 || f[3] < 0 || f[3] > 3) return where + " has no such scale or mode";
        if (!table(f[0], units, made) || !optional(f[1], units, made) || !optional(f[2], units, made))
          return where + " reads what was not made";
        if (f[4] >= option_count) return where + " has a constant outside of the options";
        break;
      case 3: {
        const int64_t bins = f[2];
        if (kind < 0 || kind > 2 || bins < 2 || bins > kMostBins) return where + " has no such tails or bins";
        const int64_t width = 3 * bins - 1 + (kind == 0 ? 0 : kind == 1 ? 2 : 1);
        if (!table(f[0], units, made) || !table(f[1], units * width, made)) return where + " reads what was not made";
        if (!fits(f[5], 9, option_count)) return where + " has constants outside of the options";
        break;
      }
      case 4:
        if ((kind != 0 && kind != 5) || f[3] < 0 || f[3] > 3) return where + " has no such scale or mode";
        if (!table(f[0], units, made) || !table(f[4], units, weights)) return where + " reads what was not made";
        for (int64_t k = 0; k < units; ++k)
          for (const int64_t offset : {f[1], f[2]})
            if (offset >= 0 && !fits(offset, code[f[4] + k] + 1, weights)) return where + " has weights outside of them";
        break;
      case 5:
        if (!fits(f[0], 1, weights)) return where + " has a weight outside of them";
        break;
      case 6:
        if (kind < 0 || kind > 1 || !table(f[0], units, made)) return where + " is of no base, or reads what was not made";
        break;
      default: return where + " is of no operation";
    }
    if (makes) made += units;
  }
  if (made != rows) return "it has other rows than its steps make";
  if (!table(code[5], inputs, rows)) return "its outputs lie outside of its rows";
  return "";
}

}  // namespace

void bind_guard(pybind11::module_& m);

void bind_guard(pybind11::module_& m) {
  m.def("indices_within", &indices_within, "Whether all of so many int64 numbers at an address are from 0 to size - 1.");
  m.def("degree_program_error", &degree_program_error, "What is wrong with a degree-ordered program; empty where nothing is.");
  m.def("flow_program_error", &flow_program_error, "What is wrong with a flow program; empty where nothing is.");
  m.def("guard_types", [](const pybind11::object& tensor, const pybind11::object& parameter, const pybind11::object& strided) {
    const auto keep = [&](const char* name) { return pybind11::object(tensor.attr(name)).release().ptr(); };
    guard_types.layout = keep("layout"), guard_types.dtype = keep("dtype"), guard_types.is_cpu = keep("is_cpu");
    guard_types.is_cuda = keep("is_cuda"), guard_types.is_nested = keep("is_nested");
    guard_types.requires_grad = keep("requires_grad");
    guard_types.is_neg = keep("is_neg"), guard_types.is_zero = keep("_is_zerotensor");
    guard_types.numel = keep("numel");
    guard_types.strided = pybind11::object(strided).release().ptr();
    guard_types.parameter = reinterpret_cast<PyTypeObject*>(pybind11::object(parameter).release().ptr());
    guard_types.tensor = reinterpret_cast<PyTypeObject*>(pybind11::object(tensor).release().ptr());
  });
  m.def("signature", &make_signature);
  static PyMethodDef methods[] = {
      {"guard", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guard)), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  PyModule_AddFunctions(m.ptr(), methods);
}

}  // namespace genfast
