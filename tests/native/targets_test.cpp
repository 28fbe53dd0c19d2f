// Targets, and what the library says of itself.
#include <set>

#include "check.h"

using namespace testing;

extern "C" {
const char* narrows_sources();
const void* narrows_kernels();
}

TEST(the_library_says_what_it_was_made_of_and_what_runs) {
    CHECK(std::string(narrows_sources()) == "tests");
    const std::string running = narrows_running(), all = narrows_targets();
    CHECK(("\n" + all).find("\n" + running + " \n") != std::string::npos);
    CHECK(all.substr(all.size() - 10) == "baseline \n");
}

TEST(a_target_that_is_not_there_is_refused_and_nothing_changes) {
    const std::string before = narrows_running();
    CHECK(!narrows_use("sse9") && narrows_running() == before);
    CHECK(narrows_use("baseline") && narrows_running() == std::string("baseline"));
    CHECK(narrows_use(before.c_str()) && narrows_running() == before);
}

TEST(every_kernel_is_bound_with_the_types_of_its_arguments) {
    struct Binding {
        const char *name, *letters;
        void* function;
    };
    std::set<void*> seen;
    for (auto* at = static_cast<const Binding*>(narrows_kernels()); at->name != nullptr; ++at) {
        CHECK(seen.insert(at->function).second);
        if (at->name == std::string("add_rows")) CHECK(at->letters == std::string("PPPLLII"));
        if (at->name == std::string("rms_norm")) CHECK(at->letters == std::string("PLLPLLPLLLFII"));
    }
    CHECK(seen.size() == sizeof(narrows::Kernels) / sizeof(void*));
}
