// The cosines and sines of a step's positions, worked out once for all layers.
#include <cmath>

#include "operator.h"

// Inputs: 0 positions i32 [T]; 1 frequencies f32 [D / 2], radians a position. Output: f32 [T, D], cosines, then sines.
extern "C" int RotaryAngles(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  using namespace native;
  return guarded("RotaryAngles", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(3);
    const int32_t *positions = a.data<int32_t>(0, "int32", 1);
    const float *frequencies = a.data<float>(1, "float32", 1);
    float *y = a.data<float>(2, "float32", 2);
    const int64_t tokens = a.dim(0, 0), pairs = a.dim(1, 0);
    a.expect_dim(2, 0, tokens);
    a.expect_dim(2, 1, 2 * pairs);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < pairs; ++i) {
        const float angle = static_cast<float>(positions[t]) * frequencies[i];  // float32, as checkpoints' authors do
        y[2 * t * pairs + i] = std::cos(angle);
        y[(2 * t + 1) * pairs + i] = std::sin(angle);
      }
  });
}

extern "C" std::vector<int64_t> RotaryAnglesInferShape(int *, int64_t **shapes, AotExtra *) {
  return {shapes[0][0], shapes[1][0] < 0 ? -1 : 2 * shapes[1][0]};
}

extern "C" TypeId RotaryAnglesInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
