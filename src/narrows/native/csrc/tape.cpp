// Records and repeats the calls of this library (tape.h). Knows calls and clocks; not what they compute.
#include "tape.h"

#include <atomic>
#include <ctime>

#include "export.h"

namespace narrows {

Tape*& recording() {
    static thread_local Tape* tape = nullptr;
    return tape;
}

}  // namespace narrows

using namespace narrows;

namespace {

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

// A new tape, on which this thread's calls are recorded from now on.
NARROWS_EXPORT Tape* narrows_tape_begin() { return recording() = new Tape; }

// Ends the recording; of its calls the first `count` are kept.
NARROWS_EXPORT void narrows_tape_end(Tape* tape, int64_t count) {
    recording() = nullptr;
    tape->calls.resize(count);
}

// How many calls have been recorded; -1 if one was made that cannot be repeated.
NARROWS_EXPORT int64_t narrows_tape_size(const Tape* tape) { return tape->whole ? int64_t(tape->calls.size()) : -1; }

NARROWS_EXPORT void narrows_tape_free(Tape* tape) { delete tape; }

// Makes the calls from number `*at` on, which counts along so that other threads can see how far it has come. times[i]: the
// clock (ns) before call i, and one more after the last. Returns 0, or what call `*at` returned if that is not 0: then
// it may be run again, from there.
NARROWS_EXPORT int narrows_tape_run(const Tape* tape, int64_t* at, int64_t* times) {
    const std::atomic_ref<int64_t> position(*at);
    const int64_t count = tape->calls.size(), first = position.load(std::memory_order_relaxed);
    if (first == 0) times[0] = now_ns();
    for (int64_t i = first; i < count; ++i) {
        if (const int outcome = tape->calls[i]()) return outcome;
        times[i + 1] = now_ns();
        position.store(i + 1, std::memory_order_release);
    }
    return 0;
}
