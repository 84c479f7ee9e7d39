// Whole decoder layers as one operator of the graph.
//
// Between two operators MindSpore's runtime spends 20 to 40 microseconds, at small batches as long as they run. So the
// operators of linear.cc and paged_attention.cc are called from here one after another, layer by layer, on memory that all
// layers share and that is still in the cache. They check their own arguments.
//
// Every operator here takes x f32 [T, N] first, and those with attention then what layers have in common, inputs 1 to 7 of
// PagedAttention: cos_sin, slot_mapping, block_tables, query_lens, context_lens, key_cache, value_cache.
#include "bundle.h"

using namespace native;

extern "C" {

int NormLinear(int, void **, int *, int64_t **, const char **, void *, void *);
int NormGatedLinear(int, void **, int *, int64_t **, const char **, void *, void *);
int ResidualLinear(int, void **, int *, int64_t **, const char **, void *, void *);
int PagedAttention(int, void **, int *, int64_t **, const char **, void *, void *);

}  // extern "C"

namespace native {
namespace {

using Operator = decltype(NormLinear);

// Argument i of the operator that is running.
Value argument(const Arguments &a, int i) {
  require(a.rank(i) <= Value::kMostAxes, "an argument has more axes than any operator takes");
  Value value{a.raw(i), a.dtype(i), a.rank(i), {}};
  for (int axis = 0; axis < value.rank; ++axis) value.shape[axis] = a.dim(i, axis);
  return value;
}

// A float32 matrix in memory that all layers share.
Value matrix(std::vector<float> &memory, int64_t rows, int64_t columns) {
  return {room(memory, rows * columns), "float32", 2, {rows, columns}};
}

// Runs an operator; its inputs stand before its output. Throws what it complains of.
template <int N>
void call(Operator *op, Value (&&values)[N]) {
  void *pointers[N];
  int ranks[N];
  int64_t *shapes[N];
  const char *dtypes[N];
  for (int i = 0; i < N; ++i) {
    pointers[i] = values[i].data;
    ranks[i] = values[i].rank;
    shapes[i] = values[i].shape;
    dtypes[i] = values[i].dtype;
  }
  if (op(N, pointers, ranks, shapes, dtypes, nullptr, nullptr)) throw std::invalid_argument(last_error());
}

// Zeros of that shape, in memory that all layers share: the residual of a rank that leaves it to another one.
Value zeros(int64_t rows, int64_t columns) {
  static std::vector<float> memory;
  if (memory.size() < static_cast<size_t>(rows * columns)) memory.resize(rows * columns, 0.f);
  return {memory.data(), "float32", 2, {rows, columns}};
}

// Where each weight stands in a layer's bundle; the biases that it has follow: of qkv f32 [Q], or also of output f32 [N].
enum LayerWeight : int64_t {
  kAttentionNorm,  // f32 [N + 1]
  kQkv,            // [Q, N]
  kConstants,      // of PagedAttention
  kOutput,         // [N, H * D]
  kMlpNorm,        // f32 [N + 1]
  kGateUp,         // [2 * I, N]
  kDown,           // [N, I]
  kQkvBias,
  kOutputBias,
};

// The first argument that belongs to one layer: its bundle.
constexpr int kOwn = 8;

// The weights of the layer that is argument i.
Bundle layer_weights(const Arguments &a, int i) {
  const Bundle weights(a, i);
  require(weights.count() >= kQkvBias && weights.count() <= kOutputBias + 1,
          [&] { return "a layer has 7 to 9 weights, argument " + std::to_string(i) + " " + std::to_string(weights.count()); });
  return weights;
}

// Norm, qkv, attention and output, added to `residual`.
void attention(const Arguments &a, const Value &x, const Bundle &weights, const Value &residual, const Value &out) {
  const auto in = [&](int i) { return argument(a, i); };
  const Value constants = weights[kConstants], qkv = weights[kQkv], output = weights[kOutput];
  const auto *numbers = static_cast<const float *>(constants.data);
  require(constants.rank == 1 && std::strcmp(constants.dtype, "float32") == 0 && constants.shape[0] >= 5, "constants are missing");
  require(numbers[2] >= 1.f && numbers[2] < 65536.f, "the number of heads is wrong");
  a.expect_rank(1, 2);
  const auto heads = static_cast<int64_t>(numbers[2]);
  static std::vector<float> projected, attended;  // of the runtime's one operator thread
  const Value heads_in = matrix(projected, x.shape[0], qkv.shape[0]), heads_out = matrix(attended, x.shape[0], heads * a.dim(1, 1));
  weights.count() > kQkvBias ? call(NormLinear, {x, weights[kAttentionNorm], qkv, weights[kQkvBias], heads_in})
                             : call(NormLinear, {x, weights[kAttentionNorm], qkv, heads_in});
  call(PagedAttention, {heads_in, in(1), in(2), in(3), in(4), in(5), in(6), in(7), constants, heads_out});
  weights.count() > kOutputBias ? call(ResidualLinear, {residual, heads_out, output, weights[kOutputBias], out})
                                : call(ResidualLinear, {residual, heads_out, output, out});
}

// Norm, gate and up, SwiGLU and down, added to `residual`.
void mlp(const Value &x, const Bundle &weights, const Value &residual, const Value &out) {
  const Value gate_up = weights[kGateUp];
  static std::vector<float> gated;
  const Value hidden = matrix(gated, x.shape[0], gate_up.shape[0] / 2);
  call(NormGatedLinear, {x, weights[kMlpNorm], gate_up, hidden});
  call(ResidualLinear, {residual, hidden, weights[kDown], out});
}

}  // namespace
}  // namespace native

extern "C" {

// Layer after layer: y = x + output(attention(qkv(norm(x)))), then y + down(silu(gate) * up) of norm(y).
//
// Inputs: 0 to 7 as above; then the bundle of each layer. Output: f32 [T, N].
int DecoderLayers(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("DecoderLayers", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count > kOwn + 1, "takes 8 inputs and a bundle for each layer");
    a.expect_rank(0, 2);
    static std::vector<float> halfway, between[2];
    const Value y = matrix(halfway, a.dim(0, 0), a.dim(0, 1));
    Value x = argument(a, 0);
    for (int i = kOwn; i < count - 1; ++i) {
      const Bundle weights = layer_weights(a, i);
      const Value out = i + 1 < count - 1 ? matrix(between[i % 2], a.dim(0, 0), a.dim(0, 1)) : argument(a, count - 1);
      attention(a, x, weights, x, y);
      mlp(y, weights, y, out);
      x = out;
    }
  });
}

// One rank's share of a layer's first half, which all ranks' sum up to: output(attention(qkv(norm(x)))).
//
// Inputs: 0 to 7 as above; 8 the layer's bundle. Output: f32 [T, N].
int AttentionShare(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("AttentionShare", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(kOwn + 2);
    a.expect_rank(0, 2);
    attention(a, argument(a, 0), layer_weights(a, kOwn), zeros(a.dim(0, 0), a.dim(0, 1)), argument(a, kOwn + 1));
  });
}

// The same of its second half: down(silu(gate) * up) of norm(x).
//
// Inputs: 0 x; 1 the layer's bundle. Output: f32 [T, N].
int MLPShare(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("MLPShare", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(3);
    a.expect_rank(0, 2);
    mlp(argument(a, 0), layer_weights(a, 1), zeros(a.dim(0, 0), a.dim(0, 1)), argument(a, 2));
  });
}

std::vector<int64_t> DecoderLayersInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
std::vector<int64_t> AttentionShareInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
std::vector<int64_t> MLPShareInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
TypeId DecoderLayersInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId AttentionShareInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId MLPShareInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }

}  // extern "C"
