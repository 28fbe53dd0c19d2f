// The calls of a walk, recorded while they are made, to be made again by one call: the CPU's counterpart of a CUDA
// graph. Arguments are kept as they were, so what changes from step to step must lie in memory that stays where it is.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace narrows {

class Tape {
   public:
    std::vector<std::function<int()>> calls;  // 0: done; anything else ends the run, which goes on with the same call
    bool whole = true;                        // no call was made that cannot be repeated
};

// The tape on which this thread's calls are recorded; null for none.
Tape*& recording();

}  // namespace narrows

// First in a function that a tape may repeat: `CALL` is the function with its own arguments. Nothing is recorded while
// a tape runs.
#define NARROWS_TAPED(CALL)                          \
    if (narrows::Tape* tape = narrows::recording()) {  \
        tape->calls.emplace_back([=] {                 \
            CALL;                                      \
            return 0;                                  \
        });                                            \
    }

// The same in a function that no tape repeats.
#define NARROWS_NOT_TAPED \
    if (narrows::Tape* tape = narrows::recording()) tape->whole = false;
