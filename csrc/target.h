// REFLECTIVE_TARGET("avx2,fma") lets the code after it, to the end of the file, use these instructions. Standard
// headers come before it: their inline functions are shared with files meant for every processor. clang wants the
// region closed by REFLECTIVE_TARGET_END.
#pragma once

#define REFLECTIVE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define REFLECTIVE_TARGET(features) \
  REFLECTIVE_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define REFLECTIVE_TARGET_END _Pragma("clang attribute pop")
#else
#define REFLECTIVE_TARGET(features) REFLECTIVE_PRAGMA(GCC target(features))
#define REFLECTIVE_TARGET_END
#endif
