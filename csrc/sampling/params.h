// What the host tells the kernel, and every constant that both must agree on.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sampling {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 8;             // neighbouring tokens that a thread takes at a time: two blocks of the generator
constexpr int kMaxBlocksPerRow = 16;  // the largest cluster that Hopper can run
constexpr int kPortableBlocksPerRow = 8;

enum class Dtype : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// What some row of the batch needs: a cheaper kernel leaves out the rest. Rows of temperature 0 are greedy in all of
// them.
enum class Mode : int { kGreedy = 0, kUnfiltered = 1, kFiltered = 2 };

// Arrays hold one element a row unless a shape is given.
struct Params {
    void* logits;  // [batch, vocab_size], rows stride_logits_row elements apart
    int64_t stride_logits_row;
    int batch, vocab_size;
    int chunks_per_block;  // consecutive chunks of a row that one thread block takes
    bool vector_loads;     // every chunk is whole and 16-byte aligned

    const float *temperature, *top_p, *min_p;
    const int64_t *top_k, *seed, *request, *sample;
    const int* positions;  // of the tokens drawn; where a state is given, of the tokens fed: one less (< 0: idle row)
    int64_t* out;          // token ids; 0 for an idle row

    // The decode state that takes the tokens, or all null.
    int64_t* token_ids;
    int* state_positions;
    const int* last_positions;
    const int* first_stop_positions;
    const int64_t* stop_ids;  // [batch, num_stop_ids], padded with -1
    int num_stop_ids;
    bool forbid_early_stops;  // write -inf into the logits of stop ids that must not be drawn yet
};

struct Launch {
    Dtype dtype;
    Mode mode;
    int blocks_per_row;  // 1, 2, 4, 8 or 16; more than 1 only where clusters exist (compute capability 9.0 and newer)
    bool overlap;        // programmatic dependent launch
    cudaStream_t stream;
};

// Throws std::invalid_argument for what the kernel does not support, std::runtime_error if CUDA fails.
void launch(Params p, const Launch& how);

}  // namespace sampling
