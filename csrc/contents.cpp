// Whether modules still hold what they held: the walk of genfast/_contents.py's ModuleContents, which asks at every call of a
// program. In Python it would cost more than a small program.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>

namespace genfast {
namespace {

struct Names {
  PyObject *hooks, *pre_hooks, *modules, *parameters, *buffers, *data_ptr, *version;
} names;

// The values of a dict, one by one and in order the very objects of a tuple.
bool identical(PyObject* dict, PyObject* values) {
  if (!PyDict_Check(dict) || PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(values)) return false;
  Py_ssize_t place = 0, i = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &place, &key, &value))
    if (value != PyTuple_GET_ITEM(values, i++)) return false;
  return true;
}

PyObject* item(PyObject* dict, PyObject* name) { return PyDict_GetItemWithError(dict, name); }  // borrowed

// record: (module, type, values of its __dict__, children, parameters, buffers).
bool same_module(PyObject* record) {
  PyObject* module = PyTuple_GET_ITEM(record, 0);
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GET_ITEM(record, 1)) return false;
  PyObject* held = PyObject_GenericGetDict(module, nullptr);
  if (!held) return false;
  bool same = identical(held, PyTuple_GET_ITEM(record, 2));
  for (PyObject* name : {names.hooks, names.pre_hooks}) {
    PyObject* hooks = same ? item(held, name) : nullptr;
    same = hooks && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) == 0;
  }
  int i = 3;
  for (PyObject* name : {names.modules, names.parameters, names.buffers}) {
    PyObject* values = same ? item(held, name) : nullptr;
    same = values && identical(values, PyTuple_GET_ITEM(record, i++));
  }
  Py_DECREF(held);
  return same;
}

bool number(PyObject* tensor, PyObject* name, bool call, unsigned long long& value) {
  PyObject* n = call ? PyObject_CallMethodNoArgs(tensor, name) : PyObject_GetAttr(tensor, name);
  if (!n) return false;
  value = PyLong_AsUnsignedLongLong(n);
  Py_DECREF(n);
  return !PyErr_Occurred();
}

// record: (tensor, its version, its address, bytes, address of the copy). The version changes with every operation that may
// change a tensor's shape or strides in place, and writes past it are seen in the bytes.
bool same_buffer(PyObject* record) {
  unsigned long long value, expected[4];
  for (int i = 0; i < 4; ++i) {
    expected[i] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(record, i + 1));
    if (PyErr_Occurred()) return false;
  }
  PyObject* tensor = PyTuple_GET_ITEM(record, 0);
  if (!number(tensor, names.version, false, value) || value != expected[0]) return false;
  if (!number(tensor, names.data_ptr, true, value) || value != expected[1]) return false;
  return !std::memcmp(reinterpret_cast<const void*>(expected[1]), reinterpret_cast<const void*>(expected[3]), expected[2]);
}

PyObject* same_modules(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "same_modules: expected the records of modules and of buffers, two tuples");
    return nullptr;
  }
  bool same = true;
  for (Py_ssize_t i = 0; same && i < PyTuple_GET_SIZE(args[0]); ++i) same = same_module(PyTuple_GET_ITEM(args[0], i));
  for (Py_ssize_t i = 0; same && i < PyTuple_GET_SIZE(args[1]); ++i) same = same_buffer(PyTuple_GET_ITEM(args[1], i));
  PyErr_Clear();  // what cannot be looked at is not the same
  return PyBool_FromLong(same);
}

}  // namespace

void bind_contents(pybind11::module_& m);

void bind_contents(pybind11::module_& m) {
  names = {PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
           PyUnicode_InternFromString("_modules"),       PyUnicode_InternFromString("_parameters"),
           PyUnicode_InternFromString("_buffers"),       PyUnicode_InternFromString("data_ptr"),
           PyUnicode_InternFromString("_version")};
  static PyMethodDef methods[] = {
      {"same_modules", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(same_modules)), METH_FASTCALL, nullptr},
      {nullptr, nullptr, 0, nullptr}};
  PyModule_AddFunctions(m.ptr(), methods);
}

}  // namespace genfast
