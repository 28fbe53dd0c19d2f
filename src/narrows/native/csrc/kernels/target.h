// The prototypes of the target that is being compiled: NARROWS_TARGET, its name, is also the namespace of all its code,
// so that no function of one target is ever linked into another.
#pragma once

#include "kernels.h"

#ifndef NARROWS_TARGET
#error "kernels are compiled once for each target of targets.def, with -DNARROWS_TARGET=its name"
#endif

namespace narrows::NARROWS_TARGET {

#define KERNEL(NAME, CAPTURE, ...) void NAME(__VA_ARGS__);
#include "kernels.def"
#undef KERNEL

extern const Kernels kernels;

}  // namespace narrows::NARROWS_TARGET
