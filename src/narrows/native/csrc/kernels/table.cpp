// This target's kernels.
#include "kernels/target.h"

namespace narrows::NARROWS_TARGET {

const Kernels kernels{
#define KERNEL(NAME, CAPTURE, ...) NAME,
#include "kernels.def"
#undef KERNEL
};

}  // namespace narrows::NARROWS_TARGET
