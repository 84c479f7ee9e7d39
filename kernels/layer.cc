// A whole decoder layer as one operator of the graph.
//
// Between two operators MindSpore's runtime spends 20 to 40 microseconds, at small batches as long as they run. So the
// operators of linear.cc and paged_attention.cc are called from here one after another, on memory that all layers share and
// that is still in the cache. They check their own arguments.
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
  void *data;
  const char *dtype;
  std::vector<int64_t> shape;
};

// Argument i of the operator that is running.
Value argument(const Arguments &a, int i) {
  Value value{a.raw(i), a.dtype(i), {}};
  for (int axis = 0; axis < a.rank(i); ++axis) value.shape.push_back(a.dim(i, axis));
  return value;
}

// A float32 matrix in memory that all layers share.
Value matrix(std::vector<float> &memory, int64_t rows, int64_t columns) {
  return {room(memory, rows * columns), "float32", {rows, columns}};
}

// Runs an operator; its inputs stand before its output. Throws what it complains of.
void call(Operator *op, std::vector<Value> values) {
  constexpr size_t kMost = 10;
  require(values.size() <= kMost, "an operator has more arguments than there is room for");
  void *pointers[kMost];
  int ranks[kMost];
  int64_t *shapes[kMost];
  const char *dtypes[kMost];
  for (size_t i = 0; i < values.size(); ++i) {
    pointers[i] = values[i].data;
    ranks[i] = static_cast<int>(values[i].shape.size());
    shapes[i] = values[i].shape.data();
    dtypes[i] = values[i].dtype;
  }
  if (op(static_cast<int>(values.size()), pointers, ranks, shapes, dtypes, nullptr, nullptr)) throw std::invalid_argument(last_error_text());
}

}  // namespace
}  // namespace native

extern "C" {

// y = x + output(attention(qkv(norm(x)))), then y + down(silu(gate) * up) of norm(y).
//
// Inputs: 0 x f32 [T, N]; 1 attention norm f32 [N + 1]; 2 qkv weight [Q, N]; 3 to 10: inputs 1 to 8 of PagedAttention (cos_sin,
// slot_mapping, block_tables, query_lens, context_lens, key_cache, value_cache, constants); 11 output weight [N, H * D]; 12
// MLP norm f32 [N + 1]; 13 weight of gate and up [2 * I, N]; 14 weight of down [N, I]; optionally 15 bias of qkv f32 [Q], and
// then 16 bias of the output f32 [N]. Output: f32 [T, N].
int DecoderLayer(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("DecoderLayer", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count >= 16 && count <= 18, "takes 15 to 17 inputs");
    const auto in = [&](int i) { return argument(a, i); };
    const float *constants = a.data<float>(10, "float32", 1);
    require(a.dim(10, 0) >= 5, "constants are missing");
    for (int i : {0, 2, 3, 13}) require(a.rank(i) == 2, "argument " + std::to_string(i) + " must have rank 2");
    require(constants[2] >= 1.f && constants[2] < 65536.f, "the number of heads is wrong");
    const auto heads = static_cast<int64_t>(constants[2]);
    static std::vector<float> projected, attended, halfway, gated;  // of the runtime's one operator thread
    const int64_t tokens = a.dim(0, 0);
    const Value x = in(0), qkv = matrix(projected, tokens, a.dim(2, 0)), y = matrix(halfway, tokens, a.dim(0, 1)), out = in(count - 1);
    const Value heads_out = matrix(attended, tokens, heads * a.dim(3, 1)), hidden = matrix(gated, tokens, a.dim(13, 0) / 2);
    count > 16 ? call(NormLinear, {x, in(1), in(2), in(15), qkv}) : call(NormLinear, {x, in(1), in(2), qkv});
    call(PagedAttention, {qkv, in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10), heads_out});
    count > 17 ? call(ResidualLinear, {x, heads_out, in(11), in(16), y}) : call(ResidualLinear, {x, heads_out, in(11), y});
    call(NormGatedLinear, {y, in(12), in(13), hidden});
    call(ResidualLinear, {y, hidden, in(14), out});
  });
}

std::vector<int64_t> DecoderLayerInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
TypeId DecoderLayerInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }

}  // extern "C"
