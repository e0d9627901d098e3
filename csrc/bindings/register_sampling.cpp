// The sampler on NumPy arrays, and the scalar functions beneath it and beneath the rotary tables.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "bindings/sample_arrays.h"
#include "core/math.h"
#include "dispatch.h"
#include "model/philox.h"
#include "model/sampler.h"

namespace fastllm {
namespace {

namespace py = pybind11;
using Doubles = py::array_t<double, py::array::c_style>;

const Kernels& table(const std::string& isa) { return isa.empty() ? kernels() : kernels_for(isa); }

py::dict sample(const py::object& logits, const py::object& batch, const std::string& isa) {
  Shapes shapes("sample");
  const float* x = shapes.in<float>(logits, "logits", {"R", "V"});
  const std::int64_t vocab = shapes["V"], rows = shapes["R"];
  if (vocab < 1 || vocab > INT32_MAX)
    shapes.fail("logits", Shapes::describe(logits), "1 to 2^31 - 1 columns");
  const SampleArrays arrays = read_sample_arrays(shapes, batch, vocab, INT32_MAX, SampleRow::kLogprob);
  std::int64_t most = 0;
  for (std::int64_t r = 0; r < rows; ++r) most = std::max<std::int64_t>(most, arrays.num_logprobs[r]);
  most = std::min(most, vocab);
  py::array_t<std::int32_t> tokens(rows), ranks(rows), top_ids({rows, most});
  py::array_t<float> logprobs(rows), top_logprobs({rows, most});
  std::fill_n(top_ids.mutable_data(), rows * most, -1);
  std::fill_n(top_logprobs.mutable_data(), rows * most, std::numeric_limits<float>::quiet_NaN());
  const Kernels& kernels = table(isa);
  SampleWorkspace workspace;
  for (std::int64_t r = 0; r < rows; ++r) {
    SampleOut out{};
    out.top_ids = top_ids.mutable_data() + r * most;
    out.top_logprobs = top_logprobs.mutable_data() + r * most;
    sample_row(kernels, x + r * vocab, vocab, arrays.row(r), workspace, out);
    tokens.mutable_data()[r] = out.token;
    ranks.mutable_data()[r] = out.rank;
    logprobs.mutable_data()[r] = out.logprob;
  }
  using namespace py::literals;
  return py::dict("tokens"_a = tokens, "logprob"_a = logprobs, "rank"_a = ranks, "top_ids"_a = top_ids,
                  "top_logprobs"_a = top_logprobs);
}

py::tuple logits_summary(const py::object& logits, const std::string& isa) {
  Shapes shapes("logits_summary");
  const float* x = shapes.in<float>(logits, "logits", {"V"});
  const std::int64_t n = shapes["V"];
  if (n < 1) shapes.fail("logits", Shapes::describe(logits), "at least one value");
  const Kernels& kernels = table(isa);
  const float highest = kernels.max_value(x, n);
  return py::make_tuple(highest, kernels.exp_sum(x, highest, n), kernels.argmax(x, n));
}

Doubles scalar_math(const std::string& name, const Doubles& x, double exponent) {
  Doubles out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  const double* in = x.data();
  double* to = out.mutable_data();
  for (py::ssize_t i = 0; i < x.size(); ++i) {
    double sine = 0, cosine = 0;
    if (name == "exp") {
      to[i] = exp_double(in[i]);
    } else if (name == "log") {
      to[i] = log_double(in[i]);
    } else if (name == "pow") {
      to[i] = pow_double(in[i], exponent);
    } else if (name == "sin" || name == "cos") {
      sincos_double(in[i], &sine, &cosine);
      to[i] = name == "sin" ? sine : cosine;
    } else {
      raise_request_error("scalar_math: name", name, "exp, log, pow, sin or cos");
    }
  }
  return out;
}

Doubles inverse_frequencies(double base, std::int64_t rotary, double linear_factor, const Doubles& factors) {
  if (rotary < 2 || rotary % 2 != 0 || rotary > 65536)
    raise_request_error("rope_inverse_frequencies: rotary", std::to_string(rotary),
                        "an even number from 2 to 65536");
  if (factors.size() != 0 && factors.size() != rotary / 2)
    raise_request_error("rope_inverse_frequencies: factors", std::to_string(factors.size()) + " values",
                        "none or rotary / 2 = " + std::to_string(rotary / 2));
  Doubles out(rotary / 2);
  rope_inverse_frequencies(base, rotary, linear_factor, factors.size() == 0 ? nullptr : factors.data(),
                           out.mutable_data());
  return out;
}

py::tuple tables(const Doubles& inverse_frequency, std::int64_t first_position, std::int64_t count) {
  if (first_position < 0 || count < 0 || first_position > (std::int64_t{1} << 40) ||
      count > (std::int64_t{1} << 40))
    raise_request_error("rope_tables: positions",
                        std::to_string(first_position) + " and " + std::to_string(count) + " more",
                        "numbers from 0 to 2^40");
  const std::int64_t n = inverse_frequency.size();
  const double last = static_cast<double>(std::max<std::int64_t>(first_position + count - 1, 0));
  for (std::int64_t j = 0; j < n; ++j) {
    const double angle = last * inverse_frequency.data()[j];
    if (!(angle >= -kSincosLimit && angle <= kSincosLimit))
      raise_request_error(
          "rope_tables: inverse_frequency", std::to_string(inverse_frequency.data()[j]),
          "angles of at most 2^21 radians at position " + std::to_string(first_position + count - 1));
  }
  py::array_t<float> cos({count, n}), sin({count, n});
  rope_tables(inverse_frequency.data(), n, first_position, count, cos.mutable_data(), sin.mutable_data());
  return py::make_tuple(cos, sin);
}

}  // namespace

void register_sampling(py::module_& module) {
  module.def(
      "sample", &sample, py::arg("logits"), py::arg("batch"), py::arg("isa") = "",
      R"(Samples a token, or looks up a given one, for each row; csrc/model/sampler.h tells in which order.

Args:
    logits: float32 (R, V), raw.
    batch: an object with the row attributes of StepBatch (row_kind ... history_prompt_len, and positions).
    isa: the instruction set to run on, "" for the one in use.

Returns:
    A dict: tokens int32 (R,) (-1: the row failed, its logits hold NaN or +infinity, or nothing can be
    chosen), logprob float32 (R,) and rank int32 (R,) where num_logprobs >= 0 or row_kind is 1 (else NaN and
    0), top_ids int32 and top_logprobs float32 (R, min(V, largest num_logprobs)), -1 and NaN past a row's own
    number.

Raises:
    RequestError: a wrong dtype, shape, offset, id or parameter.)");
  module.def("logits_summary", &logits_summary, py::arg("logits"), py::arg("isa") = "",
             "float32 (V,). Returns the maximum (NaN if any value is), the sum of exp(x - maximum), and the "
             "lowest index "
             "of the maximum.");
  module.def("philox", &philox4x32_10, py::arg("counter"), py::arg("key"),
             "Philox4x32-10 of a counter of four and a key of two 32-bit words, least significant first: "
             "four words.");
  module.def("sample_uniform", &sample_uniform, py::arg("seed"), py::arg("sample_index"), py::arg("position"),
             "The uniform number in [0, 1) that a sample with this key draws with, a multiple of 2^-53.");
  module.def("scalar_math", &scalar_math, py::arg("name"), py::arg("x"), py::arg("exponent") = 1.0,
             R"(exp, log, pow (to `exponent`), sin or cos of float64 values, the same bits on every machine.

Below one unit in the last place off; |x| <= 2^21 for sin and cos (NaN beyond), x > 0 for pow.)");
  module.def("rope_inverse_frequencies", &inverse_frequencies, py::arg("base"), py::arg("rotary"),
             py::arg("linear_factor") = 1.0, py::arg("factors") = Doubles(0),
             "base^(-2 i / rotary) / (linear_factor * factors[i]), float64 (rotary / 2,). factors: that "
             "many, or none.");
  module.def("rope_tables", &tables, py::arg("inverse_frequency"), py::arg("first_position"),
             py::arg("count"),
             R"(cos and sin of (first_position + i) * inverse_frequency[j]: float32 (count, frequencies) each.

Angles are float64 products, at most 2^21 radians; the values are rounded once, to float32.)");
}

}  // namespace fastllm
