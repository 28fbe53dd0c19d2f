// Memory of the calling thread, kept for its next call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "runtime/fatal.h"

namespace narrows {

class Scratch {
 public:
    Scratch() = default;
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // Room for `count` numbers, of an address also where there are none. Ends the process if there is no memory.
    template <typename T>
    T* of(int64_t count) {
        const int64_t bytes = std::max<int64_t>(64, (count * int64_t(sizeof(T)) + 63) / 64 * 64);
        if (bytes > size_) grow(bytes);
        return static_cast<T*>(data_);
    }

 private:
    void grow(int64_t bytes);

    void* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace narrows
