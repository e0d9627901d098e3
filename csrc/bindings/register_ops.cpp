// The kernels on NumPy arrays, for tests and for people who want only them (fastllm.ops is their public
// face). Each takes `isa`, the instruction set to run on, "" for the one in use.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <memory>
#include <mutex>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "core/memory.h"
#include "core/thread_pool.h"
#include "dispatch.h"
#include "quant/packed.h"

namespace fastllm {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float>;

const Kernels& table(const std::string& isa) { return isa.empty() ? kernels() : kernels_for(isa); }

// One pool per thread count, made when first asked for.
ThreadPool& pool_of(int threads) {
  static std::mutex mutex;
  static auto& pools = *new std::map<int, std::unique_ptr<ThreadPool>>;
  const std::lock_guard<std::mutex> lock(mutex);
  const int count = threads > 0 ? threads : available_processors();
  std::unique_ptr<ThreadPool>& pool = pools[count];
  if (!pool) pool = std::make_unique<ThreadPool>(count);
  return *pool;
}

void check_threads(int threads) {
  if (threads < 0 || threads > 1024)
    raise_request_error("threads", std::to_string(threads), "0 (all) to 1024");
}

// Quantized activations in one allocation.
struct QuantizedBuffer {
  QuantizedRows rows{};
  AlignedBuffer q, scale, sums, fsums;

  QuantizedBuffer(std::int64_t m, std::int64_t k) {
    const std::int64_t kp = (k + 31) / 32 * 32;
    const auto n = static_cast<std::size_t>(m * kp);
    q = AlignedBuffer(n);
    const std::size_t words = n / kActivationGroup * 4;
    scale = AlignedBuffer(words);
    sums = AlignedBuffer(words);
    fsums = AlignedBuffer(words);
    rows = {q.as<std::int8_t>(), scale.as<float>(), sums.as<std::int32_t>(), fsums.as<float>(), kp};
  }
};

py::tuple quantize_rows(const py::object& x, const std::string& isa) {
  Shapes shapes("quantize_rows");
  const float* in = shapes.in<float>(x, "x", {"M", "K"});
  const std::int64_t m = shapes["M"], k = shapes["K"];
  const Kernels& kernels = table(isa);
  QuantizedBuffer buffer(m, k);
  kernels.quantize_rows(in, k, m, k, &buffer.rows);
  const std::int64_t kp = buffer.rows.kp;
  py::array_t<std::int8_t> q({m, kp});
  Floats scale({m, kp / kActivationGroup});
  std::memcpy(q.mutable_data(), buffer.rows.q, static_cast<std::size_t>(m * kp));
  std::memcpy(scale.mutable_data(), buffer.rows.scale,
              static_cast<std::size_t>(m * kp / kActivationGroup) * 4);
  return py::make_tuple(q, scale);
}

Floats matmul(const py::object& x, const PackedMatrix& w, const py::object& residual, const std::string& isa,
              int threads) {
  Shapes shapes("matmul");
  shapes.let("K", w.cols).let("N", w.rows);
  const float* in = shapes.in<float>(x, "x", {"M", "K"});
  const float* start = residual.is_none() ? nullptr : shapes.in<float>(residual, "residual", {"M", "N"});
  check_threads(threads);
  const std::int64_t m = shapes["M"], k = w.cols, n = w.rows;
  const Kernels& kernels = table(isa);
  Floats result({m, n});
  float* y = result.mutable_data();
  if (m == 0) return result;
  const py::gil_scoped_release unlocked;
  if (start != nullptr) std::memcpy(y, start, static_cast<std::size_t>(m * n) * sizeof(float));
  const PackedView view = w.view();
  ThreadPool& pool = pool_of(threads);
  const QuantizedBuffer quantized(w.quantized() ? m : 0, k);
  pool.run([&](Team& team, int) {
    AlignedBuffer scratch;
    if (w.quantized()) {
      scratch = AlignedBuffer(static_cast<std::size_t>(matmul_scratch_bytes(&view)));
      team.for_each(m, 4, [&](std::int64_t begin, std::int64_t end) {
        const QuantizedRows part = quantized.rows.from_row(begin);
        kernels.quantize_rows(in + begin * k, k, end - begin, k, &part);
      });
    }
    team.for_each(w.panels(), 4, [&](std::int64_t begin, std::int64_t end) {
      if (w.quantized()) {
        kernels.matmul_q(&view, &quantized.rows, m, begin, end, y, n, start != nullptr, scratch.as<void>(),
                         nullptr);
      } else {
        kernels.matmul_f(&view, in, k, m, begin, end, y, n, start != nullptr);
      }
    });
  });
  return result;
}

Floats low_rank(const py::object& x, const py::object& a, float scale, const std::string& isa) {
  Shapes shapes("low_rank");
  const float* in = shapes.in<float>(x, "x", {"M", "K"});
  const float* rows = shapes.in<float>(a, "a", {"R", "K"});
  const std::int64_t m = shapes["M"], k = shapes["K"], r = shapes["R"];
  Floats result({m, r});
  table(isa).low_rank(rows, r, in, k, m, k, scale, result.mutable_data(), r);
  return result;
}

Floats embedding(const PackedMatrix& w, const py::object& ids, const std::string& isa) {
  Shapes shapes("embedding");
  const std::int32_t* rows = shapes.in<std::int32_t>(ids, "ids", {"T"});
  const std::int64_t count = shapes["T"];
  for (std::int64_t t = 0; t < count; ++t)
    if (rows[t] < 0 || rows[t] >= w.rows)
      shapes.fail("ids", std::to_string(rows[t]), "values from 0 to " + std::to_string(w.rows - 1));
  const Kernels& kernels = table(isa);
  Floats result({count, w.cols});
  const PackedView view = w.view();
  for (std::int64_t t = 0; t < count; ++t)
    kernels.unpack_row(&view, rows[t], result.mutable_data() + t * w.cols);
  return result;
}

Floats rms_norm(const py::object& x, const py::object& weight, float eps, const std::string& isa) {
  Shapes shapes("rms_norm");
  const float* in = shapes.in<float>(x, "x", {"M", "D"});
  const float* w = shapes.in<float>(weight, "weight", {"D"});
  const std::int64_t m = shapes["M"], d = shapes["D"];
  Floats y({m, d});
  table(isa).rms_norm(in, d, w, eps, m, d, y.mutable_data(), d);
  return y;
}

Floats layer_norm(const py::object& x, const py::object& weight, const py::object& bias, float eps,
                  const std::string& isa) {
  Shapes shapes("layer_norm");
  const float* in = shapes.in<float>(x, "x", {"M", "D"});
  const float* w = shapes.in<float>(weight, "weight", {"D"});
  const float* b = bias.is_none() ? nullptr : shapes.in<float>(bias, "bias", {"D"});
  const std::int64_t m = shapes["M"], d = shapes["D"];
  Floats y({m, d});
  table(isa).layer_norm(in, d, w, b, eps, m, d, y.mutable_data(), d);
  return y;
}

Floats rope(const py::object& x, const py::object& cos, const py::object& sin, const std::string& isa) {
  Shapes shapes("rope");
  const float* in = shapes.in<float>(x, "x", {"T", "H", "D"});
  const float* c = shapes.in<float>(cos, "cos", {"T", "R/2"});
  const float* s = shapes.in<float>(sin, "sin", {"T", "R/2"});
  const std::int64_t t = shapes["T"], h = shapes["H"], d = shapes["D"], half = shapes["R/2"];
  if (2 * half > d)
    shapes.fail("cos", Shapes::describe(cos), "at most D/2 = " + std::to_string(d / 2) + " pairs");
  Floats y({t, h, d});
  std::memcpy(y.mutable_data(), in, static_cast<std::size_t>(t * h * d) * sizeof(float));
  table(isa).rope(y.mutable_data(), h * d, t, h, d, 2 * half, c, s);
  return y;
}

using Gate = void (*Kernels::*)(const float*, const float*, float*, std::int64_t);

Floats gated(const char* name, Gate op, const py::object& a, const py::object& b, const std::string& isa) {
  Shapes shapes(name);
  const float* x = shapes.in<float>(a, "a", {"M", "N"});
  const float* y = shapes.in<float>(b, "b", {"M", "N"});
  const std::int64_t m = shapes["M"], n = shapes["N"];
  Floats out({m, n});
  (table(isa).*op)(x, y, out.mutable_data(), m * n);
  return out;
}

Floats exp_values(const py::object& x, const std::string& isa) {
  Shapes shapes("exp");
  const float* in = shapes.in<float>(x, "x", {"N"});
  Floats out(std::vector<py::ssize_t>{shapes["N"]});
  table(isa).exp(in, out.mutable_data(), shapes["N"]);
  return out;
}

Floats softcap(const py::object& x, float cap, const std::string& isa) {
  Shapes shapes("softcap");
  const float* in = shapes.in<float>(x, "x", {"N"});
  const std::int64_t n = shapes["N"];
  if (!(cap > 0)) shapes.fail("cap", std::to_string(cap), "a number above 0");
  Floats out(std::vector<py::ssize_t>{n});
  std::memcpy(out.mutable_data(), in, static_cast<std::size_t>(n) * sizeof(float));
  table(isa).softcap(out.mutable_data(), cap, n);
  return out;
}

Floats hadamard(const py::object& x, const std::string& isa) {
  Shapes shapes("hadamard");
  const float* in = shapes.in<float>(x, "x", {"M", "N"});
  const std::int64_t m = shapes["M"], n = shapes["N"];
  if (n % 16 != 0) shapes.fail("x", std::to_string(n) + " columns", "a multiple of 16");
  Floats out({m, n});
  table(isa).hadamard(in, m, n, out.mutable_data());
  return out;
}

}  // namespace

void register_ops(py::module_& module) {
  module.def(
      "quantize_rows", &quantize_rows, py::arg("x"), py::arg("isa") = "",
      "x: float32 (M, K). Returns int8 (M, kp) and float32 scales (M, kp/16), kp = K rounded up to 32.");
  module.def("matmul", &matmul, py::arg("x"), py::arg("w"), py::arg("residual") = py::none(),
             py::arg("isa") = "", py::arg("threads") = 0,
             "x: float32 (M, K); w: PackedMatrix (N, K); residual: float32 (M, N) or None. Returns x w^T + "
             "residual.");
  module.def(
      "low_rank", &low_rank, py::arg("x"), py::arg("a"), py::arg("scale"), py::arg("isa") = "",
      "scale * x a^T, the first product of a low-rank adapter. x: float32 (M, K), a: float32 (R, K). Returns "
      "float32 (M, R).");
  module.def("embedding", &embedding, py::arg("w"), py::arg("ids"), py::arg("isa") = "",
             "Rows ids (int32 (T,)) of w (N, K), exactly as their format decodes them: float32 (T, K).");
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("isa") = "",
             "x / sqrt(mean(x^2) + eps) * weight for each row. x: float32 (M, D), weight: (D,).");
  module.def("layer_norm", &layer_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
             py::arg("isa") = "",
             "(x - mean) / sqrt(var + eps) * weight + bias for each row. x: float32 (M, D).");
  module.def("rope", &rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("isa") = "",
             "Rotates pairs (i, i + R/2) of each head. x: float32 (T, H, D); cos, sin: (T, R/2), R <= D.");
  module.def(
      "silu_mul",
      [](const py::object& a, const py::object& b, const std::string& isa) {
        return gated("silu_mul", &Kernels::silu_mul, a, b, isa);
      },
      py::arg("gate"), py::arg("up"), py::arg("isa") = "", "silu(gate) * up, float32 (M, N) each.");
  module.def(
      "gelu_tanh_mul",
      [](const py::object& a, const py::object& b, const std::string& isa) {
        return gated("gelu_tanh_mul", &Kernels::gelu_tanh_mul, a, b, isa);
      },
      py::arg("gate"), py::arg("up"), py::arg("isa") = "", "gelu_tanh(gate) * up, float32 (M, N) each.");
  module.def("exp", &exp_values, py::arg("x"), py::arg("isa") = "",
             "exp of float32 (N,) to about one unit in the last place.");
  module.def("softcap", &softcap, py::arg("x"), py::arg("cap"), py::arg("isa") = "",
             "cap * tanh(x / cap), float32 (N,).");
  module.def(
      "hadamard", &hadamard, py::arg("x"), py::arg("isa") = "",
      "H x for each row of float32 (M, N): the orthonormal Hadamard matrix of order S, the greatest power "
      "of two that divides N, block by block. N a multiple of 16.");
}

}  // namespace fastllm
