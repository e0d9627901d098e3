// fastllm._core.PackedMatrix: weight matrices in the packed layouts, made from files and arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/errors.h"
#include "core/argument_error.h"
#include "quant/packed.h"
#include "quant/panels.h"

namespace fastllm {

void register_packed(pybind11::module_& module);

namespace {

namespace py = pybind11;

// "float32 (3, 4)", as shown in errors.
std::string describe(const py::array& array) {
  return py::cast<std::string>(py::str(array.dtype())) + " " +
         py::cast<std::string>(py::str(array.attr("shape")));
}

bool has_dtype(const py::array& array, const char* name) { return array.dtype().equal(py::dtype(name)); }

void check_array(const py::array& array, const char* field, py::ssize_t ndim, bool right_dtype,
                 const std::string& dtypes) {
  if (array.ndim() == ndim && right_dtype && (array.flags() & py::array::c_style)) return;
  const std::string order = (array.flags() & py::array::c_style) ? "" : ", not C-contiguous";
  raise_request_error(field, describe(array) + order,
                      "a C-contiguous " + std::to_string(ndim) + "-D array of " + dtypes);
}

// A float32, float16 or uint16 (bf16) matrix; borrowed from the array.
FloatRows float_rows(const py::array& array) {
  const bool f32 = has_dtype(array, "float32"), f16 = has_dtype(array, "float16"),
             bf16 = has_dtype(array, "uint16");
  check_array(array, "array", 2, f32 || f16 || bf16, "float32, float16 or uint16 (bf16 bits)");
  return {f32 ? Codes::f32 : f16 ? Codes::f16 : Codes::bf16, array.data(), array.shape(0), array.shape(1)};
}

struct GgmlData {
  const std::uint8_t* bytes;
  std::size_t size;
};

GgmlData ggml_data(const py::array& data) {
  check_array(data, "data", 1, has_dtype(data, "uint8"), "uint8");
  return {static_cast<const std::uint8_t*>(data.data()), static_cast<std::size_t>(data.nbytes())};
}

PackedMatrix from_ggml(const std::string& dtype, const py::array& data, std::int64_t rows, std::int64_t cols,
                       const std::optional<py::array>& row_order) {
  const GgmlData source = ggml_data(data);
  const std::int32_t* order = nullptr;
  if (row_order) {
    check_array(*row_order, "row_order", 1, has_dtype(*row_order, "int32"), "int32");
    if (row_order->shape(0) != rows)
      raise_request_error("row_order", describe(*row_order), std::to_string(rows) + " entries, one per row");
    order = static_cast<const std::int32_t*>(row_order->data());
  }
  py::gil_scoped_release unlocked;
  return pack_ggml(dtype, source.bytes, source.size, rows, cols, order);
}

py::array_t<float> dequantize(const std::string& dtype, const py::array& data, std::int64_t rows,
                              std::int64_t cols) {
  const GgmlData source = ggml_data(data);
  check_ggml(dtype, source.size, rows, cols);  // before memory is asked for
  py::array_t<float> out({rows, cols});
  float* target = out.mutable_data();
  py::gil_scoped_release unlocked;
  dequantize_ggml(dtype, source.bytes, source.size, rows, cols, target);
  return out;
}

PackedMatrix from_float(const py::array& array, const std::string& dtype) {
  Codes target;
  if (dtype == "f32")
    target = Codes::f32;
  else if (dtype == "f16")
    target = Codes::f16;
  else if (dtype == "bf16")
    target = Codes::bf16;
  else
    throw ArgumentError("dtype", dtype, "f32, f16 or bf16");
  const FloatRows source = float_rows(array);
  py::gil_scoped_release unlocked;
  return pack_float(source, target);
}

PackedMatrix from_weights(const py::array& array, int bits, int group) {
  const FloatRows source = float_rows(array);
  py::gil_scoped_release unlocked;
  return quantize(source, bits, group);
}

py::array_t<float> unpacked(const PackedMatrix& matrix) {
  py::array_t<float> out({matrix.rows, matrix.cols});
  float* target = out.mutable_data();
  py::gil_scoped_release unlocked;
  unpack(matrix, target);
  return out;
}

// Read-only views of the planes, each kept alive by the matrix.
py::dict planes(const py::object& self) {
  const auto& matrix = self.cast<const PackedMatrix&>();
  py::dict out;
  const auto add = [&](const char* name, const AlignedBuffer& buffer) {
    if (!buffer) return;
    py::array_t<std::uint8_t> view(static_cast<py::ssize_t>(buffer.size()), buffer.as<std::uint8_t>(), self);
    view.attr("flags").attr("writeable") = false;
    out[name] = view;
  };
  add("codes", matrix.codes);
  add("extra", matrix.extra);
  add("scales", matrix.scales);
  add("subscales", matrix.subscales);
  add("mins", matrix.mins);
  add("submins", matrix.submins);
  return out;
}

py::object codebook(const PackedMatrix& matrix) {
  if (!matrix.has_codebook) return py::none();
  py::tuple out(16);
  for (std::size_t i = 0; i < 16; ++i) out[i] = static_cast<int>(matrix.codebook[i]);
  return out;
}

Codes integer_kind(const std::string& name) {
  for (const Codes kind : {Codes::u4, Codes::u5, Codes::u6, Codes::u8})
    if (name == codes_name(kind)) return kind;
  throw ArgumentError("kind", name, "u4, u5, u6 or u8");
}

// The inverse of planes(): everything is checked but the codes themselves, of which every value is valid.
PackedMatrix from_planes(const std::string& kind, std::int64_t rows, std::int64_t cols, int group, int zero,
                         const py::dict& planes, const std::optional<std::vector<int>>& codebook) {
  IntegerLayout layout{integer_kind(kind),      group,  zero, planes.contains("subscales"),
                       planes.contains("mins"), nullptr};
  check_shape(rows, cols);
  const std::int64_t kp = (cols + 31) / 32 * 32;
  if (group != 16 && group != 32 && group != 64 && group != 128 && group != kp)
    throw ArgumentError("group", std::to_string(group), "16, 32, 64, 128 or " + std::to_string(kp));
  if (zero < 0 || zero > 255 || (layout.mins && zero != 0) || (codebook && zero != 0))
    throw ArgumentError("zero", std::to_string(zero), "0 to 255; 0 with minimums or a codebook");
  std::int8_t values[16];
  if (codebook) {
    bool valid = codebook->size() == 16 && layout.kind == Codes::u4;
    for (std::size_t i = 0; valid && i < 16; ++i) {
      valid = (*codebook)[i] > -128 && (*codebook)[i] < 128;
      values[i] = static_cast<std::int8_t>((*codebook)[i]);
    }
    if (!valid) throw ArgumentError("codebook", kind, "16 values, -127 to 127, of a u4 matrix");
    layout.codebook = values;
  }
  PackedMatrix out = allocate_integers(rows, cols, layout);
  std::size_t known = 0;
  const auto fill = [&](const char* name, AlignedBuffer* buffer) {
    if (!*buffer) return;
    if (!planes.contains(name))
      throw ArgumentError("planes", "no " + std::string(name), "all planes of the layout");
    const py::object plane = planes[name];
    if (!py::isinstance<py::array>(plane))
      raise_request_error(name, py::cast<std::string>(py::type::of(plane).attr("__name__")),
                          "a C-contiguous 1-D array of uint8");
    const auto array = py::reinterpret_borrow<py::array>(plane);
    check_array(array, name, 1, has_dtype(array, "uint8"), "uint8");
    if (static_cast<std::size_t>(array.nbytes()) != buffer->size())
      throw ArgumentError(name, std::to_string(array.nbytes()) + " bytes",
                          std::to_string(buffer->size()) + " bytes");
    std::memcpy(buffer->as<std::uint8_t>(), array.data(), buffer->size());
    ++known;
  };
  fill("codes", &out.codes);
  fill("extra", &out.extra);
  fill("scales", &out.scales);
  fill("subscales", &out.subscales);
  fill("mins", &out.mins);
  fill("submins", &out.submins);
  if (known != planes.size())
    throw ArgumentError("planes", std::to_string(planes.size()) + " planes",
                        std::to_string(known) + " of them");
  return out;
}

std::string represent(const PackedMatrix& matrix) {
  return "<PackedMatrix " + std::to_string(matrix.rows) + " x " + std::to_string(matrix.cols) + ", " +
         matrix.layout() + ", " + std::to_string(matrix.nbytes()) + " bytes>";
}

}  // namespace

void register_packed(py::module_& module) {
  py::class_<PackedMatrix, std::shared_ptr<PackedMatrix>>(module, "PackedMatrix",
                                                          R"(A weight matrix (rows = outputs,
cols = inputs) in a packed layout that the kernels read. Immutable. Made by from_ggml, from_float or quantize,
each of which raises RequestError for arguments that do not fit and runs without the GIL.)")
      .def_static("from_ggml", &from_ggml, py::arg("dtype"), py::arg("data").noconvert(), py::arg("rows"),
                  py::arg("cols"), py::arg("row_order").noconvert() = py::none(),
                  R"(Packs a tensor of a GGUF file, without loss.

Args:
    dtype: the tensor type as GGUF spells it: "Q4_1", "Q6_K", "IQ4_XS", "BF16", ...
    data: uint8[nbytes], contiguous; the tensor's bytes, exactly rows whole rows. May be a read-only mapping.
    rows, cols: the shape, outermost first; cols a multiple of the type's block.
    row_order: int32[rows] or None; row i of the result is the file's row row_order[i].

Raises:
    RequestError: unknown dtype, wrong byte count, cols that are not whole blocks, an entry of row_order out
        of range.)")
      .def_static("from_float", &from_float, py::arg("array").noconvert(), py::arg("dtype"),
                  R"(Packs floating-point values.

Args:
    array: (rows, cols), C-contiguous: float32, float16, or uint16 holding bf16 bits.
    dtype: type of the packed values, "f32", "f16" or "bf16"; rounded to nearest even where it is narrower.

Raises:
    RequestError: another array or dtype, or a finite value beyond fp16's range with dtype "f16".)")
      .def_static("quantize", &from_weights, py::arg("array").noconvert(), py::arg("bits"), py::arg("group"),
                  R"(Quantizes floating-point weights.

Args:
    array: (rows, cols), C-contiguous: float32, float16, or uint16 holding bf16 bits.
    bits: 4 (codes 0..15 with an fp16 scale and an fp16 minimum per group, fitted for least squared error) or
        8 (codes -127..127 with an fp16 scale per group, largest magnitude / 127).
    group: columns per scale: 16, 32, 64 or 128, the last group of a row may be shorter; with 8 bits also 0, a
        scale per row.

Raises:
    RequestError: naming row and column of a weight that is not finite, or too large for an fp16 scale
        (magnitude above 65504 with 4 bits, 127 * 65504 with 8).)")
      .def("unpack", &unpacked,
           R"(The values, float32 (rows, cols): bit for bit what the disk format's own decoder gives.)")
      .def_property_readonly(
          "rows", [](const PackedMatrix& m) { return m.rows; }, "Outputs.")
      .def_property_readonly(
          "cols", [](const PackedMatrix& m) { return m.cols; }, "Inputs.")
      .def_property_readonly("nbytes", &PackedMatrix::nbytes, "Bytes of all planes, padding included.")
      .def_property_readonly(
          "group", [](const PackedMatrix& m) { return m.group; }, "Columns per scale; 0 for floating point.")
      .def_property_readonly(
          "kind", [](const PackedMatrix& m) { return codes_name(m.kind); },
          "How a value is stored: u4, u5, u6, u8, f16, bf16 or f32.")
      .def_property_readonly("layout", &PackedMatrix::layout,
                             "The layout in words, e.g. 'u4 g32 fp16 scale, fp16 min'.")
      .def_property_readonly(
          "zero", [](const PackedMatrix& m) { return m.zero; }, "Subtracted from a code before scaling.")
      .def_property_readonly("codebook", &codebook, "What the 16 codes stand for, or None: themselves.")
      .def("planes", &planes,
           R"(The planes as they lie in memory, see csrc/kernels/kernels.h: name to read-only uint8 array.)")
      .def_static("from_planes", &from_planes, py::arg("kind"), py::arg("rows"), py::arg("cols"),
                  py::arg("group"), py::arg("zero"), py::arg("planes"), py::arg("codebook") = py::none(),
                  R"(The matrix whose planes() these are; the bytes are copied.

Args:
    kind: u4, u5, u6 or u8.
    rows, cols, group, zero, codebook: as the properties of that name.
    planes: codes and scales; extra of u5 and u6; subscales, mins and submins of layouts that have them.

Raises:
    RequestError: a layout that there is not, a missing or unknown plane, or one of another size.)")
      .def("__repr__", &represent);

  module.def("dequantize_ggml", &dequantize, py::arg("dtype"), py::arg("data").noconvert(), py::arg("rows"),
             py::arg("cols"),
             R"(Decodes a tensor of a GGUF file to float32 (rows, cols), exactly as its format defines it.

Arguments and errors as those of PackedMatrix.from_ggml.)");
}

}  // namespace fastllm
