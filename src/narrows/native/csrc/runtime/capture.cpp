// Captures the calls of this library and replays them.
#include "runtime/capture.h"

#include <atomic>
#include <ctime>

#include "runtime/export.h"

namespace narrows {

Capture*& capturing() {
    static thread_local Capture* capture = nullptr;
    return capture;
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

// A new capture, which notes this thread's calls from now on.
NARROWS_EXPORT Capture* narrows_capture_begin() { return capturing() = new Capture; }

// Ends the capture; of its calls the first `count` are kept.
NARROWS_EXPORT void narrows_capture_end(Capture* capture, int64_t count) {
    capturing() = nullptr;
    capture->calls.resize(count);
}

// How many calls have been captured; -1 if one was made that cannot be repeated.
NARROWS_EXPORT int64_t narrows_capture_size(const Capture* capture) {
    return capture->whole ? int64_t(capture->calls.size()) : -1;
}

NARROWS_EXPORT void narrows_capture_free(Capture* capture) { delete capture; }

// Makes the calls from number `*at` on, which counts along so that other threads can see how far it has come. times[i]:
// the clock (ns) before call i, and one more after the last. Returns 0, or what call `*at` returned if that is not 0:
// then it may be run again, from there.
NARROWS_EXPORT int narrows_capture_run(const Capture* capture, int64_t* at, int64_t* times) {
    const std::atomic_ref<int64_t> position(*at);
    const int64_t count = capture->calls.size(), first = position.load(std::memory_order_relaxed);
    if (first == 0) times[0] = now_ns();
    for (int64_t i = first; i < count; ++i) {
        if (const int outcome = capture->calls[i]()) return outcome;
        times[i + 1] = now_ns();
        position.store(i + 1, std::memory_order_release);
    }
    return 0;
}
