// The extension module. Importing it loads the operators, which are reached through torch.ops; its own functions are
// loops over Python objects that every token waits for, and that take the interpreter several times as long.
#include <Python.h>

#include "framework/types.h"

namespace {

// Whether all arguments are lists, as long as the first; sets the exception that says so otherwise.
bool are_lists(PyObject* const* arguments, int count, const char* function) {
  for (int i = 0; i < count; ++i) {
    if (!PyList_Check(arguments[i]) || PyList_Size(arguments[i]) != PyList_Size(arguments[0])) {
      PyErr_Format(PyExc_TypeError, "torch_int4: %s takes lists of the same length", function);
      return false;
    }
  }
  return true;
}

PyObject* entries_are(PyObject*, PyObject* arguments) {
  PyObject* lists[3];
  if (!PyArg_ParseTuple(arguments, "OOO:entries_are", lists, lists + 1, lists + 2)) return nullptr;
  if (!are_lists(lists, 3, "entries_are")) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(lists[0]); ++i) {
    PyObject* owner = PyList_GetItem(lists[0], i);
    if (!PyDict_Check(owner)) return PyErr_Format(PyExc_TypeError, "torch_int4: entries_are looks into dicts");
    PyObject* found = PyDict_GetItemWithError(owner, PyList_GetItem(lists[1], i));
    if (!found && PyErr_Occurred()) return nullptr;
    if ((found ? found : Py_None) != PyList_GetItem(lists[2], i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// One list, because memory is the slow part: a dict, its keys and values, the next dict, and so on.
PyObject* contents_are(PyObject*, PyObject* arguments) {
  PyObject* list;
  if (!PyArg_ParseTuple(arguments, "O:contents_are", &list)) return nullptr;
  if (!are_lists(&list, 1, "contents_are")) return nullptr;
  const Py_ssize_t size = PyList_Size(list);
  for (Py_ssize_t i = 0; i < size;) {
    PyObject* owner = PyList_GetItem(list, i++);
    if (!PyDict_Check(owner)) Py_RETURN_FALSE;  // it was a key of the dict before, which has lost entries
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(owner, &at, &key, &value); i += 2) {
      if (i + 1 >= size || PyList_GetItem(list, i) != key || PyList_GetItem(list, i + 1) != value) Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

PyObject* types_are(PyObject*, PyObject* arguments) {
  PyObject* lists[2];
  if (!PyArg_ParseTuple(arguments, "OO:types_are", lists, lists + 1)) return nullptr;
  if (!are_lists(lists, 2, "types_are")) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(lists[0]); ++i) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(PyList_GetItem(lists[0], i)));
    if (type != PyList_GetItem(lists[1], i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* attributes_are(PyObject*, PyObject* arguments) {
  PyObject *objects, *name, *value;
  if (!PyArg_ParseTuple(arguments, "OOO:attributes_are", &objects, &name, &value)) return nullptr;
  if (!are_lists(&objects, 1, "attributes_are")) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_Size(objects); ++i) {
    PyObject* found = PyObject_GetAttr(PyList_GetItem(objects, i), name);
    if (!found) return nullptr;
    const bool same = found == value;
    Py_DECREF(found);
    if (!same) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// A row of the table of weight types; a code book takes the place of the zero point.
PyObject* describe(const torch_int4::NamedType& named) {
  const int bits = torch_int4::code_bits(named.type), bytes = torch_int4::slab_bytes(named.type);
  if (!named.book) return Py_BuildValue("siiiO", named.name, bits, bytes, torch_int4::zero_point(named.type), Py_None);
  PyObject* values = PyTuple_New(1 << bits);
  if (!values) return nullptr;
  for (int i = 0; i < 1 << bits; ++i) {
    PyObject* value = PyFloat_FromDouble(double(named.book->values[i]));
    if (!value || PyTuple_SetItem(values, i, value)) {
      Py_DECREF(values);
      return nullptr;
    }
  }
  return Py_BuildValue("siiON", named.name, bits, bytes, Py_None, values);
}

PyObject* weight_types(PyObject*, PyObject*) {
  PyObject* rows = PyTuple_New(torch_int4::kNamedTypeCount);
  for (int i = 0; rows && i < torch_int4::kNamedTypeCount; ++i) {
    PyObject* row = describe(torch_int4::kNamedTypes[i]);
    if (!row || PyTuple_SetItem(rows, i, row)) {
      Py_DECREF(rows);
      return nullptr;
    }
  }
  return rows;
}

PyObject* record_kinds(PyObject*, PyObject*) {
  using namespace torch_int4;
  return Py_BuildValue("((iiO)(iiO)(iiO))", record_bytes(Offset::kTwoLevel), kSlab, Py_True,
                       record_bytes(Offset::kTwoLevelScale), kSlab, Py_False, record_bytes(Offset::kTwoLevelHalves),
                       kHalf, Py_False);
}

PyMethodDef functions[] = {
    {"weight_types", weight_types, METH_NOARGS,
     "weight_types()\n--\n\n"
     "The table of weight types: a tuple of (name, bits of a code, bytes of a slab of a panel, zero point or None, "
     "values of the code book or None)."},
    {"record_kinds", record_kinds, METH_NOARGS,
     "record_kinds()\n--\n\n"
     "The kinds of scales of two levels: a tuple of (bytes of a record, inputs of a group, whether it holds offsets)."},
    {"entries_are", entries_are, METH_VARARGS,
     "entries_are(dicts, keys, values)\n--\n\n"
     "Whether dicts[i].get(keys[i]) is values[i] for all i; arguments are lists of the same length."},
    {"contents_are", contents_are, METH_VARARGS,
     "contents_are(contents)\n--\n\n"
     "Whether dicts hold these very keys and values in this order, and no others: [dict, key, value, ..., dict, ...]."},
    {"types_are", types_are, METH_VARARGS,
     "types_are(objects, types)\n--\n\nWhether type(objects[i]) is types[i] for all i; lists of the same length."},
    {"attributes_are", attributes_are, METH_VARARGS,
     "attributes_are(objects, name, value)\n--\n\n"
     "Whether getattr(object, name) is value for all objects of a list."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  PyObject* module = PyModule_Create(&definition);
  if (!module || PyModule_AddIntConstant(module, "PANEL_ROWS", torch_int4::kPanelRows) ||
      PyModule_AddIntConstant(module, "LINE_BYTES", torch_int4::kLineBytes) ||
      PyModule_AddIntConstant(module, "SLAB", torch_int4::kSlab) ||
      PyModule_AddIntConstant(module, "RECORD_INPUTS", torch_int4::kRecordInputs)) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
