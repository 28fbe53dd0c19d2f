// The targets that are compiled in, the one that runs, and what Python has to know of kernels to call them.
#include "runtime/dispatch.h"

#include <string>

#include "runtime/export.h"

namespace narrows {

#define TARGET(NAME, FEATURES)    \
    namespace NAME {              \
    extern const Kernels kernels; \
    }
#include "targets.def"
#undef TARGET

namespace {

struct Target {
    const char* name;
    const Kernels* kernels;
    std::string missing;  // features that this CPU, or the system on it, does not have
};

const std::vector<Target>& targets() {
    // __builtin_cpu_supports asks cpuid, and by xgetbv whether the system keeps the registers.
#define FEATURE(NAME) +std::string(__builtin_cpu_supports(NAME) ? "" : NAME " ")
#define TARGET(NAME, FEATURES) {#NAME, &NAME::kernels, std::string() FEATURES},
    static const std::vector<Target> all{
#include "targets.def"
    };
#undef TARGET
#undef FEATURE
    return all;
}

const Target& best() {
    size_t i = 0;
    while (!targets()[i].missing.empty()) ++i;  // the last one needs nothing
    return targets()[i];
}

const Target*& running() {
    static const Target* target = &best();
    return target;
}

struct Binding {
    const char *name, *letters;
    void* function;
};

}  // namespace

const Kernels& kernels() { return *running()->kernels; }

}  // namespace narrows

using namespace narrows;

// A digest of the sources (setup.py), so that a library left over from older ones is not called with newer arguments.
NARROWS_EXPORT const char* narrows_sources() { return NARROWS_SOURCES; }

// A line for each target, the best first: its name, and what of its needs is missing here.
NARROWS_EXPORT const char* narrows_targets() {
    static const std::string lines = [] {
        std::string text;
        for (const Target& target : targets()) text += std::string(target.name) + " " + target.missing + "\n";
        return text;
    }();
    return lines.c_str();
}

// The name of the target whose kernels run.
NARROWS_EXPORT const char* narrows_running() { return running()->name; }

// From now on the kernels of this target run. 0 if there is none of this name that can run here.
NARROWS_EXPORT int narrows_use(const char* name) {
    for (const Target& target : targets()) {
        if (std::string(name) != target.name || !target.missing.empty()) continue;
        running() = &target;
        return 1;
    }
    return 0;
}

// All kernels by name, with a letter for each argument (Call::letters); the last has no name.
NARROWS_EXPORT const void* narrows_kernels() {
    static const Binding all[] = {
#define KERNEL(NAME, CAPTURE, ...) \
    {#NAME, Call<&Kernels::NAME, CAPTURE>::letters, reinterpret_cast<void*>(Call<&Kernels::NAME, CAPTURE>::make)},
#include "kernels.def"
#undef KERNEL
        {nullptr, nullptr, nullptr}};
    return all;
}
