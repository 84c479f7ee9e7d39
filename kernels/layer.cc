// The two halves of a decoder layer, each as one operator of the graph.
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

// A float32 matrix in memory that outlives the step; it belongs to the runtime's one operator thread.
class Between {
 public:
  Value matrix(int64_t rows, int64_t columns) {
    const auto size = static_cast<size_t>(rows * columns);
    if (memory_.size() < size) memory_.resize(size);
    return {memory_.data(), "float32", {rows, columns}};
  }

 private:
  std::vector<float> memory_;
};

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

// x + output(attention(qkv(norm(x)))). Inputs: 0 x f32 [T, N]; 1 norm f32 [N + 1]; 2 qkv weight [Q, N]; 3 to 10: inputs 1 to 8
// of PagedAttention (cos_sin, slot_mapping, block_tables, query_lens, context_lens, key_cache, value_cache, constants); 11
// output weight [N, H * D]; optionally 12 bias of qkv f32 [Q], and then 13 bias of the output f32 [N]. Output: f32 [T, N].
int AttentionBlock(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("AttentionBlock", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    require(count >= 13 && count <= 15, "takes 12 to 14 inputs");
    const auto in = [&](int i) { return argument(a, i); };
    const float *constants = a.data<float>(10, "float32", 1);
    require(a.dim(10, 0) >= 5, "constants are missing");
    require(a.rank(0) == 2 && a.rank(2) == 2 && a.rank(3) == 2, "x, the weight of qkv and cos_sin must have rank 2");
    const int64_t heads = static_cast<int64_t>(constants[2]);
    require(heads > 0 && heads < 65536, "the number of heads is wrong");
    static Between projected, attended;
    const Value qkv = projected.matrix(a.dim(0, 0), a.dim(2, 0)), heads_out = attended.matrix(a.dim(0, 0), heads * a.dim(3, 1));
    count > 13 ? call(NormLinear, {in(0), in(1), in(2), in(12), qkv}) : call(NormLinear, {in(0), in(1), in(2), qkv});
    call(PagedAttention, {qkv, in(3), in(4), in(5), in(6), in(7), in(8), in(9), in(10), heads_out});
    const Value y = in(count - 1);
    count > 14 ? call(ResidualLinear, {in(0), heads_out, in(11), in(13), y}) : call(ResidualLinear, {in(0), heads_out, in(11), y});
  });
}

// x + down(silu(gate) * up) of norm(x). Inputs: 0 x f32 [T, N]; 1 norm f32 [N + 1]; 2 weight of gate and up [2 * I, N]; 3 weight
// of down [N, I]. Output: f32 [T, N].
int MLPBlock(int count, void **pointers, int *ranks, int64_t **shapes, const char **dtypes, void *, void *) {
  return guarded("MLPBlock", [&] {
    const Arguments a(count, pointers, ranks, shapes, dtypes);
    a.expect(5);
    const auto in = [&](int i) { return argument(a, i); };
    require(a.rank(0) == 2 && a.rank(2) == 2, "x and the weight of gate and up must have rank 2");
    static Between gated;
    const Value hidden = gated.matrix(a.dim(0, 0), a.dim(2, 0) / 2);
    call(NormGatedLinear, {in(0), in(1), in(2), hidden});
    call(ResidualLinear, {in(0), hidden, in(3), in(4)});
  });
}

std::vector<int64_t> AttentionBlockInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
std::vector<int64_t> MLPBlockInferShape(int *, int64_t **shapes, AotExtra *) { return {shapes[0][0], shapes[0][1]}; }
TypeId AttentionBlockInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }
TypeId MLPBlockInferType(std::vector<TypeId>, AotExtra *) { return kNumberTypeFloat32; }

}  // extern "C"
