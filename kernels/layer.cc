// Whole decoder layers as one operator of the graph.
//
// Between two operators MindSpore's runtime spends 20 to 40 microseconds, at small batches as long as they run. So the
// operators of linear.cc and paged_attention.cc are called from here one after another, layer by layer, on memory that all
// layers share and that is still in the cache. They check their own arguments.
//
// Every operator here takes x f32 [T, N] first, and those with attention then what layers have in common, inputs 1 to 7 of
// PagedAttention: cos_sin, slot_mapping, block_tables, query_lens, context_lens, key_cache, value_cache.
#include "operator.h"

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

// One argument of an operator.
struct Value {
  static constexpr int kMostAxes = 4;
  void *data;
  const char *dtype;
  int rank;
  int64_t shape[kMostAxes];
};

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

// The first argument that belongs to one layer of AttentionShare.
constexpr int kOwn = 8;

// Norm, qkv, attention and output, added to `residual`. Arguments `own` to `own + 3` are: attention norm f32 [N + 1]; qkv weight
// [Q, N]; constants of PagedAttention; output weight [N, H * D]. From `bias` on: none, the bias of qkv f32 [Q], and that of
// output f32 [N].
void attention(const Arguments &a, const Value &x, int own, int bias, int biases, const Value &residual, const Value &out) {
  const auto in = [&](int i) { return argument(a, i); };
  const float *constants = a.data<float>(own + 2, "float32", 1);
  require(a.dim(own + 2, 0) >= 5, "constants are missing");
  for (int i : {own + 1, 1}) a.expect_rank(i, 2);
  require(constants[2] >= 1.f && constants[2] < 65536.f, "the number of heads is wrong");
  const auto heads = static_cast<int64_t>(constants[2]);
  static std::vector<float> projected, attended;  // of the runtime's one operator thread
  const Value qkv = matrix(projected, x.shape[0], a.dim(own + 1, 0));
  const Value values = matrix(attended, x.shape[0], heads * a.dim(1, 1));
  biases > 0 ? call(NormLinear, {x, in(own), in(own + 1), in(bias), qkv}) : call(NormLinear, {x, in(own), in(own + 1), qkv});
  call(PagedAttention, {qkv, in(1), in(2), in(3), in(4), in(5), in(6), in(7), in(own + 2), values});
  biases > 1 ? call(ResidualLinear, {residual, values, in(own + 3), in(bias + 1), out})
             : call(ResidualLinear, {residual, values, in(own + 3), out});
}

// Norm, gate and up, SwiGLU and down, added to `residual`. Arguments from `first` on: MLP norm f32 [N + 1]; weight of gate and
// up [2 * I, N]; weight of down [N, I].
void mlp(const Arguments &a, const Value &x, int first, const Value &residual, const Value &out) {
  a.expect_rank(first + 1, 2);
  static std::vector<float> gated;
  const Value hidden = matrix(gated, x.shape[0], a.dim(first + 1, 0) / 2);
  call(NormGatedLinear, {x, argument(a, first), argument(a, first + 1), hidden});
  call(ResidualLinear, {residual, hidden, argument(a, first + 2), out});
}

}  // namespace
}  // namespace native

extern "C" {

// Layer after layer: y = x + output(attention(qkv(norm(x)))), then y + down(silu(gate) * up) of norm(y).
//
// Inputs: 0 to 7 as above; 8 layers i32 [1], how many there are; then of each layer in turn: 4 of attention, 3 of mlp and up to
// two biases. Output: f32 [T, N].
int DecoderLayers(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("DecoderLayers", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    constexpr int kFirst = kOwn + 1, kWeights = 7;
    require(count > kFirst, "takes 9 inputs and those of its layers");
    a.expect_rank(0, 2);
    const int32_t *given = a.data<int32_t>(kOwn, "int32", 1);
    a.expect_dim(kOwn, 0, 1);
    const int layers = *given, inputs = count - kFirst - 1, each = layers > 0 ? inputs / layers : 0;
    require(each >= kWeights && each <= kWeights + 2 && each * layers == inputs,
            [&] { return std::to_string(inputs) + " inputs are not 7 to 9 for each of " + std::to_string(layers) + " layers"; });
    static std::vector<float> halfway, between[2];
    const Value y = matrix(halfway, a.dim(0, 0), a.dim(0, 1));
    Value x = argument(a, 0);
    for (int layer = 0; layer < layers; ++layer) {
      const int own = kFirst + layer * each;
      const Value out = layer + 1 < layers ? matrix(between[layer % 2], a.dim(0, 0), a.dim(0, 1)) : argument(a, count - 1);
      attention(a, x, own, own + kWeights, each - kWeights, x, y);
      mlp(a, y, own + 4, y, out);
      x = out;
    }
  });
}

// One rank's share of a layer's first half, which all ranks' sum up to: output(attention(qkv(norm(x)))).
//
// Inputs: 0 to 7 as above; 4 of attention; then up to two biases. Output: f32 [T, N].
int AttentionShare(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("AttentionShare", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count >= 13 && count <= 15, "takes 12 to 14 inputs");
    a.expect_rank(0, 2);
    attention(a, argument(a, 0), kOwn, kOwn + 4, count - 13, zeros(a.dim(0, 0), a.dim(0, 1)), argument(a, count - 1));
  });
}

// The same of its second half: down(silu(gate) * up) of norm(x).
//
// Inputs: 0 x; 1 to 3: of mlp. Output: f32 [T, N].
int MLPShare(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("MLPShare", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(5);
    a.expect_rank(0, 2);
    mlp(a, argument(a, 0), 1, zeros(a.dim(0, 0), a.dim(0, 1)), argument(a, 4));
  });
}

std::vector<int64_t> DecoderLayersInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
std::vector<int64_t> AttentionShareInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
std::vector<int64_t> MLPShareInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
TypeId DecoderLayersInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId AttentionShareInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId MLPShareInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }

}  // extern "C"
