// A bad argument with its facts kept apart, for the bindings to make a fastllm.errors.RequestError of.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace fastllm {

class ArgumentError : public std::invalid_argument {
 public:
  // field: the argument at fault; value: what was given; limit: what would have been accepted, in words.
  ArgumentError(std::string field, std::string value, std::string limit)
      : std::invalid_argument(field + ": expected " + limit + ", got " + value),
        field_(std::move(field)),
        value_(std::move(value)),
        limit_(std::move(limit)) {}

  const std::string& field() const { return field_; }
  const std::string& value() const { return value_; }
  const std::string& limit() const { return limit_; }

 private:
  std::string field_, value_, limit_;
};

}  // namespace fastllm
