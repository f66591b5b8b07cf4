// The arguments of an op, looked at before a kernel may see them: one pass in C, since it is made on every call.
//
// A kernel takes addresses, so that a tensor of another dtype, without memory of its own or on another device would be read
// and written out of bounds. genfast/_registry.py asks here first, and says what was wrong where the answer is no; its
// _guard_in_python is the same in Python, for installations without this extension. No header of torch is needed: the
// getters of torch.Tensor are looked up once and called.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

namespace genfast {
namespace {

// As in genfast/_registry.py.
enum GuardAnswer { kGuardRefused = 0, kGuardCpu = 1, kGuardCuda = 2, kGuardRequiresGrad = 4, kGuardOtherDtype = 8 };

struct GuardTypes {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *strided = nullptr, *layout = nullptr, *dtype = nullptr, *is_cpu = nullptr, *is_cuda = nullptr;
  PyObject *is_nested = nullptr, *requires_grad = nullptr, *is_neg = nullptr, *is_zero = nullptr;
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
    if (kind != 'T' && kind != 't') {
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

}  // namespace

void bind_guard(pybind11::module_& m);

void bind_guard(pybind11::module_& m) {
  m.def("guard_types", [](const pybind11::object& tensor, const pybind11::object& parameter, const pybind11::object& strided) {
    const auto keep = [&](const char* name) { return pybind11::object(tensor.attr(name)).release().ptr(); };
    guard_types.layout = keep("layout"), guard_types.dtype = keep("dtype"), guard_types.is_cpu = keep("is_cpu");
    guard_types.is_cuda = keep("is_cuda"), guard_types.is_nested = keep("is_nested");
    guard_types.requires_grad = keep("requires_grad");
    guard_types.is_neg = keep("is_neg"), guard_types.is_zero = keep("_is_zerotensor");
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
