// What every file here shares: the mark of a function that Python may call, by its plain C name.
#pragma once

#define NARROWS_EXPORT extern "C" __attribute__((visibility("default")))
