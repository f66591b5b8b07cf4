// Names every field of an argument struct once, for the kernels and for Python:
//
//   struct PixelNormArgs {
//     GENFAST_FIELDS(
//         (bool, is_double)
//         (View, x, grad)  // a type, then the fields that have it
//     )
//   };
//
// declares `bool is_double; View x, grad;` and a member function that hands "is_double" and the field, then "x, grad" and
// these two fields, to a visitor. kernel_type.h makes of it the table by which Python fills the struct.
#pragma once

namespace genfast {

// A field that the kernel writes and that Python gets back from the call, zero until then.
template <class T>
struct Result {
  T* address;
  T& operator*() const { return *address; }
};

template <class T>
using Same = T;  // so that one pointer or array type declares several fields

}  // namespace genfast

// Two macros that name each other in turn walk along (...)(...)(...), and the last one's name ends in nothing.
#define GENFAST_MEMBERS_A(type, ...) ::genfast::Same<type> __VA_ARGS__; GENFAST_MEMBERS_B
#define GENFAST_MEMBERS_B(type, ...) ::genfast::Same<type> __VA_ARGS__; GENFAST_MEMBERS_A
#define GENFAST_MEMBERS_A_END
#define GENFAST_MEMBERS_B_END
#define GENFAST_VISITS_A(type, ...) visit(#__VA_ARGS__, __VA_ARGS__); GENFAST_VISITS_B
#define GENFAST_VISITS_B(type, ...) visit(#__VA_ARGS__, __VA_ARGS__); GENFAST_VISITS_A
#define GENFAST_VISITS_A_END
#define GENFAST_VISITS_B_END
#define GENFAST_END(...) GENFAST_END_(__VA_ARGS__)
#define GENFAST_END_(...) __VA_ARGS__##_END
#define GENFAST_FIELDS(...)                      \
  GENFAST_END(GENFAST_MEMBERS_A __VA_ARGS__)     \
  template <class Visitor>                       \
  void visit_fields(Visitor& visit) const {      \
    GENFAST_END(GENFAST_VISITS_A __VA_ARGS__)    \
  }
