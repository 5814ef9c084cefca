// Heads and their rotation: a thread takes one vector of the first half of a head and its partner in the second half.
// Tokens are the grid's first dimension: dividing 64-bit numbers to find them took longer than the memory.
#include "cuda/decode_step.h"
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace megalora {
namespace {

constexpr int kRopeThreads = 128;

template <typename T, bool backward>
__global__ void split_rope_kernel(const __grid_constant__ SplitRopeParams params, int heads, int kv_heads,
                                  int head_dim) {
  let_next_start();
  await_previous();
  constexpr int each = Vector<T>::size;
  const int half = head_dim / 2, parts = half / each, all = heads + 2 * kv_heads;
  const unsigned i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= static_cast<unsigned>(all * parts)) return;
  const int part = i % parts * each, head = i / parts;
  const int64_t token = blockIdx.x;
  T* whole = static_cast<T*>(params.qkv) + (token * all + head) * head_dim + part;
  const bool in_q = head < heads, in_k = !in_q && head < heads + kv_heads;
  const Heads& side = in_q ? params.q : in_k ? params.k : params.v;
  const int place = in_q ? head : in_k ? head - heads : head - heads - kv_heads;
  T* apart = static_cast<T*>(side.data) + token * side.token_stride + place * side.head_stride + part;
  const T* from = backward ? apart : whole;
  T* to = backward ? whole : apart;
  auto first = load(from), second = load(from + half);
  if (in_q || in_k) {
    const int64_t angle = token * half + part;
    const auto c = load(static_cast<const T*>(params.cos) + angle);
    const auto s = load(static_cast<const T*>(params.sin) + angle);
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const float a = to_float(first.at[j]), b = to_float(second.at[j]), cj = to_float(c.at[j]);
      const float sj = backward ? -to_float(s.at[j]) : to_float(s.at[j]);
      first.at[j] = from_float<T>(a * cj - b * sj);
      second.at[j] = from_float<T>(b * cj + a * sj);
    }
  }
  store(to, first);
  store(to + half, second);
}

}  // namespace

void launch_split_rope(const SplitRopeParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    const auto heads = static_cast<int>(params.q.count), kv_heads = static_cast<int>(params.k.count);
    const auto head_dim = static_cast<int>(params.head_dim);  // 32-bit numbers divide faster
    const int64_t work = int64_t{heads + 2 * kv_heads} * (head_dim / 2 / Vector<T>::size);
    const auto kernel = params.backward ? split_rope_kernel<T, true> : split_rope_kernel<T, false>;
    const dim3 grid(static_cast<unsigned>(params.tokens), blocks_for(work, kRopeThreads));
    launch_following(kernel, grid, kRopeThreads, params.tokens, stream, params, heads, kv_heads, head_dim);
  });
}

}  // namespace megalora
