// How kernels come by memory (kernels/scratch.h), the same for all targets.
#include "kernels/scratch.h"

namespace narrows {

void Scratch::grow(int64_t bytes) {
    std::free(data_);
    size_ = 0;
    data_ = std::aligned_alloc(64, bytes);
    if (data_ == nullptr) fatal("no memory for %lld bytes of packed numbers", static_cast<long long>(bytes));
    size_ = bytes;
}

}  // namespace narrows
