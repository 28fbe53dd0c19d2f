// One mistake for each sanitizer. A build is trusted only where its own is reported (run.py).
#include <cstdio>
#include <limits>
#include <string_view>
#include <thread>

int main(int count, char** names) {
    const std::string_view which = count > 1 ? names[1] : "";
    volatile int number = count;
    if (which == "address") {
        int* const memory = new int[4];
        memory[2 + number] = 1;
        delete[] memory;
    }
    if (which == "leak") {
        int* lost = new int[4];
        std::printf("%p\n", static_cast<void*>(lost));
        lost = nullptr;
    }
    if (which == "undefined") {
        int large = std::numeric_limits<int>::max();
        large += number;
        std::printf("%d\n", large);
    }
    if (which == "thread") {
        int shared = 0;
        std::thread other([&] { ++shared; });
        ++shared;
        other.join();
    }
}
