// The table of weight types: the names by which users and files choose one. Python reads it too (torch_int4._C).
#pragma once
#include <string>

#include "kernels/kernel.h"

namespace torch_int4 {

struct NamedType {
  const char* name;
  WeightType type;
  const Codebook* book;  // of kBook, else null
};

// Code books keep their order among themselves, which files refer to: append only.
extern const NamedType kNamedTypes[];
extern const int kNamedTypeCount;

// Null for a name that is not in the table.
const NamedType* find_type(const std::string& name);

// All names, for messages: "int4, int8, ...".
std::string type_names();

}  // namespace torch_int4
