// What the library says of itself.
#include "machine.cpp"

#include "check.h"

TEST(the_library_says_what_it_was_made_of_and_for) {
    CHECK(std::string(narrows_sources()) == "tests");
    const std::string features = narrows_compiled_for();
    CHECK(features.empty() || features.back() == ' ');
    CHECK(!narrows_rows() || features.find("avx512f ") != std::string::npos);
    CHECK(!narrows_gemm() || features.find("avx512_bf16 ") != std::string::npos);
}
