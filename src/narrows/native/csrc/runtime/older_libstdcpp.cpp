// A function that headers of GCC 11 and later call, and that older libstdc++ do not have. Defined here, and seen
// nowhere else, it lets a library that a new compiler has built open on older systems.
#include <new>

#if defined(__GLIBCXX__)
// std::__throw_bad_array_new_length(), by the name that the linker knows: its own declaration would export it.
[[noreturn]] __attribute__((visibility("hidden"))) void array_too_long() __asm__("_ZSt28__throw_bad_array_new_lengthv");

void array_too_long() { throw std::bad_array_new_length(); }
#endif
