// Paged attention on NumPy arrays: a cache of one layer, and attention of a flat batch over it, on one
// thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "core/math.h"
#include "core/memory.h"
#include "dispatch.h"
#include "kernels/attention.h"
#include "quant/half.h"

namespace fastllm {
namespace {

namespace py = pybind11;
using Floats = py::array_t<float>;

const Kernels& table(const std::string& isa) { return isa.empty() ? kernels() : kernels_for(isa); }

KvType kv_type(const std::string& name) {
  if (name == "f32") return KvType::f32;
  if (name == "f16") return KvType::f16;
  if (name == "bf16") return KvType::bf16;
  if (name == "i16") return KvType::i16;
  if (name == "i8") return KvType::i8;
  raise_request_error("KvCache: dtype", name, "f32, f16, bf16, i16 or i8");
}

void check_size(const char* field, std::int64_t value, std::int64_t low, std::int64_t high,
                std::int64_t step) {
  if (value >= low && value <= high && value % step == 0) return;
  raise_request_error(field, std::to_string(value),
                      (step > 1 ? "a multiple of " + std::to_string(step) : std::string("a number")) +
                          " from " + std::to_string(low) + " to " + std::to_string(high));
}

class KvCache {
 public:
  KvCache(std::int64_t blocks, std::int64_t kv_heads, std::int64_t head_dim, std::int64_t block_size,
          const std::string& dtype)
      : blocks_(blocks), type_(kv_type(dtype)) {
    check_size("KvCache: blocks", blocks, 1, std::int64_t{1} << 24, 1);
    check_size("KvCache: kv_heads", kv_heads, 1, 1024, 1);
    check_size("KvCache: head_dim", head_dim, 16, 256, 16);
    check_size("KvCache: block_size", block_size, 16, kKvTile, 16);
    const std::int64_t groups = ceil_div(blocks, kBlocksTogether);
    const std::int64_t tokens = groups * kv_group_stride(1, kv_heads) * block_size;  // at most 2^40
    const auto bytes = static_cast<std::size_t>(tokens * head_dim * kv_value_bytes(type_));
    k_ = AlignedBuffer(bytes);
    v_ = AlignedBuffer(bytes);
    if (kv_has_scales(type_)) {
      k_scale_ = AlignedBuffer(static_cast<std::size_t>(tokens) * sizeof(float));
      v_scale_ = AlignedBuffer(static_cast<std::size_t>(tokens) * sizeof(float));
    }
    view_ = {k_.as<void>(),
             v_.as<void>(),
             k_scale_.as<float>(),
             v_scale_.as<float>(),
             kv_group_stride(1, kv_heads),
             static_cast<std::int32_t>(kv_heads),
             static_cast<std::int32_t>(head_dim),
             static_cast<std::int32_t>(block_size),
             type_};
  }
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvView& view() const { return view_; }
  std::int64_t blocks() const { return blocks_; }

  void write(const py::object& k, const py::object& v, const py::object& slots, const std::string& isa) {
    Shapes shapes = sized("KvCache.write");
    const float* keys = shapes.in<float>(k, "k", {"T", "Hkv", "D"});
    const float* values = shapes.in<float>(v, "v", {"T", "Hkv", "D"});
    const std::int32_t* places = checked_slots(shapes, slots);
    const std::int64_t row = static_cast<std::int64_t>(view_.kv_heads) * view_.head_dim;
    table(isa).kv_write(&view_, keys, row, values, row, shapes["T"], places);
  }

  py::tuple read(const py::object& slots) const {
    Shapes shapes = sized("KvCache.read");
    const std::int32_t* places = checked_slots(shapes, slots);
    const std::int64_t count = shapes["T"], heads = view_.kv_heads, dim = view_.head_dim,
                       size = view_.block_size;
    Floats k({count, heads, dim}), v({count, heads, dim});
    for (std::int64_t t = 0; t < count; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t offset = places[t] % size;
        const std::int64_t start = kv_block(&view_, h, places[t] / size) * size;
        for (std::int64_t d = 0; d < dim; ++d) {
          const std::int64_t at = (t * heads + h) * dim + d;
          if (kv_has_scales(type_)) {
            const std::int64_t word = 4 / kv_value_bytes(type_);
            const std::int64_t in_k =
                (start + offset / 16 * 16) * dim + (d / word * 16 + offset % 16) * word + d % word;
            const std::int64_t in_v = (start + offset / word * word) * dim + d * word + offset % word;
            k.mutable_data()[at] = view_.k_scale[start + offset] * static_cast<float>(k_code(in_k));
            v.mutable_data()[at] = view_.v_scale[start + offset] * static_cast<float>(v_code(in_v));
            continue;
          }
          k.mutable_data()[at] = value(k_, (start + offset / 16 * 16) * dim + d * 16 + offset % 16);
          v.mutable_data()[at] = value(v_, (start + offset) * dim + d);
        }
      }
    }
    if (type_ == KvType::i8) {
      for (Floats* rotated : {&k, &v})
        kernels().hadamard(rotated->data(), count * heads, dim, rotated->mutable_data());
    }
    return py::make_tuple(k, v);
  }

  // Every byte 0xff: NaN in the floating types, and in the scales of the integer ones.
  void poison() {
    for (AlignedBuffer* buffer : {&k_, &v_, &k_scale_, &v_scale_})
      if (buffer->size() != 0) std::memset(buffer->as<void>(), 0xff, buffer->size());
  }

 private:
  Shapes sized(const char* call) const {
    Shapes shapes(call);
    shapes.let("Hkv", view_.kv_heads).let("D", view_.head_dim);
    return shapes;
  }

  const std::int32_t* checked_slots(Shapes& shapes, const py::object& slots) const {
    const std::int32_t* places = shapes.in<std::int32_t>(slots, "slots", {"T"});
    const std::int64_t limit = blocks_ * view_.block_size;
    for (std::int64_t t = 0; t < shapes["T"]; ++t) {
      if (places[t] < 0 || places[t] >= limit)
        shapes.fail("slots", std::to_string(places[t]), "values from 0 to " + std::to_string(limit - 1));
    }
    return places;
  }

  int k_code(std::int64_t at) const {
    return type_ == KvType::i16 ? k_.as<std::int16_t>()[at] : k_.as<std::uint8_t>()[at] - 128;
  }
  int v_code(std::int64_t at) const {
    return type_ == KvType::i16 ? v_.as<std::int16_t>()[at] : v_.as<std::int8_t>()[at];
  }
  // Of a floating-point cache.
  float value(const AlignedBuffer& buffer, std::int64_t index) const {
    if (type_ == KvType::f32) return buffer.as<float>()[index];
    if (type_ == KvType::f16) return half_to_float(buffer.as<std::uint16_t>()[index]);
    const std::uint32_t bits = static_cast<std::uint32_t>(buffer.as<std::uint16_t>()[index]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  std::int64_t blocks_;
  KvType type_;
  AlignedBuffer k_, v_, k_scale_, v_scale_;
  KvView view_{};
};

// Runs one task, whole or in pieces of `split` tiles.
void run_task(const Kernels& kernels, const KvView& kv, const AttentionTask& task, std::int64_t split,
              std::vector<float>& scratch, std::vector<float>& partials) {
  scratch.resize(static_cast<std::size_t>(attention_scratch_floats(task.group, kv.head_dim, task.queries)));
  if (split == 0) {
    kernels.attention(&kv, &task, scratch.data());
    return;
  }
  const std::int64_t begin = attention_tile_begin(&task), end = attention_tile_end(&task);
  const std::int64_t tile_floats =
      static_cast<std::int64_t>(task.queries) * task.group * attention_record_floats(kv.head_dim);
  partials.resize(static_cast<std::size_t>((end - begin) * tile_floats));
  for (std::int64_t tile = begin; tile < end; tile += split) {
    const std::int64_t stop = std::min(tile + split, end);
    kernels.attention_tiles(&kv, &task, tile, stop, partials.data() + (tile - begin) * tile_floats,
                            scratch.data());
  }
  kernels.attention_merge(&kv, &task, end - begin, tile_floats, partials.data());
}

Floats paged_attention(const KvCache& cache, const py::object& q, const py::object& query_start,
                       const py::object& seq_lens, const py::object& block_tables, const py::object& scale,
                       std::int64_t window, float softcap, const std::string& isa, std::int64_t split,
                       std::int64_t queries_at_once) {
  const KvView& kv = cache.view();
  Shapes shapes("paged_attention");
  shapes.let("D", kv.head_dim);
  const float* in = shapes.in<float>(q, "q", {"T", "H", "D"});
  const std::int32_t* lengths = shapes.in<std::int32_t>(seq_lens, "seq_lens", {"S"});
  const std::int64_t tokens = shapes["T"], heads = shapes["H"], sequences = shapes["S"];
  shapes.let("S+1", sequences + 1);
  const std::int32_t* start = shapes.in<std::int32_t>(query_start, "query_start", {"S+1"});
  const std::int32_t* tables = shapes.in<std::int32_t>(block_tables, "block_tables", {"S", "max_blocks"});
  const std::int64_t max_blocks = shapes["max_blocks"];
  if (heads < 1 || heads % kv.kv_heads != 0)
    shapes.fail("q", Shapes::describe(q),
                "a multiple of the cache's " + std::to_string(kv.kv_heads) + " heads");
  if (start[0] != 0 || start[sequences] != tokens)
    shapes.fail("query_start", std::to_string(start[0]) + " to " + std::to_string(start[sequences]),
                "offsets from 0 to T = " + std::to_string(tokens));
  check_size("paged_attention: window", window, 0, INT32_MAX, 1);
  check_size("paged_attention: split", split, 0, INT32_MAX, 1);
  check_size("paged_attention: queries_at_once", queries_at_once, 0, INT32_MAX, 1);
  if (!(softcap >= 0 && softcap - softcap == 0))
    shapes.fail("softcap", std::to_string(softcap), "a finite number, 0 for none");
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t queries = static_cast<std::int64_t>(start[s + 1]) - start[s];
    if (queries < 0) shapes.fail("query_start", "descending offsets", "ascending offsets");
    if (queries > 0 && (lengths[s] < queries || lengths[s] > max_blocks * kv.block_size))
      shapes.fail("seq_lens", std::to_string(lengths[s]),
                  "at least the sequence's " + std::to_string(queries) + " queries, at most the " +
                      std::to_string(max_blocks * kv.block_size) + " positions of its block table");
    const std::int64_t used = queries > 0 ? (lengths[s] + kv.block_size - 1) / kv.block_size : 0;
    for (std::int64_t b = 0; b < used; ++b) {
      const std::int32_t block = tables[s * max_blocks + b];
      if (block < 0 || block >= cache.blocks())
        shapes.fail("block_tables", std::to_string(block),
                    "blocks from 0 to " + std::to_string(cache.blocks() - 1));
    }
  }
  const float factor = scale.is_none() ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(kv.head_dim)))
                                       : py::cast<float>(scale);
  const Kernels& kernels = table(isa);
  Floats out({tokens, heads, static_cast<std::int64_t>(kv.head_dim)});
  const std::int64_t stride = heads * kv.head_dim, group = heads / kv.kv_heads;
  std::vector<float> scratch, partials;
  for (std::int64_t s = 0; s < sequences; ++s) {
    for (std::int64_t g = 0; g < kv.kv_heads; ++g) {
      const std::int64_t step = queries_at_once > 0 ? queries_at_once : std::max(tokens, std::int64_t{1});
      for (std::int64_t t = start[s]; t < start[s + 1]; t += step) {
        const std::int64_t queries = std::min<std::int64_t>(step, start[s + 1] - t);
        const std::int64_t at = t * stride + g * group * kv.head_dim;
        const std::int64_t position = lengths[s] - (start[s + 1] - t);
        const AttentionTask task = {in + at,
                                    out.mutable_data() + at,
                                    stride,
                                    stride,
                                    tables + s * max_blocks,
                                    static_cast<std::int32_t>(queries),
                                    static_cast<std::int32_t>(group),
                                    static_cast<std::int32_t>(g),
                                    static_cast<std::int32_t>(position),
                                    static_cast<std::int32_t>(window),
                                    factor,
                                    softcap};
        run_task(kernels, kv, task, split, scratch, partials);
      }
    }
  }
  return out;
}

}  // namespace

void register_attention(py::module_& module) {
  py::class_<KvCache>(module, "KvCache", R"(The paged K and V of one layer, zeroed.

Slot s is offset s % block_size of block s // block_size.

Args:
    blocks: number of blocks.
    kv_heads, head_dim: head_dim a multiple of 16 up to 256.
    block_size: positions per block: 16, 32, 48 or 64.
    dtype: "f32", "f16", "bf16", or "i8" with an fp32 scale per token and head.

Raises:
    RequestError: a size or dtype out of range.)")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::int64_t, const std::string&>(),
           py::arg("blocks"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("block_size") = 16,
           py::arg("dtype") = "f32")
      .def("write", &KvCache::write, py::arg("k"), py::arg("v"), py::arg("slots"), py::arg("isa") = "",
           "Stores k and v, float32 (T, kv_heads, head_dim), into slots, int32 (T,).")
      .def("read", &KvCache::read, py::arg("slots"),
           "The stored K and V of slots, int32 (T,), as float32 (T, kv_heads, head_dim) each.")
      .def("poison", &KvCache::poison, "Makes every stored value NaN (int8: every scale), for tests.");
  module.def("paged_attention", &paged_attention, py::arg("cache"), py::arg("q"), py::arg("query_start"),
             py::arg("seq_lens"), py::arg("block_tables"), py::arg("scale") = py::none(),
             py::arg("window") = 0, py::arg("softcap") = 0.0f, py::arg("isa") = "", py::arg("split") = 0,
             py::arg("queries_at_once") = 0,
             R"(Causal attention of a flat batch over a cache, on one thread.

The queries query_start[s] .. query_start[s + 1] of sequence s are its last positions, up to seq_lens[s] - 1.
Query head h reads KV head h // (H / kv_heads). None of the arguments from `isa` on changes a bit of the
result.

Args:
    cache: holds K and V, this batch's own included.
    q: float32 (T, H, head_dim).
    query_start: int32 (S + 1,).
    seq_lens: int32 (S,), after this batch.
    block_tables: int32 (S, max_blocks).
    scale: of the scores; None for 1 / sqrt(head_dim).
    window: positions a query sees, its own included; 0 for all.
    softcap: scores s become softcap * tanh(s / softcap); 0 for none.
    isa: the instruction set to run on, "" for the one in use.
    split: tiles of 64 positions per piece computed apart and merged; 0 for one pass.
    queries_at_once: queries of a sequence computed together; 0 for all.

Returns:
    float32 (T, H, head_dim).

Raises:
    RequestError: shapes that do not fit each other or the cache.)");
}

}  // namespace fastllm
