// The memory-bound ops of a step: each reads its inputs once, 16 bytes a thread at a time, computes in float32 and writes
// once. Sums go through shuffles and shared memory in one order, so equal inputs give equal bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "elementwise.h"
#include "philox.h"

namespace megalora {
namespace {

template <typename T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

template <typename T>
__device__ __forceinline__ Vector<T> load(const T* p) {
  Vector<T> v;
  *reinterpret_cast<uint4*>(&v) = *reinterpret_cast<const uint4*>(p);
  return v;
}
template <typename T>
__device__ __forceinline__ void store(T* p, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }

// Calls `body` with a value of the element type.
template <typename Body>
void dispatch(Type type, Body body) {
  switch (type) {
    case Type::bfloat16: return body(__nv_bfloat16{});
    case Type::float16: return body(__half{});
    case Type::float32: return body(float{});
  }
}

unsigned blocks_for(int64_t work, int64_t each) { return static_cast<unsigned>((work + each - 1) / each); }

// ---- dropout: a thread draws once and serves eight features

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

// ---- sums over the threads of a row

template <int threads>
__device__ __forceinline__ float row_sum(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
  if (threads == 32) return value;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < threads / 32; ++warp) total += scratch[warp];
  __syncthreads();
  return total;
}

// `threads` threads hold a row in registers, `held` vectors each. Rows of 32 threads stand several to a block.
template <typename T, int threads, int held>
__global__ void rms_norm_kernel(const T* x, const T* delta, const T* weight, float eps, T* sum, T* y, int64_t y_stride,
                                float* inverse, int64_t rows, int64_t size, int64_t x_stride) {
  __shared__ float scratch[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
  const int lane = threadIdx.x % threads;
  if (row >= rows) return;  // whole warps only: a block of one row never gets here
  Vector<T> kept[held];
  float squares = 0;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      kept[h] = load(x + row * x_stride + at);
      if (delta != nullptr) {
        const auto more = load(delta + row * size + at);
#pragma unroll
        for (int j = 0; j < each; ++j) kept[h].at[j] = from_float<T>(to_float(kept[h].at[j]) + to_float(more.at[j]));
        store(sum + row * size + at, kept[h]);
      }
#pragma unroll
      for (int j = 0; j < each; ++j) squares += to_float(kept[h].at[j]) * to_float(kept[h].at[j]);
    }
  }
  const float r = rsqrtf(row_sum<threads>(squares, scratch) / static_cast<float>(size) + eps);
  if (lane == 0) inverse[row] = r;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      const auto w = load(weight + at);
      Vector<T> out;
#pragma unroll
      for (int j = 0; j < each; ++j) {  // rounded before the weight, as HF does
        out.at[j] = from_float<T>(to_float(w.at[j]) * to_float(from_float<T>(to_float(kept[h].at[j]) * r)));
      }
      store(y + row * y_stride + at, out);
    }
  }
}

template <typename T, int threads, int held>
__global__ void rms_norm_backward_kernel(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const T* weight,
                                         const float* inverse, const T* residual, T* dx, int64_t rows, int64_t size) {
  __shared__ float scratch[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = threads == 32 ? blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32 : blockIdx.x;
  const int lane = threadIdx.x % threads;
  if (row >= rows) return;
  const float r = inverse[row];
  Vector<T> xs[held], ds[held];
  float dot = 0;
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      xs[h] = load(x + row * x_stride + at);
      ds[h] = load(dy + row * dy_stride + at);
      const auto w = load(weight + at);
#pragma unroll
      for (int j = 0; j < each; ++j) {
        dot += to_float(ds[h].at[j]) * to_float(w.at[j]) * to_float(xs[h].at[j]) * r;
      }
    }
  }
  const float mean = row_sum<threads>(dot, scratch) / static_cast<float>(size);
#pragma unroll
  for (int h = 0; h < held; ++h) {
    const int64_t at = (int64_t{h} * threads + lane) * each;
    if (at < size) {
      const auto w = load(weight + at);
      Vector<T> before, out;
      if (residual != nullptr) before = load(residual + row * size + at);
#pragma unroll
      for (int j = 0; j < each; ++j) {
        const float dn = to_float(ds[h].at[j]) * to_float(w.at[j]);
        float d = r * (dn - to_float(xs[h].at[j]) * r * mean);
        if (residual != nullptr) d += to_float(before.at[j]);
        out.at[j] = from_float<T>(d);
      }
      store(dx + row * size + at, out);
    }
  }
}

// Calls `body` with the threads of a row and the vectors that each holds, as integral constants.
template <int threads_, int held_>
struct Shape {
  static constexpr int threads = threads_, held = held_;
};
template <typename T, typename Body>
void with_row_shape(int64_t size, Body body) {
  const int64_t vectors = size / Vector<T>::size;
  if (vectors <= 32) return body(Shape<32, 1>{});
  if (vectors <= 64) return body(Shape<32, 2>{});
  if (vectors <= 256) return body(Shape<256, 1>{});
  if (vectors <= 512) return body(Shape<256, 2>{});
  if (vectors <= 1024) return body(Shape<256, 4>{});
  return body(Shape<512, 8>{});  // up to 32768 elements of 16 bits, 16384 floats
}

// ---- SwiGLU

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <typename T>
__global__ void swiglu_kernel(const T* gate_up, T* out, int64_t out_stride, int64_t rows, int64_t size) {
  constexpr int each = Vector<T>::size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const auto gate = load(gate_up + row * 2 * size + at), up = load(gate_up + row * 2 * size + size + at);
  Vector<T> y;
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const float g = to_float(gate.at[j]);
    y.at[j] = from_float<T>(to_float(from_float<T>(g * sigmoid(g))) * to_float(up.at[j]));
  }
  store(out + row * out_stride + at, y);
}

template <typename T>
__global__ void swiglu_backward_kernel(const T* dy, int64_t dy_stride, const T* gate_up, T* grad, int64_t rows,
                                       int64_t size) {
  constexpr int each = Vector<T>::size;
  const int64_t groups = size / each, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= rows * groups) return;
  const int64_t row = i / groups, at = i % groups * each;
  const int64_t first = row * 2 * size + at;
  const auto gate = load(gate_up + first), up = load(gate_up + first + size), d = load(dy + row * dy_stride + at);
  Vector<T> dgate, dup;
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const float g = to_float(gate.at[j]), s = sigmoid(g), dj = to_float(d.at[j]);
    dup.at[j] = from_float<T>(dj * (g * s));
    dgate.at[j] = from_float<T>(dj * to_float(up.at[j]) * s * (1.f + g * (1.f - s)));
  }
  store(grad + first, dgate);
  store(grad + first + size, dup);
}

// ---- heads and rotation: a thread takes one vector of the first half of a head and its partner in the second half

template <typename T, bool backward>
__global__ void split_rope_kernel(T* qkv, Heads q, Heads k, Heads v, const T* cos, const T* sin, int64_t tokens, int heads,
                                  int kv_heads, int head_dim) {
  constexpr int each = Vector<T>::size;
  const int half = head_dim / 2, parts = half / each, all = heads + 2 * kv_heads;
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= tokens * all * parts) return;
  const int part = i % parts * each, head = i / parts % all;
  const int64_t token = i / parts / all;
  T* whole = qkv + (token * all + head) * head_dim + part;
  const bool in_q = head < heads, in_k = !in_q && head < heads + kv_heads;
  const Heads& side = in_q ? q : in_k ? k : v;
  const int place = in_q ? head : in_k ? head - heads : head - heads - kv_heads;
  T* apart = static_cast<T*>(side.data) + token * side.token_stride + place * side.head_stride + part;
  const T* from = backward ? apart : whole;
  T* to = backward ? whole : apart;
  auto first = load(from), second = load(from + half);
  if (in_q || in_k) {
    const auto c = load(cos + token * half + part), s = load(sin + token * half + part);
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

// ---- cross entropy: one block a row

constexpr int kLossThreads = 1024;

__device__ __forceinline__ void merge(float& max, float& sum, float other_max, float other_sum) {
  const float top = fmaxf(max, other_max);
  sum = (sum == 0.f ? 0.f : sum * __expf(max - top)) + (other_sum == 0.f ? 0.f : other_sum * __expf(other_max - top));
  max = top;
}

template <typename T>
__global__ void cross_entropy_stats_kernel(const T* logits, int64_t row_stride, const int64_t* label, float* stats,
                                           int64_t rows, int64_t vocab) {
  __shared__ float maxima[32], sums[32];
  constexpr int each = Vector<T>::size;
  const int64_t row = blockIdx.x;
  const T* line = logits + row * row_stride;
  float max = -INFINITY, sum = 0;
  for (int64_t at = int64_t{threadIdx.x} * each; at < vocab; at += kLossThreads * each) {
    Vector<T> v;
    const int count = vocab - at < each ? static_cast<int>(vocab - at) : each;
    if (count == each) {
      v = load(line + at);
    } else {
      for (int j = 0; j < count; ++j) v.at[j] = line[at + j];
    }
    float top = -INFINITY;
    for (int j = 0; j < each; ++j) {
      if (j < count) top = fmaxf(top, to_float(v.at[j]));
    }
    float part = 0;
    for (int j = 0; j < each; ++j) {
      if (j < count) part += __expf(to_float(v.at[j]) - top);
    }
    merge(max, sum, top, part);
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    merge(max, sum, __shfl_down_sync(0xFFFFFFFF, max, offset), __shfl_down_sync(0xFFFFFFFF, sum, offset));
  }
  if (threadIdx.x % 32 == 0) {
    maxima[threadIdx.x / 32] = max;
    sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kLossThreads / 32; ++warp) merge(max, sum, maxima[warp], sums[warp]);
    const int64_t place = label[row];
    stats[row] = max;
    stats[rows + row] = sum;
    stats[2 * rows + row] = place >= 0 && place < vocab ? to_float(line[place]) : 0.f;
  }
}

template <typename T>
__global__ void cross_entropy_grad_kernel(T* logits, int64_t row_stride, const int64_t* label, const float* max,
                                          const float* total, int64_t vocab) {
  constexpr int each = Vector<T>::size;
  const int64_t row = blockIdx.x;
  T* line = logits + row * row_stride;
  const float top = max[row], inverse = 1.f / total[row];
  const int64_t place = label[row];
  constexpr int ahead = 4;  // loads in flight before the first store, which they may not pass
  for (int64_t first = int64_t{threadIdx.x} * each; first < vocab; first += ahead * kLossThreads * each) {
    Vector<T> v[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int64_t at = first + k * kLossThreads * each;
      if (at + each <= vocab) {
        v[k] = load(line + at);
      } else {
        for (int j = 0; j < each; ++j) v[k].at[j] = at + j < vocab ? line[at + j] : from_float<T>(0.f);
      }
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const int64_t at = first + k * kLossThreads * each;
#pragma unroll
      for (int j = 0; j < each; ++j) {
        v[k].at[j] = from_float<T>(__expf(to_float(v[k].at[j]) - top) * inverse - (at + j == place ? 1.f : 0.f));
      }
      if (at + each <= vocab) {
        store(line + at, v[k]);
      } else {
        for (int j = 0; j < each; ++j) {
          if (at + j < vocab) line[at + j] = v[k].at[j];
        }
      }
    }
  }
}

constexpr int kThreads = 256;

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

void launch_rms_norm(Type type, const void* x, const void* delta, const void* weight, float eps, void* sum, void* y,
                     int64_t y_stride, float* inverse, int64_t rows, int64_t size, int64_t x_stride, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(size, [&](auto shape) {
      constexpr int threads = decltype(shape)::threads, held = decltype(shape)::held;
      const int block = threads == 32 ? 256 : threads;
      rms_norm_kernel<T, threads, held>
          <<<blocks_for(rows, block / threads), block, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(x), static_cast<const T*>(delta), static_cast<const T*>(weight), eps,
              static_cast<T*>(sum), static_cast<T*>(y), y_stride, inverse, rows, size, x_stride);
    });
  });
}

void launch_rms_norm_backward(Type type, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                              const void* weight, const float* inverse, const void* residual, void* dx, int64_t rows,
                              int64_t size, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    with_row_shape<T>(size, [&](auto shape) {
      constexpr int threads = decltype(shape)::threads, held = decltype(shape)::held;
      const int block = threads == 32 ? 256 : threads;
      rms_norm_backward_kernel<T, threads, held>
          <<<blocks_for(rows, block / threads), block, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride, static_cast<const T*>(weight),
              inverse, static_cast<const T*>(residual), static_cast<T*>(dx), rows, size);
    });
  });
}

void launch_swiglu(Type type, const void* gate_up, void* out, int64_t out_stride, int64_t rows, int64_t size,
                   void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    swiglu_kernel<T><<<blocks_for(rows * size / Vector<T>::size, kThreads), kThreads, 0,
                       static_cast<cudaStream_t>(stream)>>>(static_cast<const T*>(gate_up), static_cast<T*>(out),
                                                            out_stride, rows, size);
  });
}

void launch_swiglu_backward(Type type, const void* dy, int64_t dy_stride, const void* gate_up, void* grad, int64_t rows,
                            int64_t size, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    swiglu_backward_kernel<T><<<blocks_for(rows * size / Vector<T>::size, kThreads), kThreads, 0,
                                static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(dy), dy_stride, static_cast<const T*>(gate_up), static_cast<T*>(grad), rows, size);
  });
}

void launch_split_rope(Type type, bool backward, void* qkv, Heads q, Heads k, Heads v, const void* cos, const void* sin,
                       int64_t tokens, int heads, int kv_heads, int head_dim, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t work = tokens * (heads + 2 * kv_heads) * (head_dim / 2 / Vector<T>::size);
    const auto kernel = backward ? split_rope_kernel<T, true> : split_rope_kernel<T, false>;
    kernel<<<blocks_for(work, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<T*>(qkv), q, k, v, static_cast<const T*>(cos), static_cast<const T*>(sin), tokens, heads, kv_heads,
        head_dim);
  });
}

void launch_cross_entropy_stats(Type type, const void* logits, int64_t row_stride, const int64_t* label, float* stats,
                                int64_t rows, int64_t vocab, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    cross_entropy_stats_kernel<T><<<static_cast<unsigned>(rows), kLossThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(logits), row_stride, label, stats, rows, vocab);
  });
}

void launch_cross_entropy_grad(Type type, void* logits, int64_t row_stride, const int64_t* label, const float* max,
                               const float* total, int64_t rows, int64_t vocab, void* stream) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    cross_entropy_grad_kernel<T><<<static_cast<unsigned>(rows), kLossThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<T*>(logits), row_stride, label, max, total, vocab);
  });
}

}  // namespace megalora
