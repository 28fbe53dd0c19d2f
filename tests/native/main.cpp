// Runs the tests of the compiled code: all, or those whose names are given. The first failure ends it.
#include <algorithm>
#include <string_view>

#include "check.h"

std::vector<testing::Test>& testing::tests() {
    static std::vector<Test> all;
    return all;
}

testing::Edge testing::edge = testing::Edge::heap;

static const char* running = "";

void testing::fail(const char* file, int line, const char* condition, const std::string& about) {
    std::fprintf(stderr, "%s (%d): %s:%d: not so: %s [ %s]\n", running, int(edge), file, line, condition,
                 about.c_str());
    std::_Exit(1);
}

void testing::skip(const char* what, const char* why) {
    std::printf("skipped: %s: %s\n", what, why);
    std::fflush(stdout);
}

// Where memory lies is nothing that ThreadSanitizer looks at.
#ifdef __SANITIZE_THREAD__
constexpr bool every_edge = false;
#else
constexpr bool every_edge = true;
#endif

int main(int count, char** names) {
    using testing::Edge;
    if (!narrows_rows()) testing::skip("norms, router, embedding, rotary embedding", "this build has no AVX-512");
    if (!narrows_gemm()) testing::skip("products, experts, attention", "this build has no AVX-512 with bf16 products");
    if (!narrows_int8()) testing::skip("int8 products", "this build has no AVX-512 with VNNI");
    int done = 0;
    for (const testing::Test& test : testing::tests()) {
        if (count > 1 && std::none_of(names + 1, names + count,
                                      [&](auto name) { return name == std::string_view(test.name); }))
            continue;
        for (const Edge at : {Edge::heap, Edge::end, Edge::start}) {
            if (at != Edge::heap && !(every_edge && test.at_every_edge)) continue;
            testing::edge = at;
            running = test.name;
            test.body();
        }
        ++done;
    }
    std::printf("%d tests\n", done);
    return 0;
}
