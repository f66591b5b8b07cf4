// The Python type of a kernel, for bind_cpu.cpp and bind_cuda.cpp: called with the fields of its argument struct by name.
#pragma once
#include <Python.h>
#include <structmember.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "fields.h"

namespace genfast {
namespace {

enum class Kind { kBool, kInt, kInt64, kFloat, kDouble, kAddress, kRecord };

struct Field {
  std::string name;
  Kind kind;
  size_t offset, size;       // size: of one element
  int count;                 // more than 1: an array
  bool pointer, result;      // result: of a Result, whose element's kind and size these are
  std::vector<Field> parts;  // of a record
};

template <class T>
std::vector<Field> fields_of();

template <class T>
struct IsResult : std::false_type {};
template <class T>
struct IsResult<Result<T>> : std::true_type {
  using Element = T;
};

template <class T>
void describe(Field& f) {
  f.size = sizeof(T);
  if constexpr (std::is_same_v<T, bool>) {
    f.kind = Kind::kBool;
  } else if constexpr (std::is_same_v<T, float>) {
    f.kind = Kind::kFloat;
  } else if constexpr (std::is_same_v<T, double>) {
    f.kind = Kind::kDouble;
  } else if constexpr (std::is_pointer_v<T> || std::is_same_v<T, uintptr_t>) {
    f.kind = Kind::kAddress, f.pointer = std::is_pointer_v<T>;
  } else if constexpr (IsResult<T>::value) {
    describe<typename IsResult<T>::Element>(f);
    f.result = true;
  } else if constexpr (std::is_class_v<T>) {
    f.kind = Kind::kRecord, f.parts = fields_of<T>();
    for (const Field& part : f.parts) f.pointer = f.pointer || part.pointer;
  } else {
    static_assert(std::is_integral_v<T> && std::is_signed_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "a type with no kind");
    f.kind = sizeof(T) == 4 ? Kind::kInt : Kind::kInt64;
  }
}

// Takes the names that stand for one type, "n, c, s", apart.
struct Lister {
  const void* base;
  std::vector<Field> fields;

  template <class... T>
  void operator()(const char* names, const T&... members) {
    (add(&names, members), ...);
  }

  template <class T>
  void add(const char** names, const T& member) {
    const size_t length = std::strcspn(*names, ",");
    Field f{std::string(*names, length), Kind::kBool, 0, 0, 1, false, false, {}};
    *names += length + std::strspn(*names + length, ", ");
    f.offset = size_t(reinterpret_cast<const char*>(&member) - static_cast<const char*>(base));
    if constexpr (std::is_array_v<T>) f.count = int(std::extent_v<T>);
    describe<std::remove_extent_t<T>>(f);
    fields.push_back(f);
  }
};

template <class T>
std::vector<Field> fields_of() {
  static const T args{};
  Lister lister{&args, {}};
  args.visit_fields(lister);
  return lister.fields;
}

using Mask = uint64_t;  // a bit for each field

// What the keywords of one call site mean: Python hands the same tuple of names each time.
struct CallSite {
  PyObject* names = nullptr;
  std::vector<size_t> fields;
  Mask mask = 0;
  ~CallSite() { Py_XDECREF(names); }
};

struct Entry {
  std::string name;
  std::vector<Field> fields;
  size_t size;
  void (*run)(const void* args);
  Mask pointers;
  const Field* result;  // or null
  std::vector<std::unique_ptr<CallSite>> sites;
};

constexpr size_t kMostBytes = 384, kMostSites = 16;

struct Kernel {
  PyObject_HEAD
  vectorcallfunc call;
  Entry* entry;
  Mask allowed, required;  // fields that a call may fill, and must
  Mask filled, begun;  // fields that are prepared; records of which all but the address is
  PyObject* owners;    // of prepared addresses, or null
  alignas(8) char args[kMostBytes];
};

PyTypeObject* kernel_type;

bool fail(PyObject* error, const Entry& entry, const std::string& what) {
  PyErr_Format(error, "genfast kernel %s: %s", entry.name.c_str(), what.c_str());
  return false;
}

bool lacks_memory(const Entry& entry) {
  PyErr_Clear();
  PyErr_Format(PyExc_MemoryError, "genfast kernel %s: its working memory could not be allocated", entry.name.c_str());
  return false;
}

// What `body` returns; null and a Python error where it lacks memory, since no exception may pass through the interpreter.
template <class Body>
PyObject* result_or_error(PyObject* self, const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return lacks_memory(*reinterpret_cast<Kernel*>(self)->entry), nullptr;
  }
}

struct Release {  // of a Python object that is not returned
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

bool wrong(const Entry& entry, const Field& f, PyObject* value, const char* expected) {
  PyErr_Clear();
  return fail(PyExc_TypeError, entry, f.name + " is a " + Py_TYPE(value)->tp_name + ", expected " + expected);
}

bool too_large(const Entry& entry, const Field& f) {
  PyErr_Clear();
  return fail(PyExc_OverflowError, entry, f.name + " does not fit in " + std::to_string(f.size * 8) + " bits");
}

bool store_integer(const Entry& entry, const Field& f, char* target, PyObject* value) {
  if (!PyLong_Check(value) || PyBool_Check(value)) return wrong(entry, f, value, "an int");
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow || (f.kind == Kind::kInt && number != int32_t(number))) return too_large(entry, f);
  if (f.kind == Kind::kInt)
    *reinterpret_cast<int32_t*>(target) = int32_t(number);
  else
    *reinterpret_cast<int64_t*>(target) = number;
  return true;
}

bool store_real(const Entry& entry, const Field& f, char* target, PyObject* value) {
  if (!PyFloat_Check(value) && (!PyLong_Check(value) || PyBool_Check(value))) return wrong(entry, f, value, "a float");
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) return too_large(entry, f);
  if (f.kind == Kind::kFloat)
    *reinterpret_cast<float*>(target) = float(number);
  else
    *reinterpret_cast<double*>(target) = number;
  return true;
}

// A tensor, its address or None.
bool store_address(const Entry& entry, const Field& f, char* target, PyObject* value) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  uintptr_t address = 0;
  if (value != Py_None) {
    PyObject* number = PyLong_Check(value) ? Py_NewRef(value) : PyObject_CallMethodNoArgs(value, data_ptr);
    if (!number && !PyErr_ExceptionMatches(PyExc_AttributeError)) return false;
    if (!number || !PyLong_Check(number) || PyBool_Check(number)) {
      Py_XDECREF(number);
      return wrong(entry, f, value, "a tensor, an address or None");
    }
    address = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (address == uintptr_t(-1) && PyErr_Occurred()) return too_large(entry, f);
  }
  *reinterpret_cast<uintptr_t*>(target) = address;
  return true;
}

bool store(const Entry& entry, const Field& f, char* target, PyObject* value);

// The parts in their order, all but the first (an address that comes with the call), or the address alone.
bool store_record(const Entry& entry, const Field& f, char* target, PyObject* value) {
  if (!PyTuple_Check(value)) return store_address(entry, f, target, value);
  const size_t size = size_t(PyTuple_GET_SIZE(value)), first = f.parts.size() - size;
  if (first > 1) {
    std::string expected = "a tuple of";
    for (const Field& part : f.parts) expected += ' ' + part.name;
    return wrong(entry, f, value, (expected + ", or of all but the first").c_str());
  }
  for (size_t i = 0; i < size; ++i) {
    const Field& part = f.parts[first + i];
    if (!store(entry, part, target + part.offset, PyTuple_GET_ITEM(value, i))) return false;
  }
  return true;
}

bool store_array(const Entry& entry, const Field& f, char* target, PyObject* value) {
  if (!PyTuple_Check(value) && !PyList_Check(value)) return wrong(entry, f, value, "a tuple or a list");
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
  if (size > f.count)
    return fail(PyExc_TypeError, entry,
                f.name + " has " + std::to_string(size) + " items, expected at most " + std::to_string(f.count));
  Field element = f;
  element.count = 1;
  for (Py_ssize_t i = 0; i < size; ++i)
    if (!store(entry, element, target + size_t(i) * f.size, PySequence_Fast_GET_ITEM(value, i))) return false;
  return true;
}

bool store(const Entry& entry, const Field& f, char* target, PyObject* value) {
  if (f.count > 1) return store_array(entry, f, target, value);
  switch (f.kind) {
    case Kind::kBool:
      if (!PyBool_Check(value)) return wrong(entry, f, value, "a bool");
      *reinterpret_cast<bool*>(target) = value == Py_True;
      return true;
    case Kind::kInt:
    case Kind::kInt64: return store_integer(entry, f, target, value);
    case Kind::kFloat:
    case Kind::kDouble: return store_real(entry, f, target, value);
    case Kind::kAddress: return store_address(entry, f, target, value);
    default: return store_record(entry, f, target, value);
  }
}

std::string listed(const Entry& entry, Mask mask) {
  std::string names;
  for (size_t i = 0; i < entry.fields.size(); ++i)
    if (mask >> i & 1) names += (names.empty() ? "" : ", ") + entry.fields[i].name;
  return names;
}

// The bits of all fields that Python fills.
Mask all_fields(const Entry& entry) {
  Mask mask = 0;
  for (size_t i = 0; i < entry.fields.size(); ++i)
    if (!entry.fields[i].result) mask |= Mask(1) << i;
  return mask;
}

// Which field has this name; -1 and an error where none has, or where `mask`, to which the field is added, has it.
int find(const Entry& entry, const std::string& name, Mask* mask) {
  const Mask all = all_fields(entry);
  for (size_t i = 0; i < entry.fields.size(); ++i)
    if ((all >> i & 1) && entry.fields[i].name == name) {
      if (*mask >> i & 1) return fail(PyExc_TypeError, entry, "the field " + name + " is named twice"), -1;
      *mask |= Mask(1) << i;
      return int(i);
    }
  return fail(PyExc_TypeError, entry, "it has no field " + name + ", expected one of " + listed(entry, all)), -1;
}

// What the names mean, looked up once for the tuples of the first call sites; `spare` owns that of any later one.
const CallSite* find_site(Entry& entry, PyObject* names, std::unique_ptr<CallSite>& spare) {
  for (const auto& site : entry.sites)
    if (site->names == names) return site.get();
  auto site = std::make_unique<CallSite>();
  site->names = Py_NewRef(names);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
    const char* name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(names, i));
    const int field = name ? find(entry, name, &site->mask) : -1;
    if (field < 0) return nullptr;
    site->fields.push_back(size_t(field));
  }
  auto& owner = entry.sites.size() < kMostSites ? entry.sites.emplace_back() : spare;
  owner = std::move(site);
  return owner.get();
}

// Stores the values of a call, or of prepare, where a record may do without its address.
bool fill(const Kernel& kernel, const CallSite& site, PyObject* const* values, char* args, bool preparing) {
  const Entry& entry = *kernel.entry;
  for (size_t i = 0; i < site.fields.size(); ++i) {
    const Field& f = entry.fields[site.fields[i]];
    if (f.kind == Kind::kRecord && f.count == 1 && values[i] != Py_None) {
      const bool tuple = PyTuple_Check(values[i]);
      if (!tuple && !(kernel.begun >> site.fields[i] & 1))
        return fail(PyExc_TypeError, entry, f.name + " is an address, and its strides were not prepared");
      if (tuple && !preparing && size_t(PyTuple_GET_SIZE(values[i])) + 1 == f.parts.size())
        return fail(PyExc_TypeError, entry, f.name + " has no address");
    }
    if (!store(entry, f, args + f.offset, values[i])) return false;
  }
  return true;
}

// Whether a call with these fields is one that the kernel takes.
bool complete(const Kernel& kernel, Mask filled) {
  const Entry& entry = *kernel.entry;
  if (!(filled & entry.pointers))
    return fail(PyExc_TypeError, entry, "no address is set: one of " + listed(entry, entry.pointers));
  if (const Mask missing = kernel.required & ~filled) return fail(PyExc_TypeError, entry, "not set: " + listed(entry, missing));
  if (const Mask extra = filled & ~kernel.allowed) return fail(PyExc_TypeError, entry, "not declared: " + listed(entry, extra));
  return true;
}

// Without the GIL.
bool run(const Entry& entry, const char* args) {
  std::string problem;
  PyObject* error = nullptr;
  bool memory = true;
  PyThreadState* state = PyEval_SaveThread();
  try {
    entry.run(args);
  } catch (const std::length_error&) {  // of a vector, larger than memory can be
    memory = false;
  } catch (const std::bad_alloc&) {
    memory = false;
  } catch (const std::invalid_argument& exception) {  // numbers in a tensor that only the kernel sees
    error = PyExc_ValueError, problem = exception.what();
  } catch (const std::exception& exception) {
    error = PyExc_RuntimeError, problem = exception.what();
  }
  PyEval_RestoreThread(state);
  if (!memory) return lacks_memory(entry);
  if (error) PyErr_SetString(error, problem.c_str());
  return !error;
}

PyObject* result_of(const Field& f, const char* value) {
  switch (f.kind) {
    case Kind::kBool: return PyBool_FromLong(*reinterpret_cast<const bool*>(value));
    case Kind::kInt: return PyLong_FromLong(*reinterpret_cast<const int32_t*>(value));
    case Kind::kInt64: return PyLong_FromLongLong(*reinterpret_cast<const int64_t*>(value));
    default: return PyFloat_FromDouble(*reinterpret_cast<const double*>(value));
  }
}

PyObject* call_kernel(PyObject* self, PyObject* const* values, size_t positional, PyObject* names) {
  const Kernel& kernel = *reinterpret_cast<Kernel*>(self);
  Entry& entry = *kernel.entry;
  if (PyVectorcall_NARGS(positional)) return fail(PyExc_TypeError, entry, "it takes its fields by name"), nullptr;
  alignas(8) char args[kMostBytes];
  alignas(8) char result[8] = {};
  std::memcpy(args, kernel.args, entry.size);
  if (entry.result) *reinterpret_cast<char**>(args + entry.result->offset) = result;
  Mask filled = kernel.filled;
  if (names) {
    std::unique_ptr<CallSite> spare;
    const CallSite* site = find_site(entry, names, spare);
    if (!site || !fill(kernel, *site, values, args, false)) return nullptr;
    filled |= site->mask;
  }
  if (!complete(kernel, filled) || !run(entry, args)) return nullptr;
  return entry.result ? result_of(*entry.result, result) : Py_NewRef(Py_None);
}

PyObject* call(PyObject* self, PyObject* const* values, size_t positional, PyObject* names) {
  return result_or_error(self, [&] { return call_kernel(self, values, positional, names); });
}

Kernel* make_kernel(Entry* entry, const Kernel* like) {
  Kernel* kernel = PyObject_New(Kernel, kernel_type);
  if (!kernel) return nullptr;
  kernel->call = call, kernel->entry = entry, kernel->owners = nullptr;
  kernel->allowed = like ? like->allowed : all_fields(*entry), kernel->required = like ? like->required : 0;
  kernel->filled = like ? like->filled : 0, kernel->begun = like ? like->begun : 0;
  std::memset(kernel->args, 0, kMostBytes);
  if (like) std::memcpy(kernel->args, like->args, kMostBytes);
  return kernel;
}

PyObject* prepare_kernel(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  const Kernel& kernel = *reinterpret_cast<Kernel*>(self);
  if (positional) return fail(PyExc_TypeError, *kernel.entry, "prepare takes its fields by name"), nullptr;
  Kernel* made = make_kernel(kernel.entry, &kernel);
  if (!made) return nullptr;
  Owned object(reinterpret_cast<PyObject*>(made));
  made->owners = kernel.owners ? PySequence_List(kernel.owners) : PyList_New(0);
  std::unique_ptr<CallSite> spare;
  const CallSite* site = names ? find_site(*kernel.entry, names, spare) : nullptr;
  bool good = made->owners && (!names || (site && fill(kernel, *site, values, made->args, true)));
  for (size_t i = 0; good && site && i < site->fields.size(); ++i) {
    const Field& f = kernel.entry->fields[site->fields[i]];
    const Mask bit = Mask(1) << site->fields[i];
    const bool record = f.kind == Kind::kRecord && f.count == 1, tuple = PyTuple_Check(values[i]);
    if (record && tuple) made->begun |= bit;
    if (!record || !tuple || size_t(PyTuple_GET_SIZE(values[i])) == f.parts.size()) made->filled |= bit;
    if (f.pointer) good = !PyList_Append(made->owners, values[i]);
  }
  return good ? object.release() : nullptr;
}

PyObject* prepare(PyObject* self, PyObject* const* values, Py_ssize_t positional, PyObject* names) {
  return result_or_error(self, [&] { return prepare_kernel(self, values, positional, names); });
}

PyObject* declare_fields(PyObject* self, PyObject* const* names, Py_ssize_t count) {
  const Kernel& kernel = *reinterpret_cast<Kernel*>(self);
  Mask allowed = 0, optional = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const char* text = PyUnicode_AsUTF8(names[i]);
    if (!text) return nullptr;
    std::string name = text;
    const bool may = !name.empty() && name.back() == '?';
    if (may) name.pop_back();
    const int field = find(*kernel.entry, name, &allowed);
    if (field < 0) return nullptr;
    if (may) optional |= Mask(1) << field;
  }
  Kernel* made = make_kernel(kernel.entry, &kernel);
  if (made) made->owners = Py_XNewRef(kernel.owners), made->allowed = allowed, made->required = allowed & ~optional;
  return reinterpret_cast<PyObject*>(made);
}

PyObject* declare(PyObject* self, PyObject* const* names, Py_ssize_t count) {
  return result_or_error(self, [&] { return declare_fields(self, names, count); });
}

std::string kind_name(const Field& f) {
  static const char* const names[] = {"bool", "int", "int", "float", "float", "address"};
  if (f.kind != Kind::kRecord) return names[int(f.kind)];
  std::string text;
  for (const Field& part : f.parts) text += (text.empty() ? "" : ", ") + kind_name(part);
  return "(" + text + ")";
}

PyObject* fields_with_kinds(PyObject* self) {
  const Kernel& kernel = *reinterpret_cast<Kernel*>(self);
  Owned fields(PyDict_New());
  for (size_t i = 0; fields && i < kernel.entry->fields.size(); ++i) {
    if (!(kernel.allowed >> i & 1)) continue;
    const Field& f = kernel.entry->fields[i];
    const bool required = kernel.required >> i & 1;
    const Owned kind(PyUnicode_FromString((kind_name(f) + (f.count > 1 ? "[]" : "") + (required ? "" : "?")).c_str()));
    if (!kind || PyDict_SetItemString(fields.get(), f.name.c_str(), kind.get())) fields.reset();
  }
  return fields.release();
}

PyObject* get_fields(PyObject* self, void*) {
  return result_or_error(self, [&] { return fields_with_kinds(self); });
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(reinterpret_cast<Kernel*>(self)->owners);
  PyObject_Free(self);
  Py_DECREF(type);
}

template <class F>
PyCFunction method(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyTypeObject* make_kernel_type() {
  static PyMethodDef methods[] = {
      {"prepare", method(prepare), METH_FASTCALL | METH_KEYWORDS,
       "prepare(**fields): the kernel with these fields filled; a record without its first part takes an address in the call."},
      {"declare", method(declare), METH_FASTCALL,
       "declare(*names): the kernel whose calls fill these fields and no others; those whose name ends in ? may be left out."},
      {nullptr, nullptr, 0, nullptr}};
  static PyGetSetDef properties[] = {
      {"fields", get_fields, nullptr, "The fields that a call fills and their kinds, with ? where it may leave them out.", nullptr},
      {nullptr, nullptr, nullptr, nullptr, nullptr}};
  static PyMemberDef members[] = {
      {"__vectorcalloffset__", T_PYSSIZET, Py_ssize_t(offsetof(Kernel, call)), READONLY, nullptr},
      {nullptr, 0, 0, 0, nullptr}};
  static char doc[] =
      "A C++ kernel, called with the fields of its argument struct by name, without the GIL.\n\n"
      "An address is a tensor, a number or None for null; a record (a tensor and its strides) is a tuple, or an address\n"
      "where prepare() has the strides. A field that a call leaves out is zero, unless declare() requires it. A name that is\n"
      "no field and a value of another kind raise TypeError, memory that is short MemoryError, std::invalid_argument\n"
      "ValueError. Returns the field that the kernel writes as its result, or None.";
  static PyType_Slot slots[] = {
      {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},        {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
      {Py_tp_methods, methods}, {Py_tp_members, members}, {Py_tp_getset, properties}, {Py_tp_doc, doc}, {0, nullptr}};
  static PyType_Spec spec = {"genfast.Kernel", int(sizeof(Kernel)), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL, slots};
  return reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
}

// Adds a kernel to a module; false, with a Python error, where that failed.
template <class Args>
bool add_kernel(PyObject* module, const char* name, void (*run)(const void*)) {
  static_assert(sizeof(Args) <= kMostBytes && std::is_trivially_copyable_v<Args>, "Args is too large or no plain struct");
  if (!kernel_type && !(kernel_type = make_kernel_type())) return false;
  Entry* entry = new Entry{name, fields_of<Args>(), sizeof(Args), run, 0, nullptr, {}};  // as long as the process
  for (size_t i = 0; i < entry->fields.size(); ++i) {
    if (entry->fields[i].pointer && !entry->fields[i].result) entry->pointers |= Mask(1) << i;
    if (entry->fields[i].result) entry->result = &entry->fields[i];
  }
  Kernel* kernel = make_kernel(entry, nullptr);
  if (!kernel) return false;
  const int added = PyModule_AddObjectRef(module, name, reinterpret_cast<PyObject*>(kernel));
  Py_DECREF(reinterpret_cast<PyObject*>(kernel));
  return !added;
}

}  // namespace
}  // namespace genfast
