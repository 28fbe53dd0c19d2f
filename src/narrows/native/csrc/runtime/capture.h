// The calls of a step, captured while they are made, to be made again by one call: the CPU's counterpart of a CUDA
// graph. Arguments are kept as they were, so what changes from step to step must lie in memory that stays where it is.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace narrows {

class Capture {
 public:
    std::vector<std::function<int()>> calls;  // 0: done; anything else ends the run, which goes on with the same call
    bool whole = true;                        // no call was made that cannot be repeated
};

// The capture that notes this thread's calls; null for none.
Capture*& capturing();

}  // namespace narrows
