// The kernels of pixelwise.h for weights in bfloat16, with a stream in that ("bf16") or in float ("mixed").
#include "pixelwise.h"

#if defined(TILES) && defined(__AVX512BF16__)
extern "C" {
FORWARD(bf16, uint16_t, Pairs)
BACKWARD(bf16, uint16_t, Pairs)
FORWARD(mixed, float, Pairs)
BACKWARD(mixed, float, Pairs)
}
#endif
