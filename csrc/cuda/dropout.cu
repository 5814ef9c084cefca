// Dropout: a thread draws once and serves eight features.
#include "cuda/launch.h"
#include "cuda/vectors.h"
#include "philox.h"

namespace megalora {
namespace {

// scale: of the mask, in the type of the arithmetic.
template <typename T, bool accumulate>
__global__ void dropout_kernel(DropoutParams params, float scale) {
  const Mask& mask = params.mask;
  const int64_t groups = params.features / 8, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= params.tokens * groups) return;
  const int64_t row = i / groups, group = i % groups;
  const auto place = static_cast<uint64_t>(mask.token[row]);
  const auto block = static_cast<uint32_t>(mask.feature_offset / 8 + group);
  const uint32_t step = mask.live_step == nullptr ? mask.step : static_cast<uint32_t>(__ldg(mask.live_step));
  const PhiloxWords w =
      philox4x32({static_cast<uint32_t>(place), block, step, static_cast<uint32_t>(place >> 32)}, mask.key, mask.site);
  const uint32_t words[4] = {w.w0, w.w1, w.w2, w.w3};
  constexpr int size = Vector<T>::size;
#pragma unroll
  for (int part = 0; part < 8; part += size) {
    const auto in = load(static_cast<const T*>(params.in.data) + row * params.in.stride + 8 * group + part);
    T* target = static_cast<T*>(params.out.data) + row * params.out.stride + 8 * group + part;
    Vector<T> result;
    if (accumulate) result = load(target);
#pragma unroll
    for (int j = 0; j < size; ++j) {
      const int feature = part + j;
      const uint32_t lane = (words[feature / 2] >> (16 * (feature % 2))) & 0xFFFF;
      const float product = __fmul_rn(to_float(in.at[j]), scale);
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

void launch_dropout(const DropoutParams& params, cudaStream_t stream) {
  dispatch(params.type, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = params.accumulate ? dropout_kernel<T, true> : dropout_kernel<T, false>;
    kernel<<<blocks_for(params.tokens * params.features / 8, kThreads), kThreads, 0, stream>>>(
        params, static_cast<float>(params.mask.scale));
  });
}

}  // namespace megalora
