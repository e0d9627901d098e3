// The sampling rows of a StepBatch (any object with its attributes), checked.
#pragma once

#include <cstdint>

#include "bindings/arrays.h"
#include "model/sampler.h"

namespace fastllm {

// Reads the arrays of R rows over a vocabulary of `vocab` tokens; binds "T" (of `positions`) and "R" in
// `shapes`. The pointers are those of the batch's arrays. Raises RequestError for a wrong dtype, shape,
// order, id or parameter. max_logprobs: the largest num_logprobs that is accepted.
// last_kind: the last of the kinds that are.
SampleArrays read_sample_arrays(Shapes& shapes, const pybind11::handle& batch, std::int64_t vocab,
                                std::int32_t max_logprobs, SampleRow::Kind last_kind);

// CSR offsets: from 0, ascending, ending at the number of entries. Raises RequestError.
void check_offsets(const Shapes& shapes, const char* name, const std::int32_t* start, std::int64_t rows,
                   std::int64_t entries);

}  // namespace fastllm
