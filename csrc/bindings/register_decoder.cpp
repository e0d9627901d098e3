// fastllm._core.Decoder: one StepBatch in, one StepResult out, the GIL released in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/register.h"
#include "bindings/sample_arrays.h"
#include "core/argument_error.h"
#include "core/math.h"
#include "model/adapter.h"
#include "model/decoder.h"

namespace fastllm {
namespace {

namespace py = pybind11;

constexpr std::int32_t kMaxLogprobs = 1024;

template <typename T>
T read(const py::dict& spec, const char* key) {
  if (!spec.contains(key)) throw ArgumentError(std::string("spec: ") + key, "nothing", "a value");
  try {
    return spec[key].cast<T>();
  } catch (const py::cast_error&) {
    raise_request_error((std::string("spec: ") + key).c_str(), py::handle(spec[key]), "another type");
  }
}

std::vector<double> inverse_frequencies(double base, std::int64_t rotary, double linear,
                                        const std::vector<double>& factors) {
  if (!factors.empty() && factors.size() != static_cast<std::size_t>(rotary / 2))
    throw ArgumentError("spec: rope_factors", std::to_string(factors.size()) + " values",
                        "rotary_dim / 2 or none");
  std::vector<double> frequencies(static_cast<std::size_t>(rotary / 2));
  rope_inverse_frequencies(base, rotary, linear, factors.empty() ? nullptr : factors.data(),
                           frequencies.data());
  return frequencies;
}

DecoderConfig read_spec(const py::dict& spec) {
  const auto refuse = [](const char* key, const std::string& got, const char* supported) {
    throw ArgumentError(std::string("spec: ") + key, got, supported);
  };
  DecoderConfig c;
  c.vocab_size = read<std::int64_t>(spec, "vocab_size");
  c.dim = read<std::int64_t>(spec, "dim");
  c.num_layers = read<std::int64_t>(spec, "num_layers");
  c.num_heads = read<std::int64_t>(spec, "num_heads");
  c.num_kv_heads = read<std::int64_t>(spec, "num_kv_heads");
  c.head_dim = read<std::int64_t>(spec, "head_dim");
  c.ffn_dim = read<std::int64_t>(spec, "ffn_dim");
  const auto norm = read<std::string>(spec, "norm");
  c.norm = norm == "layer" ? NormKind::layer : NormKind::rms;
  if (norm != "layer" && norm != "rms") refuse("norm", norm, "rms or layer");
  c.norm_eps = read<float>(spec, "norm_eps");
  c.post_norms = read<bool>(spec, "post_norms");
  const auto activation = read<std::string>(spec, "activation");
  c.activation = activation == "silu" ? Activation::silu : Activation::gelu_tanh;
  if (activation != "silu" && activation != "gelu_tanh")
    refuse("activation", activation, "silu or gelu_tanh");
  if (!read<bool>(spec, "pre_norms")) refuse("pre_norms", "False", "True");
  if (!read<bool>(spec, "gated_mlp")) refuse("gated_mlp", "False", "True");
  if (read<bool>(spec, "position_embeddings")) refuse("position_embeddings", "True", "False");
  c.rotary_dim = read<std::int64_t>(spec, "rotary_dim");
  const auto base = read<double>(spec, "rope_base");
  c.inv_freq = inverse_frequencies(base, c.rotary_dim, read<double>(spec, "rope_linear_factor"),
                                   read<std::vector<double>>(spec, "rope_factors"));
  const auto sliding_base = read<double>(spec, "rope_base_sliding");
  if (sliding_base > 0) c.inv_freq_sliding = inverse_frequencies(sliding_base, c.rotary_dim, 1.0, {});
  const auto window = read<std::int32_t>(spec, "sliding_window");
  const auto layers = read<std::vector<bool>>(spec, "sliding_layers");
  for (std::int64_t i = 0; i < c.num_layers; ++i) {
    const bool slides =
        window > 0 && static_cast<std::size_t>(i) < layers.size() && layers[static_cast<std::size_t>(i)];
    c.windows.push_back(slides ? window : 0);
  }
  c.attention_scale = read<float>(spec, "attention_scale");
  c.attn_softcap = read<float>(spec, "attn_softcap");
  c.final_softcap = read<float>(spec, "final_softcap");
  c.embedding_scale = read<float>(spec, "embedding_scale");
  return c;
}

KvType kv_type(const std::string& name) {
  if (name == "fp32") return KvType::f32;
  if (name == "fp16") return KvType::f16;
  if (name == "bf16") return KvType::bf16;
  if (name == "int16") return KvType::i16;
  if (name == "int8") return KvType::i8;
  throw ArgumentError("kv_cache_dtype", name, "int16, int8, fp16, bf16 or fp32");
}

void check_block_size(std::int32_t block_size) {
  if (block_size != 16 && block_size != 32 && block_size != 64)
    throw ArgumentError("block_size", std::to_string(block_size), "16, 32 or 64");
}

// Every value of an index array lies in [low, high).
void check_range(const Shapes& shapes, const char* name, const std::int32_t* values, std::int64_t n,
                 std::int64_t low, std::int64_t high) {
  for (std::int64_t i = 0; i < n; ++i)
    if (values[i] < low || values[i] >= high)
      shapes.fail(name, std::to_string(values[i]) + " at index " + std::to_string(i),
                  "values in [" + std::to_string(low) + ", " + std::to_string(high) + ")");
}

class DecoderHandle {
 public:
  DecoderHandle(const py::dict& spec, int threads) : decoder_(read_spec(spec), check_threads(threads)) {}

  Decoder& decoder() { return decoder_; }
  const Decoder& decoder() const { return decoder_; }

  void close() { decoder_.close(); }

  void read_blocks(const py::object& blocks, const py::object& out) {
    const BlockArrays arrays = check_blocks("Decoder.read_blocks", blocks, out, "out");
    if (!py::reinterpret_borrow<py::array>(out).writeable())
      Shapes("Decoder.read_blocks").fail("out", "a read-only array", "an array that can be written to");
    const py::gil_scoped_release unlocked;
    decoder_.read_blocks(arrays.blocks, arrays.count, const_cast<std::uint8_t*>(arrays.bytes));
  }

  void write_blocks(const py::object& blocks, const py::object& data) {
    const BlockArrays arrays = check_blocks("Decoder.write_blocks", blocks, data, "data");
    const py::gil_scoped_release unlocked;
    decoder_.write_blocks(arrays.blocks, arrays.count, arrays.bytes);
  }

  py::dict step(const py::object& batch, bool want_logits) {
    if (decoder_.kv_blocks() == 0) throw ArgumentError("step", "no KV cache", "allocate_kv before");
    Shapes shapes("StepBatch");
    const DecoderConfig& c = decoder_.config();
    StepInput in;
    const auto ints = [&](const char* name, std::initializer_list<const char*> sizes) {
      return shapes.in<std::int32_t>(batch.attr(name), name, sizes);
    };
    in.token_ids = ints("token_ids", {"T"});
    in.tokens = shapes["T"];
    in.positions = ints("positions", {"T"});
    in.slot_mapping = ints("slot_mapping", {"T"});
    in.seq_lens = ints("seq_lens", {"S"});
    in.sequences = shapes["S"];
    in.adapter = ints("adapter", {"S"});
    shapes.let("S+1", in.sequences + 1);
    in.query_start = ints("query_start", {"S+1"});
    in.block_tables = ints("block_tables", {"S", "max_blocks"});
    in.max_blocks = shapes["max_blocks"];
    shapes.let("2", 2);
    in.copy_blocks = ints("copy_blocks", {"C", "2"});
    in.copies = shapes["C"];
    in.row_token = ints("row_token", {"R"});
    in.rows = shapes["R"];
    check_batch(shapes, in);

    const SampleArrays arrays =
        read_sample_arrays(shapes, batch, c.vocab_size, kMaxLogprobs, SampleRow::kPool);
    std::int64_t most = 0, pooled = 0;
    rows_.clear();
    for (std::int64_t r = 0; r < in.rows; ++r) {
      rows_.push_back(arrays.row(r));
      pooled += rows_.back().kind == SampleRow::kPool;
      most = std::max<std::int64_t>(most, std::min<std::int64_t>(rows_.back().num_logprobs, c.vocab_size));
    }
    in.sample = rows_.data();

    py::array_t<std::int32_t> tokens(in.rows), rank(in.rows);
    py::array_t<float> logprob(in.rows);
    py::array_t<std::int32_t> top_ids({in.rows, most});
    py::array_t<float> top_logprobs({in.rows, most});
    py::array_t<float> hidden({pooled, c.dim});
    py::object logits = py::none();
    StepOutput out;
    out.hidden = hidden.mutable_data();
    out.tokens = tokens.mutable_data();
    out.rank = rank.mutable_data();
    out.logprob = logprob.mutable_data();
    out.top_ids = top_ids.mutable_data();
    out.top_logprobs = top_logprobs.mutable_data();
    out.max_logprobs = most;
    if (want_logits) {
      py::array_t<float> raw({in.rows, c.vocab_size});
      out.logits = raw.mutable_data();
      logits = raw;
    }
    {
      const py::gil_scoped_release unlocked;
      decoder_.step(in, out);
    }
    previous_rows_ = in.rows;
    py::dict result;
    result["tokens"] = tokens;
    result["logprob"] = logprob;
    result["rank"] = rank;
    result["top_ids"] = top_ids;
    result["top_logprobs"] = top_logprobs;
    result["hidden"] = hidden;
    result["logits"] = logits;
    return result;
  }

 private:
  struct BlockArrays {
    const std::int32_t* blocks;
    std::int64_t count;
    const std::uint8_t* bytes;  // (count, block_bytes)
  };
  BlockArrays check_blocks(const char* call, const py::object& blocks, const py::object& bytes,
                           const char* name) const {
    if (decoder_.kv_blocks() == 0) throw ArgumentError(call, "no KV cache", "allocate_kv before");
    Shapes shapes(call);
    shapes.let("block_bytes", static_cast<std::int64_t>(decoder_.block_bytes()));
    BlockArrays arrays{};
    arrays.blocks = shapes.in<std::int32_t>(blocks, "blocks", {"B"});
    arrays.count = shapes["B"];
    arrays.bytes = shapes.in<std::uint8_t>(bytes, name, {"B", "block_bytes"});
    check_range(shapes, "blocks", arrays.blocks, arrays.count, 0, decoder_.kv_blocks());
    return arrays;
  }

  static int check_threads(int threads) {
    if (threads < 0 || threads > 1024)
      throw ArgumentError("threads", std::to_string(threads), "0 (all) to 1024");
    return threads;
  }

  // Everything a kernel would use as an index.
  void check_batch(const Shapes& shapes, const StepInput& in) const {
    const DecoderConfig& c = decoder_.config();
    const std::int64_t blocks = decoder_.kv_blocks();
    const std::int64_t block_size = decoder_.block_size();
    if (in.tokens == 0) shapes.fail("token_ids", "no tokens", "at least one");
    check_range(shapes, "token_ids", in.token_ids, in.tokens, -previous_rows_, c.vocab_size);
    check_range(shapes, "slot_mapping", in.slot_mapping, in.tokens, 0, blocks * block_size);
    check_range(shapes, "block_tables", in.block_tables, in.sequences * in.max_blocks, 0, blocks);
    check_range(shapes, "copy_blocks", in.copy_blocks, in.copies * 2, 0, blocks);
    check_offsets(shapes, "query_start", in.query_start, in.sequences, in.tokens);
    check_range(shapes, "seq_lens", in.seq_lens, in.sequences, 1, in.max_blocks * block_size + 1);
    for (std::int64_t s = 0; s < in.sequences; ++s)
      if (in.adapter[s] < -1 || (in.adapter[s] >= 0 && !decoder_.has_adapter(in.adapter[s])))
        shapes.fail("adapter", std::to_string(in.adapter[s]) + " at index " + std::to_string(s),
                    "-1 or the index of a loaded adapter");
    for (std::int64_t s = 0; s < in.sequences; ++s) {
      const std::int32_t begin = in.query_start[s], end = in.query_start[s + 1];
      for (std::int32_t t = begin; t < end; ++t)
        if (in.positions[t] != in.seq_lens[s] - (end - t))
          shapes.fail("positions", std::to_string(in.positions[t]) + " at index " + std::to_string(t),
                      "consecutive positions that end at seq_lens - 1");
      if (begin < end && in.positions[begin] < 0)
        shapes.fail("positions", std::to_string(in.positions[begin]), "positions from 0");
    }
  }

  Decoder decoder_;
  std::vector<SampleRow> rows_;
  std::int64_t previous_rows_ = 0;
};

}  // namespace

void register_decoder(py::module_& module) {
  py::class_<Adapter, std::shared_ptr<Adapter>>(
      module, "Adapter",
      R"(A low-rank adapter (LoRA) for a Decoder: y += scale * (x A^T) B^T for the projections that were set.

Made in any thread. Once a decoder has it, nothing can be set any more.)")
      .def(py::init<>())
      .def(
          "set",
          [](Adapter& self, const std::string& slot, std::int64_t layer, const py::object& a,
             std::shared_ptr<const PackedMatrix> b, float scale) {
            Shapes shapes("Adapter.set");
            const float* values = shapes.in<float>(a, "a", {"rank", "inputs"});
            self.set(slot, layer, values, shapes["rank"], shapes["inputs"], std::move(b), scale);
          },
          py::arg("slot"), py::arg("layer"), py::arg("a"), py::arg("b").none(false), py::arg("scale"),
          R"(Sets the matrices of one projection, which has none yet.

Args:
    slot: "q", "k", "v", "o", "gate", "up" or "down".
    layer: from 0.
    a: float32 (rank, inputs), C-contiguous; copied. rank is 1 to 256.
    b: (outputs, rank) of kind "f32".
    scale: finite.

Raises:
    RequestError: anything else.)")
      .def_property_readonly("rank", &Adapter::rank, "The largest.")
      .def_property_readonly("nbytes", &Adapter::nbytes, "Bytes of all its matrices.");

  py::class_<DecoderHandle>(module, "Decoder",
                            R"(A decoder with its weights and its paged KV cache, on the CPU.

Made from DecoderSpec.as_dict(); weights are set slot by slot (fastllm/models/slots.py), then step() runs StepBatches.
Not for several threads at once.)")
      .def(py::init<const py::dict&, int>(), py::arg("spec"), py::arg("threads") = 0,
           "threads: 0 takes all available processors.\n\nRaises:\n    RequestError: a value that this "
           "decoder does not "
           "support.")
      .def(
          "set",
          [](DecoderHandle& self, const std::string& slot, std::int64_t layer, const py::object& weights) {
            if (py::isinstance<PackedMatrix>(weights)) {
              self.decoder().set_matrix(slot, layer, weights.cast<std::shared_ptr<const PackedMatrix>>());
              return;
            }
            Shapes shapes("Decoder.set");
            const float* values = shapes.in<float>(weights, slot.c_str(), {"N"});
            self.decoder().set_vector(slot, layer, values, shapes["N"]);
          },
          py::arg("slot"), py::arg("layer"), py::arg("weights"),
          "Sets one weight: a PackedMatrix, or a float32 vector. layer is -1 outside the layers.\n\nRaises:\n"
          "    RequestError: no such slot, or another shape than the spec's.")
      .def(
          "check_complete", [](const DecoderHandle& self) { self.decoder().check_complete(); },
          "Raises RequestError naming a slot that was not set.")
      .def(
          "allocate_kv",
          [](DecoderHandle& self, std::int64_t blocks, std::int32_t block_size, const std::string& dtype) {
            check_block_size(block_size);
            if (blocks < 1 || blocks > (std::int64_t{1} << 31) / block_size - 1)
              throw ArgumentError("blocks", std::to_string(blocks), "1 to 2^31 / block_size - 1");
            self.decoder().allocate_kv(blocks, block_size, kv_type(dtype));
          },
          py::arg("blocks"), py::arg("block_size"), py::arg("dtype"),
          "Makes the KV cache: fp32, fp16, bf16 or int8; blocks of 16, 32 or 64 positions. Contents are "
          "lost.")
      .def(
          "kv_bytes_per_block",
          [](const DecoderHandle& self, std::int32_t block_size, const std::string& dtype) {
            check_block_size(block_size);
            return Decoder::kv_bytes_per_block(self.decoder().config(), block_size, kv_type(dtype));
          },
          py::arg("block_size"), py::arg("dtype"), "Bytes that one block takes over all layers, K and V.")
      .def("read_blocks", &DecoderHandle::read_blocks, py::arg("blocks"), py::arg("out"),
           R"(Copies whole blocks of the KV cache into out; the GIL is released.

Args:
    blocks: int32 (B,), below kv_blocks.
    out: uint8 (B, kv_bytes_per_block), C-contiguous: K, V and their scales as they are stored.

Raises:
    RequestError: anything else, or there is no KV cache; nothing was copied.)")
      .def(
          "write_blocks", &DecoderHandle::write_blocks, py::arg("blocks"), py::arg("data"),
          R"(Copies what read_blocks gave back into blocks of a KV cache of the same kind; the GIL is released.

Args:
    blocks: int32 (B,), below kv_blocks.
    data: uint8 (B, kv_bytes_per_block), C-contiguous.

Raises:
    RequestError: anything else, or there is no KV cache; nothing was copied.)")
      .def(
          "load_adapter",
          [](DecoderHandle& self, std::int64_t index, const std::shared_ptr<Adapter>& adapter) {
            self.decoder().load_adapter(index, adapter);
            adapter->seal();
          },
          py::arg("index"), py::arg("adapter").none(false),
          "Makes sequences whose StepBatch.adapter is index (0 to 255) use it, in place of what was "
          "there.\n\nRaises:\n    RequestError: its matrices do not fit the decoder's; nothing changed.")
      .def(
          "unload_adapter",
          [](DecoderHandle& self, std::int64_t index) { self.decoder().unload_adapter(index); },
          py::arg("index"), "Forgets an adapter; no step may name its index then. Without one, does nothing.")
      .def("step", &DecoderHandle::step, py::arg("batch"), py::arg("logits") = false,
           "Runs one StepBatch (see fastllm/executor/base.py). Returns a dict with the arrays of StepResult, "
           "and under "
           "'logits' the raw logits, float32 (R, V), when asked for.\n\nRaises:\n    RequestError: an array "
           "of the "
           "wrong dtype or shape, or an index out of range; nothing was computed then.")
      .def(
          "profile", [](DecoderHandle& self, bool on) { self.decoder().profile().enable(on); }, py::arg("on"),
          "Starts, from zero, or ends the measurement of phase_seconds.")
      .def_property_readonly(
          "phase_seconds",
          [](DecoderHandle& self) {
            py::dict seconds;
            for (std::size_t i = 0; i < kPhaseNames.size(); ++i)
              seconds[kPhaseNames[i]] = self.decoder().profile().seconds(i);
            return seconds;
          },
          "Seconds that the phases of all steps took since profile(True), the waits between threads "
          "included; by "
          "name, in the order in which a step walks through them.")
      .def(
          "release_kv", [](DecoderHandle& self) { self.decoder().release_kv(); },
          "Frees the KV cache and what steps have allocated; no step until allocate_kv.")
      .def(
          "release_weights", [](DecoderHandle& self) { self.decoder().release_weights(); },
          "release_kv, and frees the weights; they can be set anew.")
      .def(
          "close", [](DecoderHandle& self) { self.close(); },
          "Frees weights and KV cache; no step afterwards.")
      .def_property_readonly("threads", [](const DecoderHandle& self) { return self.decoder().threads(); })
      .def_property_readonly(
          "weight_bytes", [](const DecoderHandle& self) { return self.decoder().weight_bytes(); },
          "Bytes of all packed matrices.")
      .def_property_readonly("kv_blocks",
                             [](const DecoderHandle& self) { return self.decoder().kv_blocks(); });
}

}  // namespace fastllm
