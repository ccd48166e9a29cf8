// The kernels of pixelwise.h for weights in bfloat16, with a stream in that ("bf16") or in float ("mixed").
#include "pixelwise.h"

#ifdef TILES
extern "C" {
FORWARD(bf16, uint16_t, Bfloat16)
BACKWARD(bf16, uint16_t, Bfloat16)
FORWARD(mixed, float, Bfloat16)
BACKWARD(mixed, float, Bfloat16)
}
#endif
