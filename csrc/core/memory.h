// Memory with one owner: zero until written, aligned for the widest vector, large pieces in huge pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace fastllm {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws std::bad_alloc. The size is rounded up to a whole line, so a kernel may read the line it is in.
  explicit AlignedBuffer(std::size_t bytes) : data_(allocate(bytes)), size_(bytes) {}

  // For what is made in numbers and lives long, as weights do: carved from areas of 32 MiB one behind the
  // other, so that matrices too small for huge pages of their own share them. An area goes when its last
  // buffer does. Throws std::bad_alloc.
  static AlignedBuffer carve(std::size_t bytes) {
    AlignedBuffer out;
    out.data_ = carve_bytes(bytes);
    out.size_ = bytes;
    return out;
  }

  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  std::size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_.get());
  }

  // Grows to at least `bytes`; contents are lost when it does.
  void reserve(std::size_t bytes) {
    if (bytes > size_) *this = AlignedBuffer(bytes + bytes / 4);
  }

 private:
  using Bytes = std::shared_ptr<std::uint8_t>;  // shared with an area at most
  static Bytes allocate(std::size_t bytes);
  static Bytes carve_bytes(std::size_t bytes);

  Bytes data_;
  std::size_t size_ = 0;
};

}  // namespace fastllm
