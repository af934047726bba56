#include "framework/types.h"

#include "framework/codebooks.h"

namespace torch_int4 {

const NamedType kNamedTypes[] = {{"int4", WeightType::kInt4, nullptr},     {"int8", WeightType::kInt8, nullptr},
                                 {"int5", WeightType::kInt5, nullptr},     {"int6", WeightType::kInt6, nullptr},
                                 {"nf4", WeightType::kBook, &kNf4},        {"fp4", WeightType::kBook, &kFp4},
                                 {"bnb_fp4", WeightType::kBook, &kBnbFp4}, {"iq4_nl", WeightType::kBook, &kIq4Nl}};
const int kNamedTypeCount = int(sizeof kNamedTypes / sizeof *kNamedTypes);

const NamedType* find_type(const std::string& name) {
  for (const NamedType& known : kNamedTypes) {
    if (name == known.name) return &known;
  }
  return nullptr;
}

std::string type_names() {
  std::string text;
  for (const NamedType& known : kNamedTypes) text += (text.empty() ? "" : ", ") + std::string(known.name);
  return text;
}

}  // namespace torch_int4
