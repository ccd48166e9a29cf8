// The kernels of pixelwise.h for float streams and weights.
#include "pixelwise.h"

#ifdef TILES
extern "C" {
int64_t lanes() { return kLanes; }

constexpr int64_t kLeastPixels = 256;

// A kernel, of any library, that one thread runs for pixels [first, last) of whole images.
struct Step {
    void (*run)(const void* arguments, int64_t first, int64_t last);
    const void* arguments;
};

// Steps after each other for B images of M pixels: T threads take theirs through all of them and never wait for each
// other. Few images at a time, so that a step finds in the cache what the one before has left there; but so many that
// their pixels are whole vectors, and worth what a step prepares once for all of them (weights, turned or widened).
void run_steps(const Step* steps, int64_t count, int64_t B, int64_t M, int64_t T) {
    if (M == 0) return;
    int64_t some = 1;
    while (some * M % kLanes || some * M < kLeastPixels) some *= 2;
#pragma omp parallel for num_threads(T) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const int64_t end = B * (t + 1) / T;
        for (int64_t b = B * t / T; b < end; b += some) {
            const int64_t last = b + some < end ? b + some : end;
            for (int64_t i = 0; i < count; ++i) steps[i].run(steps[i].arguments, b * M, last * M);
        }
    }
}

FORWARD(f32, float, Single)
BACKWARD(f32, float, Single)
}
#endif
