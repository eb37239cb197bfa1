// The first steps of the ladder, each the simplest form of one idea. They exist to be read and compared, not to be
// fast.
//
//   naive        one block a (query head, row), CUDA cores, each lane reads its own columns of K and V from global
//   memory split        the same kernel over `splits` parts of the context, and a second kernel that combines them
//   tensor_core  one block a (kv head, row, part): the group shares every K and V tile, staged in shared memory, on
//   tensor cores
//
// Partials of a (row, query head, part) are O [head_dim], max, sum.
#include "common/cuda_check.h"
#include "decode_attn/ladder.h"
#include "decode_attn/merge.cuh"
#include "decode_attn/tile_load.cuh"

namespace decode_attn {
namespace {

constexpr int kNaiveWarps = 4;

struct Part {
    int begin, end, index;  // tokens; position of the partial
    __device__ Part(const Params& p, int row, int head, int num_heads) {
        const int tokens = max(p.lengths[row], 0),
                  per_part = ceil_div(ceil_div(tokens, kBlockSize), gridDim.z) * kBlockSize;
        begin = min(int(blockIdx.z) * per_part, tokens);
        end = min(begin + per_part, tokens);
        index = (row * num_heads + head) * gridDim.z + blockIdx.z;
    }
};

__device__ int64_t block_of(const Params& p, int row, int index) {
    return p.block_table ? p.block_table[row * p.stride_table_row + index]
                         : (p.slots ? p.slots[row] : row) * p.blocks_per_slot + index;
}

// Either the output (one part) or a partial for combine_kernel.
template <typename T>
__device__ void deliver(const Params& p, const SoftmaxState& state, float o, int row, int head, int column,
                        int head_dim, int part_index) {
    if (gridDim.z == 1) {
        static_cast<T*>(p.out)[row * p.stride_out_row + head * p.stride_out_head + column] = o * state.normalizer();
        if (p.lse && column == 0) p.lse[row * (p.num_kv_heads * p.group) + head] = state.log_sum_exp();
        return;
    }
    float* partial = p.partials + int64_t(part_index) * (head_dim + 2);
    partial[column] = o;
    if (column == 0) partial[head_dim] = state.max, partial[head_dim + 1] = state.sum;
}

// Grid (num_heads, batch, parts). Warp w takes the tokens w, w + 4, ... of the part; a lane holds columns lane, lane +
// 32, ...
template <typename T, int kHeadDim>
__global__ void naive_kernel(const __grid_constant__ Params p) {
    constexpr int kColumns = kHeadDim / 32;
    __shared__ float merged_o[kNaiveWarps][kHeadDim];
    __shared__ SoftmaxState merged_state[kNaiveWarps];
    const int head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32,
              kv_head = head / p.group;
    const Part part(p, row, head, gridDim.x);

    float q[kColumns], o[kColumns] = {};
    SoftmaxState state = SoftmaxState::empty();
    for (int i = 0; i < kColumns; ++i) {
        q[i] = float(static_cast<const T*>(p.q)[row * p.stride_q_row + head * p.stride_q_head + lane + 32 * i]) *
               p.scale_log2;
    }
    for (int token = part.begin + warp; token < part.end; token += kNaiveWarps) {
        const int64_t block = block_of(p, row, token / kBlockSize), inside = token % kBlockSize;
        const T* k = static_cast<const T*>(p.k_cache) + block * p.stride_k_block + kv_head * p.stride_k_head +
                     inside * p.stride_k_token;
        const T* v = static_cast<const T*>(p.v_cache) + block * p.stride_v_block + kv_head * p.stride_v_head +
                     inside * p.stride_v_token;
        float score = 0.0f;
        for (int i = 0; i < kColumns; ++i) score += q[i] * float(k[lane + 32 * i]);
        for (int distance = 16; distance; distance /= 2) score += __shfl_xor_sync(~0u, score, distance);
        const float factor = state.rescale(fmaxf(state.max, score)), weight = exp2_fast(score - state.max);
        state.sum += weight;
        for (int i = 0; i < kColumns; ++i) o[i] = o[i] * factor + weight * float(v[lane + 32 * i]);
    }

    if (lane == 0) merged_state[warp] = state;
    for (int i = 0; i < kColumns; ++i) merged_o[warp][lane + 32 * i] = o[i];
    __syncthreads();
    SoftmaxState total = SoftmaxState::empty();
    for (const SoftmaxState& other : merged_state) total.max = fmaxf(total.max, other.max);
    for (const SoftmaxState& other : merged_state) total.sum += other.factor(total.max) * other.sum;
    for (int column = threadIdx.x; column < kHeadDim; column += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < kNaiveWarps; ++w) sum += merged_state[w].factor(total.max) * merged_o[w][column];
        deliver<T>(p, total, sum, row, head, column, kHeadDim, part.index);
    }
}

// One head's vector as 16-column fragments: columns 16 i + c and 16 i + 8 + c, c = 2 * (lane % 4). `head` null: zeros.
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_vector(uint32_t (&b)[kHeadDim / 16][2], const T* head, int lane) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            b[i][half] =
                head ? __ldg(reinterpret_cast<const uint32_t*>(head + 16 * i + 8 * half + 2 * (lane & 3))) : 0u;
        }
    }
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void load_query(QueryFragments<kHeadDim>& q, const Params& p, int row, int kv_head,
                                           int lane) {
    const int head = lane / 4;  // within the group
    const T* source = static_cast<const T*>(p.q) + row * p.stride_q_row + (kv_head * p.group + head) * p.stride_q_head;
    load_vector<T, kHeadDim>(q.b, head < p.group ? source : nullptr, lane);
}

// Grid (num_kv_heads, batch, parts), kComputeThreads threads: kTileGroups tiles at a time, load, wait, compute, wait.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kComputeThreads) tensor_core_kernel(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr int kTileBytes = tile_bytes(kHeadDim), kChunks = kHeadDim / 8;
    const int kv_head = blockIdx.x, row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_heads = gridDim.x * p.group;
    const Part part(p, row, 0, num_heads);
    const SliceAddress<kHeadDim> at(warp, lane);
    const int group = warp / kWarpsPerTile, slice = warp % kWarpsPerTile;
    __shared__ TileExchange tile_exchange[kTileGroups];
    __shared__ GroupExchange group_exchange;
    const uint32_t tiles = common::shared_address(memory);  // K, V, K, V
    QueryFragments<kHeadDim> q;
    auto state = GroupState<kHeadDim>::empty();
    load_query<T, kHeadDim>(q, p, row, kv_head, lane);
    for (int first = part.begin; first < part.end; first += kTileGroups * kBlockSize) {
        for (int i = threadIdx.x; i < kTileGroups * kBlockSize * kChunks; i += kComputeThreads) {
            const int group = i / (kBlockSize * kChunks), token = i / kChunks % kBlockSize, chunk = i % kChunks;
            if (first + group * kBlockSize + token >= part.end) continue;
            const int64_t block = block_of(p, row, first / kBlockSize + group);
            const T* k = static_cast<const T*>(p.k_cache) + block * p.stride_k_block + kv_head * p.stride_k_head +
                         token * p.stride_k_token;
            const T* v = static_cast<const T*>(p.v_cache) + block * p.stride_v_block + kv_head * p.stride_v_head +
                         token * p.stride_v_token;
            unsigned char* place = memory + group * 2 * kTileBytes + staged_offset(token, chunk);
            *reinterpret_cast<uint4*>(place) = *reinterpret_cast<const uint4*>(k + chunk * 8);
            *reinterpret_cast<uint4*>(place + kTileBytes) = *reinterpret_cast<const uint4*>(v + chunk * 8);
        }
        __syncthreads();
        const int tokens = part.end - first - warp * kSliceTokens;
        const uint32_t tile = tiles + group * 2 * kTileBytes;
        float s[4];
        slice_scores<T, kHeadDim>(s, q, tile, at);
        exchange_max(s, tokens, p.scale_log2, tile_exchange[group], slice, lane);
        __syncthreads();
        const bool any = part.end - first > group * kBlockSize;  // otherwise there is no maximum
        if (any) exchange_weights<T, kHeadDim>(state, s, tile_exchange[group], slice, lane);
        if (tokens < kSliceTokens) clear_values<kHeadDim>(tile + kTileBytes, tokens, slice, lane);
        __syncthreads();
        if (any)
            add_values<T, kHeadDim>(state, common::shared_address(tile_exchange[group].weights), tile + kTileBytes, at,
                                    lane);
        __syncthreads();
    }
    Result result;
    const int first_column = merge_groups<kHeadDim>(result, state, group_exchange, [] { __syncthreads(); }, warp, lane);
    if (first_column < 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int head = 2 * (lane & 3) + i % 2, column = first_column + lane / 4 + i / 2 * 8;
        if (head >= p.group) continue;
        const int out_head = kv_head * p.group + head, index = part.index + out_head * gridDim.z;
        const SoftmaxState total =
            part.begin < part.end ? SoftmaxState{result.max[i % 2], result.sum[i % 2]} : SoftmaxState::empty();
        deliver<T>(p, total, part.begin < part.end ? result.o[i] : 0.0f, row, out_head, column, kHeadDim, index);
    }
}

// Grid (num_heads, batch), head_dim threads: one column each.
template <typename T>
__global__ void combine_kernel(const __grid_constant__ Params p, int parts) {
    const int head = blockIdx.x, row = blockIdx.y, column = threadIdx.x, head_dim = blockDim.x;
    const float* partial = p.partials + int64_t(row * gridDim.x + head) * parts * (head_dim + 2);
    SoftmaxState total = SoftmaxState::empty();
    float o = 0.0f;
    for (int i = 0; i < parts; ++i, partial += head_dim + 2) {
        const SoftmaxState part{partial[head_dim], partial[head_dim + 1]};
        if (part.max == -INFINITY) continue;
        const float top = fmaxf(total.max, part.max), own = total.rescale(top), factor = part.factor(top);
        total.sum += factor * part.sum;
        o = o * own + factor * partial[column];
    }
    deliver<T>(p, total, o, row, head, column, head_dim, 0);
}

template <typename T, int kHeadDim>
void run(const Params& p, Version version, int parts, cudaStream_t stream) {
    const int num_heads = p.num_kv_heads * p.group;
    if (version == Version::kTensorCore) {
        const int bytes = kTileGroups * 2 * tile_bytes(kHeadDim);
        CHECK_CUDA(
            cudaFuncSetAttribute(tensor_core_kernel<T, kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        tensor_core_kernel<T, kHeadDim><<<dim3(p.num_kv_heads, p.batch, parts), kComputeThreads, bytes, stream>>>(p);
    } else {
        naive_kernel<T, kHeadDim><<<dim3(num_heads, p.batch, parts), kNaiveWarps * 32, 0, stream>>>(p);
    }
    CHECK_CUDA(cudaGetLastError());
    if (parts > 1) combine_kernel<T><<<dim3(num_heads, p.batch), kHeadDim, 0, stream>>>(p, parts);
    CHECK_CUDA(cudaGetLastError());
}

}  // namespace

int ladder_parts(Version version, int batch, int num_heads, int num_kv_heads, int grid) {
    if (version == Version::kNaive) return 1;
    const int units = batch * (version == Version::kSplit ? num_heads : num_kv_heads);
    return std::min(std::max(4 * grid / units, 1), 64);  // about four blocks a multiprocessor, whatever the lengths
}

void launch_ladder(const Params& p, const Launch& how) {
    const int parts = ladder_parts(how.version, p.batch, p.num_kv_heads * p.group, p.num_kv_heads, how.grid);
    const bool wide = how.head_dim == 128;
    if (how.dtype == common::Dtype::kBFloat16) {
        (wide ? run<__nv_bfloat16, 128> : run<__nv_bfloat16, 64>)(p, how.version, parts, how.stream);
    } else {
        (wide ? run<__half, 128> : run<__half, 64>)(p, how.version, parts, how.stream);
    }
}

}  // namespace decode_attn
