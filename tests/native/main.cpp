// Runs the tests of the compiled code, once for each target that this CPU can run: all, or those whose names are given.
// The first failure ends it.
#include <algorithm>
#include <sstream>
#include <string>

#include "check.h"

std::vector<testing::Test>& testing::tests() {
    static std::vector<Test> all;
    return all;
}

testing::Edge testing::edge = testing::Edge::heap;

static const char* running = "";

void testing::fail(const char* file, int line, const char* condition, const std::string& about) {
    std::fprintf(stderr, "%s (%d, %s): %s:%d: not so: %s [ %s]\n", running, int(edge), narrows_running(), file, line,
                 condition, about.c_str());
    std::_Exit(1);
}

// Where memory lies is nothing that ThreadSanitizer looks at.
#ifdef __SANITIZE_THREAD__
constexpr bool every_edge = false;
#else
constexpr bool every_edge = true;
#endif

int main(int count, char** names) {
    using testing::Edge;
    const auto wanted = [&](const testing::Test& test) {
        return count <= 1 ||
               std::any_of(names + 1, names + count, [&](const std::string name) { return name == test.name; });
    };
    int done = 0;
    std::istringstream targets(narrows_targets());
    for (std::string line; std::getline(targets, line);) {
        const size_t end = line.find(' ');
        const std::string target = line.substr(0, end), missing = line.substr(end + 1);
        if (!narrows_use(target.c_str())) {
            std::printf("skipped: kernels of %s: this CPU lacks %s\n", target.c_str(), missing.c_str());
            continue;
        }
        for (const testing::Test& test : testing::tests()) {
            if (!wanted(test)) continue;
            for (const Edge at : {Edge::heap, Edge::end, Edge::start}) {
                if (at != Edge::heap && !(every_edge && test.at_every_edge)) continue;
                testing::edge = at;
                running = test.name;
                test.body();
            }
            ++done;
        }
    }
    std::printf("%d tests\n", done);
    return 0;
}
