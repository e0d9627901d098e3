// The whole forward pass on random weights: the same bits on any number of threads, prefilled at once or in
// chunks. As much a test of the sanitizers' verdict as of the values: every phase of a step runs here, on
// several threads. Prints the instruction set and a hash of the logits' bits, which .ci/qemu_proof compares
// between processors.
#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "core/math.h"
#include "dispatch.h"

namespace {

using namespace fastllm;

constexpr std::int32_t kBlockSize = 16;
constexpr std::int64_t kBlocks = 40;

struct Weights {
  std::uint64_t state;
  float next() {  // xorshift64*, in [-1, 1)
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<float>(static_cast<std::int32_t>(state * 0x2545f4914f6cdd1dULL >> 32)) * 0x1p-31f;
  }
  std::vector<float> values(std::int64_t n, float scale, float offset = 0.0f) {
    std::vector<float> made(static_cast<std::size_t>(n));
    for (float& value : made) value = offset + scale * next();
    return made;
  }
};

// How the weights are stored: quantized to 4 or 8 bits, or as they are.
enum class Storage { u4, u8, f32 };

std::shared_ptr<const PackedMatrix> matrix(Weights& weights, std::int64_t rows, std::int64_t cols,
                                           Storage storage) {
  const std::vector<float> values = weights.values(rows * cols, 0.15f);
  if (storage != Storage::f32)
    return std::make_shared<PackedMatrix>(
        quantize(values.data(), rows, cols, storage == Storage::u4 ? 4 : 8, 32));
  return std::make_shared<PackedMatrix>(pack_float({Codes::f32, values.data(), rows, cols}, Codes::f32));
}

std::unique_ptr<Decoder> make_decoder(Storage storage, KvType kv, int threads) {
  DecoderConfig c;
  c.vocab_size = 301;
  c.dim = 96;
  c.num_layers = 2;
  c.num_heads = 6;
  c.num_kv_heads = 2;
  c.head_dim = 32;
  c.ffn_dim = 160;
  c.rotary_dim = 32;
  c.inv_freq.resize(16);
  rope_inverse_frequencies(10000.0, 32, 1.0, nullptr, c.inv_freq.data());
  c.windows = {0, 24};
  c.attention_scale = 0.2f;
  c.attn_softcap = 30.0f;
  auto decoder = std::make_unique<Decoder>(c, threads);
  Weights weights{42};
  const std::int64_t heads = c.num_heads * c.head_dim, kv_heads = c.num_kv_heads * c.head_dim;
  decoder->set_matrix("embed", -1, matrix(weights, c.vocab_size, c.dim, storage));
  const auto vector = [&](const char* slot, std::int64_t layer, std::int64_t n, float scale, float offset) {
    decoder->set_vector(slot, layer, weights.values(n, scale, offset).data(), n);
  };
  vector("final_norm", -1, c.dim, 0.2f, 1.0f);
  for (std::int64_t layer = 0; layer < c.num_layers; ++layer) {
    vector("attn_norm", layer, c.dim, 0.2f, 1.0f);
    vector("ffn_norm", layer, c.dim, 0.2f, 1.0f);
    vector("q_norm", layer, c.head_dim, 0.2f, 1.0f);
    vector("k_norm", layer, c.head_dim, 0.2f, 1.0f);
    vector("v_bias", layer, kv_heads, 0.1f, 0.0f);
    decoder->set_matrix("q", layer, matrix(weights, heads, c.dim, storage));
    decoder->set_matrix("k", layer, matrix(weights, kv_heads, c.dim, storage));
    decoder->set_matrix("v", layer, matrix(weights, kv_heads, c.dim, storage));
    decoder->set_matrix("o", layer, matrix(weights, c.dim, heads, storage));
    decoder->set_matrix("gate", layer, matrix(weights, c.ffn_dim, c.dim, storage));
    decoder->set_matrix("up", layer, matrix(weights, c.ffn_dim, c.dim, storage));
    decoder->set_matrix("down", layer, matrix(weights, c.dim, c.ffn_dim, storage));
  }
  decoder->check_complete();
  decoder->allocate_kv(kBlocks, kBlockSize, kv);
  return decoder;
}

// One sequence: its tokens, how many are in the cache, its blocks, and what it was sampled from.
struct Sequence {
  std::int32_t id;
  std::vector<std::int32_t> tokens, blocks;
  std::vector<float> yielded;  // logits, log-probability and hidden state of each token
  std::int32_t computed = 0;

  std::int32_t left() const { return static_cast<std::int32_t>(tokens.size()) - computed; }
};

// Runs the next `chunk` tokens of each sequence, or what is left, as one flat batch. A sequence whose tokens
// are all computed then takes the sampled one. Each has two rows: one pools, the other samples.
void step(Decoder& decoder, const std::vector<Sequence*>& sequences, std::int32_t chunk) {
  constexpr std::int64_t kWidth = 20;
  std::vector<std::int32_t> ids, positions, slots, start{0}, lengths, tables, row_token;
  std::vector<SampleRow> rows;
  for (Sequence* sequence : sequences) {
    const std::int32_t end = sequence->computed + std::min(chunk, sequence->left());
    for (; sequence->computed < end; ++sequence->computed) {
      const std::int32_t position = sequence->computed;
      ids.push_back(sequence->tokens[static_cast<std::size_t>(position)]);
      positions.push_back(position);
      const std::int32_t block = sequence->blocks[static_cast<std::size_t>(position / kBlockSize)];
      slots.push_back(block * kBlockSize + position % kBlockSize);
    }
    start.push_back(static_cast<std::int32_t>(ids.size()));
    lengths.push_back(end);
    tables.insert(tables.end(), sequence->blocks.begin(), sequence->blocks.end());
    tables.resize(static_cast<std::size_t>(kWidth) * lengths.size());
    row_token.insert(row_token.end(), 2, start.back() - 1);
    SampleRow row;
    row.kind = SampleRow::kPool;
    rows.push_back(row);
    row.kind = SampleRow::kSample;
    row.temperature = sequence->id % 2 == 0 ? 0.0f : 0.9f;
    row.top_k = 20;
    row.seed = 7;
    row.sample_index = sequence->id;
    row.position = end - 1;
    row.num_logprobs = 2;
    rows.push_back(row);
  }
  StepInput in;
  in.tokens = static_cast<std::int64_t>(ids.size());
  in.sequences = static_cast<std::int64_t>(sequences.size());
  in.rows = static_cast<std::int64_t>(rows.size());
  in.max_blocks = kWidth;
  in.token_ids = ids.data();
  in.positions = positions.data();
  in.slot_mapping = slots.data();
  in.query_start = start.data();
  in.seq_lens = lengths.data();
  in.block_tables = tables.data();
  in.row_token = row_token.data();
  in.sample = rows.data();
  const std::size_t count = rows.size(), vocab = static_cast<std::size_t>(decoder.config().vocab_size);
  const auto dim = static_cast<std::size_t>(decoder.config().dim);
  std::vector<std::int32_t> tokens(count), rank(count), top_ids(2 * count);
  std::vector<float> logprob(count), top(2 * count), logits(vocab * count), hidden(dim * count / 2);
  decoder.step(in, {tokens.data(), logprob.data(), rank.data(), top_ids.data(), top.data(), 2, logits.data(),
                    hidden.data()});
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const std::size_t row = 2 * s + 1;
    CHECK(tokens[row] >= 0 && rank[row] >= 1 && tokens[row - 1] == 0);
    Sequence& sequence = *sequences[s];
    if (sequence.left() > 0) continue;
    sequence.tokens.push_back(tokens[row]);
    std::vector<float>& yielded = sequence.yielded;
    yielded.insert(yielded.end(), &logits[row * vocab], &logits[row * vocab] + vocab);
    yielded.push_back(logprob[row]);
    yielded.insert(yielded.end(), &hidden[s * dim], &hidden[s * dim] + dim);
  }
}

// Six tokens for each of three prompts, which go in `chunk` tokens at a time.
std::vector<Sequence> generate(Storage storage, KvType kv, int threads, std::int32_t chunk) {
  const auto decoder = make_decoder(storage, kv, threads);
  CHECK(decoder->threads() == threads);
  std::vector<Sequence> sequences(3);
  std::vector<Sequence*> all;
  std::int32_t free_block = kBlocks;
  for (std::int32_t id = 0; id < 3; ++id) {
    Sequence& sequence = sequences[static_cast<std::size_t>(id)];
    const std::int32_t prompt = std::vector<std::int32_t>{5, 130, 33}[static_cast<std::size_t>(id)];
    sequence.id = id;
    for (std::int32_t i = 0; i < prompt; ++i) sequence.tokens.push_back((i * 37 + id * 11) % 301);
    for (std::int32_t i = 0; i < prompt + 6; i += kBlockSize) sequence.blocks.push_back(--free_block);
    while (sequence.left() > chunk) step(*decoder, {&sequence}, chunk);
    all.push_back(&sequence);
  }
  for (int i = 0; i < 6; ++i) step(*decoder, all, chunk);
  return sequences;
}

bool same(const std::vector<Sequence>& a, const std::vector<Sequence>& b) {
  for (std::size_t s = 0; s < a.size(); ++s) {
    if (a[s].tokens != b[s].tokens || a[s].yielded.size() != b[s].yielded.size()) return false;
    if (std::memcmp(a[s].yielded.data(), b[s].yielded.data(), a[s].yielded.size() * sizeof(float)) != 0)
      return false;
  }
  return true;
}

// FNV-1a over the bits of all that was yielded.
std::uint64_t hash(const std::vector<Sequence>& sequences) {
  std::uint64_t h = 0xcbf29ce484222325ULL;
  for (const Sequence& sequence : sequences) {
    for (const float value : sequence.yielded) {
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      for (int i = 0; i < 4; ++i) h = (h ^ (bits >> 8 * i & 0xff)) * 0x100000001b3ULL;
    }
  }
  return h;
}

}  // namespace

int main() {
  struct Kind {
    const char* name;
    Storage storage;
    KvType kv;
  };
  std::printf("isa %s\n", kernels().name);
  for (const Kind& kind : {Kind{"u4 weights, f16 cache", Storage::u4, KvType::f16},
                           Kind{"u4 weights, i16 cache", Storage::u4, KvType::i16},
                           Kind{"u8 weights, i8 cache", Storage::u8, KvType::i8},
                           Kind{"f32 weights, f32 cache", Storage::f32, KvType::f32},
                           Kind{"u4 weights, bf16 cache", Storage::u4, KvType::bf16}}) {
    const std::vector<Sequence> expected = generate(kind.storage, kind.kv, 1, 200);
    for (const Sequence& sequence : expected) {
      CHECK(sequence.yielded.size() == 6 * (302 + 96));
      for (const float value : sequence.yielded) CHECK(std::isfinite(value));
    }
    CHECK(same(generate(kind.storage, kind.kv, 3, 200), expected));
    CHECK(same(generate(kind.storage, kind.kv, 2, 17), expected));
    CHECK(same(generate(kind.storage, kind.kv, 5, 1), expected));
    std::printf("%s: %016llx\n", kind.name, static_cast<unsigned long long>(hash(expected)));
  }
  return 0;
}
