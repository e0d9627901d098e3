#include "bindings/sample_arrays.h"

#include <string>

namespace fastllm {
namespace {

namespace py = pybind11;

template <typename T, typename Accepts>
void check_each(const Shapes& shapes, const char* name, const T* values, std::int64_t n, Accepts accepts,
                const char* wanted) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (!accepts(values[i]))
      shapes.fail(name, std::to_string(values[i]) + " at index " + std::to_string(i), wanted);
  }
}

void check_range(const Shapes& shapes, const char* name, const std::int32_t* values, std::int64_t n,
                 std::int64_t low, std::int64_t high) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (values[i] < low || values[i] > high)
      shapes.fail(name, std::to_string(values[i]) + " at index " + std::to_string(i),
                  "values from " + std::to_string(low) + " to " + std::to_string(high));
  }
}

}  // namespace

void check_offsets(const Shapes& shapes, const char* name, const std::int32_t* start, std::int64_t rows,
                   std::int64_t entries) {
  bool right = start[0] == 0 && start[rows] == entries;
  for (std::int64_t r = 0; r < rows; ++r) right = right && start[r] <= start[r + 1];
  if (!right)
    shapes.fail(name, "offsets that do not", "ascending offsets from 0 to " + std::to_string(entries));
}

SampleArrays read_sample_arrays(Shapes& shapes, const py::handle& batch, std::int64_t vocab,
                                std::int32_t max_logprobs, SampleRow::Kind last_kind) {
  const auto ints = [&](const char* name, const char* size) {
    return shapes.in<std::int32_t>(batch.attr(name), name, {size});
  };
  const auto floats = [&](const char* name, const char* size = "R") {
    return shapes.in<float>(batch.attr(name), name, {size});
  };
  SampleArrays a{};
  a.kind = ints("row_kind", "R");
  a.rows = shapes["R"];
  shapes.let("R+1", a.rows + 1);
  a.target = ints("row_target", "R");
  a.num_logprobs = ints("num_logprobs", "R");
  a.temperature = floats("temperature");
  a.top_k = ints("top_k", "R");
  a.top_p = floats("top_p");
  a.min_p = floats("min_p");
  a.presence = floats("presence");
  a.frequency = floats("frequency");
  a.repetition = floats("repetition");
  a.seed = shapes.in<std::uint64_t>(batch.attr("seed"), "seed", {"R"});
  a.sample_index = ints("sample_index", "R");
  a.row_token = ints("row_token", "R");
  a.positions = ints("positions", "T");
  a.bias_start = ints("bias_start", "R+1");
  a.bias_ids = ints("bias_ids", "B");
  a.bias_values = floats("bias_values", "B");
  a.banned_start = ints("banned_start", "R+1");
  a.banned_ids = ints("banned_ids", "X");
  a.mask_row = ints("mask_row", "R");
  const py::object words = batch.attr("mask_words");
  a.mask_words = shapes.in<std::uint32_t>(words, "mask_words", {"M", "W"});
  a.mask_width = (vocab + 31) / 32;
  if (shapes["M"] > 0 && shapes["W"] != a.mask_width)
    shapes.fail("mask_words", Shapes::describe(words),
                "rows of ceil(V / 32) = " + std::to_string(a.mask_width));
  a.history_start = ints("history_start", "R+1");
  a.history = ints("history", "H");
  a.history_prompt_len = ints("history_prompt_len", "R");

  const std::int64_t rows = a.rows, last = vocab - 1;
  check_range(shapes, "row_kind", a.kind, rows, SampleRow::kSample, last_kind);
  check_range(shapes, "num_logprobs", a.num_logprobs, rows, -1, max_logprobs);
  check_range(shapes, "row_token", a.row_token, rows, 0, shapes["T"] - 1);
  check_offsets(shapes, "bias_start", a.bias_start, rows, shapes["B"]);
  check_offsets(shapes, "banned_start", a.banned_start, rows, shapes["X"]);
  check_offsets(shapes, "history_start", a.history_start, rows, shapes["H"]);
  check_range(shapes, "bias_ids", a.bias_ids, shapes["B"], 0, last);
  check_range(shapes, "banned_ids", a.banned_ids, shapes["X"], 0, last);
  check_range(shapes, "mask_row", a.mask_row, rows, -1, shapes["M"] - 1);
  check_range(shapes, "history", a.history, shapes["H"], 0, last);
  for (std::int64_t r = 0; r < rows; ++r) {
    if (a.kind[r] == SampleRow::kLogprob && (a.target[r] < 0 || a.target[r] > last))
      shapes.fail("row_target", std::to_string(a.target[r]) + " at index " + std::to_string(r),
                  "a token from 0 to " + std::to_string(last) + " where row_kind is 1");
    if (a.kind[r] == SampleRow::kLogprob && a.mask_row[r] != -1)
      shapes.fail("mask_row", std::to_string(a.mask_row[r]) + " at index " + std::to_string(r),
                  "-1 where row_kind is 1");
    const std::int64_t length = a.history_start[r + 1] - a.history_start[r];
    if (a.history_prompt_len[r] < 0 || (length > 0 && a.history_prompt_len[r] > length))
      shapes.fail("history_prompt_len",
                  std::to_string(a.history_prompt_len[r]) + " at index " + std::to_string(r),
                  "at most the row's history of " + std::to_string(length));
  }
  const auto finite = [](float v) { return v - v == 0.0f; };
  check_each(
      shapes, "temperature", a.temperature, rows, [&](float v) { return finite(v) && v >= 0; },
      "finite values of at least 0");
  check_range(shapes, "top_k", a.top_k, rows, 0, INT32_MAX);
  check_each(
      shapes, "top_p", a.top_p, rows, [](float v) { return v > 0 && v <= 1; }, "values above 0, at most 1");
  check_each(shapes, "min_p", a.min_p, rows, [](float v) { return v >= 0 && v <= 1; }, "values from 0 to 1");
  check_each(shapes, "presence", a.presence, rows, finite, "finite values");
  check_each(shapes, "frequency", a.frequency, rows, finite, "finite values");
  check_each(
      shapes, "repetition", a.repetition, rows, [&](float v) { return finite(v) && v > 0; },
      "finite values above 0");
  return a;
}

}  // namespace fastllm
