// Which target runs, chosen once, and the functions through which its kernels are called and captured.
#pragma once

#include <tuple>

#include "kernels.h"
#include "runtime/capture.h"

namespace narrows {

// The kernels that run: of the best target for this CPU, or of the one that was chosen.
const Kernels& kernels();

constexpr bool CAPTURED = true, NOT_CAPTURED = false;

// What a kernel is called through: notes the call, with its arguments, where calls are being captured.
template <auto Slot, bool REPEATED>
struct Call;

template <typename... Args, void (*Kernels::*Slot)(Args...), bool REPEATED>
struct Call<Slot, REPEATED> {
    static void make(Args... args) {
        if (Capture* capture = capturing()) {
            if constexpr (REPEATED)
                capture->calls.emplace_back([=] {
                    (kernels().*Slot)(args...);
                    return 0;
                });
            else
                capture->whole = false;
        }
        (kernels().*Slot)(args...);
    }
    // A letter for each argument: Pointer, Long (64 bits), Int (32 bits), Float.
    static constexpr char letters[] = {(std::is_pointer_v<Args>          ? 'P'
                                        : std::is_floating_point_v<Args> ? 'F'
                                        : sizeof(Args) == 8              ? 'L'
                                                                         : 'I')...,
                                       '\0'};
};

// call::linear(...) and so on.
namespace call {
#define KERNEL(NAME, CAPTURE, ...) inline constexpr auto& NAME = Call<&Kernels::NAME, CAPTURE>::make;
#include "kernels.def"
#undef KERNEL
}  // namespace call

}  // namespace narrows
