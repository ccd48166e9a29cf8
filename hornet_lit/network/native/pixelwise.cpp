// The kernels of pixelwise.h for float streams and weights.
#include "pixelwise.h"

#ifdef TILES
extern "C" {
int64_t lanes() { return kLanes; }
FORWARD(f32, float, Single)
BACKWARD(f32, float, Single)
}
#endif
