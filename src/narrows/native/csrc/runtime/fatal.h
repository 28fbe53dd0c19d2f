// The end of a process that cannot go on: what a C interface has no way to report. Says why before.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace narrows {

// `sentence` and its values are printf's.
template <typename... Values>
[[noreturn, gnu::cold]] void fatal(const char* sentence, Values... values) {
    std::fputs("narrows: ", stderr);
    std::fprintf(stderr, sentence, values...);
    std::fputc('\n', stderr);
    std::abort();
}

}  // namespace narrows
