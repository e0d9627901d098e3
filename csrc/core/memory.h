// Memory with one owner: aligned buffers for weights and activations, mapped ones for the KV cache.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace fastllm {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // Throws std::bad_alloc. The size is rounded up to a whole line, so a kernel may read the line it is in.
  explicit AlignedBuffer(std::size_t bytes) : size_(bytes) {
    const std::size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (whole < bytes) throw std::bad_alloc();
    if (whole == 0) return;
    data_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(kAlignment, whole)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, whole);
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
  struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<std::uint8_t, Free> data_;
  std::size_t size_ = 0;
};

// Anonymous pages straight from the kernel: zero until written, resident only once touched, and given back
// whole when the owner goes.
class MappedBuffer {
 public:
  MappedBuffer() = default;
  // Throws std::bad_alloc.
  explicit MappedBuffer(std::size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::uint8_t*>(p);
    madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: kernels without huge pages refuse it
  }
  MappedBuffer(MappedBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  MappedBuffer& operator=(MappedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~MappedBuffer() {
    if (data_ != nullptr) munmap(data_, size_);
  }

  std::size_t size() const { return size_; }
  std::uint8_t* data() { return data_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace fastllm
