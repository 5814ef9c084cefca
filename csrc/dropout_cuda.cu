// Dropout: a thread draws once and serves eight features.
#include "cuda_vectors.h"
#include "philox.h"

namespace megalora {
namespace {

template <typename T, bool accumulate>
__global__ void dropout_kernel(const T* x, int64_t x_stride, T* out, int64_t out_stride, const int64_t* token,
                               int64_t tokens, int64_t groups, MaskSpec mask) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= tokens * groups) return;
  const int64_t row = i / groups, group = i % groups;
  const auto place = static_cast<uint64_t>(token[row]);
  const auto block = static_cast<uint32_t>(mask.feature_offset / 8 + group);
  const uint32_t step = mask.live_step == nullptr ? mask.step : static_cast<uint32_t>(__ldg(mask.live_step));
  const PhiloxWords w = philox4x32({static_cast<uint32_t>(place), block, step, static_cast<uint32_t>(place >> 32)},
                                   mask.key0, mask.site);
  const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
  constexpr int size = Vector<T>::size;
#pragma unroll
  for (int part = 0; part < 8; part += size) {
    const auto in = load(x + row * x_stride + 8 * group + part);
    T* target = out + row * out_stride + 8 * group + part;
    Vector<T> result;
    if (accumulate) result = load(target);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const int feature = part + j;
      const uint32_t lane = (words[feature / 2] >> (16 * (feature % 2))) & 0xFFFF;
      const float product = __fmul_rn(to_float(in.at[j]), mask.scale);
      const T kept = from_float<T>(accumulate ? __fadd_rn(to_float(result.at[j]), product) : product);
      if (lane >= mask.threshold) {
        result.at[j] = kept;
      } else if (!accumulate) {
        result.at[j] = from_float<T>(0.f);
      }
    }
    store(target, result);
  }
}

}  // namespace

void launch_dropout(Type type, bool accumulate, const void* x, int64_t x_stride, void* out, int64_t out_stride,
                    const int64_t* token, int64_t tokens, int64_t features, MaskSpec mask, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = accumulate ? dropout_kernel<T, true> : dropout_kernel<T, false>;
    kernel<<<blocks_for(tokens * features / 8, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(x), x_stride, static_cast<T*>(out), out_stride, token, tokens, features / 8, mask);
  });
}

}  // namespace megalora
