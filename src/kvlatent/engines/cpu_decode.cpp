// One query of attention against a cache, for the CPU: grouped heads share one read of their keys and values.
//
// The heads of a group are kept together so that each key and each value is loaded once, converted once and used for
// all of them; the softmax runs online, block by block, so that no score is written to memory. All sums are float32.
// Long caches are split between threads and the parts combined. Nothing of torch is included, so that it compiles in two
// seconds. Shapes: B batch, K key-value heads, G queries a group, S cached positions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// Tokens a block; vectors of a value row that are summed together; tokens by which rows are fetched before they are read:
// a block's worth, since keys and values take turns and the processor follows neither by itself.
constexpr int LANES = 16, BLOCK = 64, TILE = 4, AHEAD = 64;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
const float LOWEST = -1e30f;
#define UNROLL _Pragma("GCC unroll 16")

inline vec load(const float* from) { return *(const vec*)from; }
inline vec load(const uint16_t* bfloat16) {
    return (vec)(__builtin_convertvector(*(const halves*)bfloat16, words) << 16);
}
inline float widen(float value) { return value; }
inline float widen(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint16_t narrow(float bfloat16) {
    uint32_t bits;
    std::memcpy(&bits, &bfloat16, 4);
    return bits >> 16;
}
template <typename T>
constexpr bool starts_line(int column) {
    return column * sizeof(T) % 64 == 0;
}
inline vec larger(vec a, vec b) { return a > b ? a : b; }

#ifdef __clang__
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

// Halves of two vectors' sums side by side; four levels of it leave lane j with the sum of vector j.
#define FOLD(a, b, half) (MIX(a, b, FIRST_##half) + MIX(a, b, LAST_##half))
#define FIRST_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define LAST_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define FIRST_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define LAST_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define FIRST_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define LAST_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define FIRST_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define LAST_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

#define SWAP(a, half) MIX(a, a, SWAP_##half)
#define SWAP_8 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7
#define SWAP_4 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11
#define SWAP_2 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13
#define SWAP_1 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14

inline vec sums_of(vec* v) {
    UNROLL for (int i = 0; i < 8; i++) v[i] = FOLD(v[i], v[i + 8], 8);
    UNROLL for (int i = 0; i < 4; i++) v[i] = FOLD(v[i], v[i + 4], 4);
    UNROLL for (int i = 0; i < 2; i++) v[i] = FOLD(v[i], v[i + 2], 2);
    return FOLD(v[0], v[1], 1);
}

// e^x for x <= 0, relative error under 1e-6.
inline vec exponential(vec x) {
    x = larger(x, vec{} - 87.0f) * 1.44269504088896341f;
    vec shifted = x + 12582912.0f;
    vec f = x - (shifted - 12582912.0f);
    vec y = vec{} + 1.535336188319500e-4f;
    y = y * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    return (vec)((ints)y + (((ints)shifted - 0x4B400000) << 23));
}

template <typename T, int HEADS>
void score_block(const float* query, const T* keys, int64_t row, int tokens, int width, float* scores) {
    constexpr int ROWS = LANES / HEADS;  // keys at a time: with all heads, a register for each sum
    for (int token = 0; token < tokens; token += ROWS) {
        vec sums[LANES] = {};
        const T* key[ROWS];
        UNROLL for (int at = 0; at < ROWS; at++) key[at] = keys + std::min(token + at, tokens - 1) * row;
        for (int i = 0; i < width; i += LANES) {
            UNROLL for (int at = 0; at < ROWS; at++) {
                vec k = load(key[at] + i);
                if (starts_line<T>(i)) __builtin_prefetch(key[at] + i + AHEAD * row);
                UNROLL for (int head = 0; head < HEADS; head++)
                    sums[at * HEADS + head] += load(query + head * width + i) * k;
            }
        }
        *(vec*)(scores + token * HEADS) = sums_of(sums);
    }
}

#ifdef __AVX512BF16__
constexpr bool MULTIPLIES_PAIRS = true;

// The same in the processor's own products of bfloat16 pairs, summed in float32; width in whole 64 bytes.
template <typename T, int HEADS>
void score_block(const uint16_t* query, const T* keys, int64_t row, int tokens, int width, float* scores) {
    constexpr int ROWS = LANES / HEADS;
    auto pairs = [](const uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); };
    for (int token = 0; token < tokens; token += ROWS) {
        vec sums[LANES] = {};
        const T* key[ROWS];
        UNROLL for (int at = 0; at < ROWS; at++) key[at] = keys + std::min(token + at, tokens - 1) * row;
        for (int i = 0; i < width; i += 2 * LANES) {
            UNROLL for (int at = 0; at < ROWS; at++) {
                __m512bh k = pairs(key[at] + i);
                __builtin_prefetch(key[at] + i + AHEAD * row);
                UNROLL for (int head = 0; head < HEADS; head++) {
                    vec& sum = sums[at * HEADS + head];
                    sum = (vec)_mm512_dpbf16_ps((__m512)sum, pairs(query + head * width + i), k);
                }
            }
        }
        *(vec*)(scores + token * HEADS) = sums_of(sums);
    }
}
#else
constexpr bool MULTIPLIES_PAIRS = false;
#endif

template <typename T, int HEADS, int VECTORS>
void add_values(const float* weights, const T* values, int64_t row, int tokens, float* out, int width) {
    vec sums[HEADS][VECTORS];
    for (int head = 0; head < HEADS; head++)
        for (int i = 0; i < VECTORS; i++) sums[head][i] = load(out + head * width + i * LANES);
    for (int token = 0; token < tokens; token++)
        UNROLL for (int i = 0; i < VECTORS; i++) {
            vec v = load(values + token * row + i * LANES);
            if (starts_line<T>(i * LANES)) __builtin_prefetch(values + (token + AHEAD) * row + i * LANES);
            UNROLL for (int head = 0; head < HEADS; head++) sums[head][i] += weights[token * HEADS + head] * v;
        }
    for (int head = 0; head < HEADS; head++)
        for (int i = 0; i < VECTORS; i++) *(vec*)(out + head * width + i * LANES) = sums[head][i];
}

template <typename Q, typename K, typename V, int HEADS>
void attend_block(const Q* query, float scale, const K* keys, int64_t key_row, int d_qk, const V* values, int64_t value_row,
                  int d_vo, int tokens, const uint8_t* mask, vec& largest, vec& weight, float* out) {
    alignas(64) float scores[BLOCK * HEADS];
    score_block<K, HEADS>(query, keys, key_row, tokens, d_qk, scores);
    int vectors = (tokens * HEADS + LANES - 1) / LANES;
    for (int i = 0; i < vectors; i++) *(vec*)(scores + i * LANES) *= scale;
    for (int i = tokens * HEADS; i < vectors * LANES; i++) scores[i] = LOWEST;
    if (mask)
        for (int token = 0; token < tokens; token++)
            if (!mask[token])
                for (int head = 0; head < HEADS; head++) scores[token * HEADS + head] = LOWEST;
    vec most = largest;
    for (int i = 0; i < vectors; i++) most = larger(most, load(scores + i * LANES));
    most = larger(most, SWAP(most, 8));  // until every lane of a head has that head's largest
    most = larger(most, SWAP(most, 4));
    if (HEADS < 4) most = larger(most, SWAP(most, 2));
    if (HEADS < 2) most = larger(most, SWAP(most, 1));
    vec shrink = exponential(largest - most);
    bool changed = false;
    for (int head = 0; head < HEADS; head++) changed |= largest[head] != most[head];
    if (changed)
        for (int head = 0; head < HEADS; head++)
            for (int i = 0; i < d_vo; i++) out[head * d_vo + i] *= shrink[head];
    weight *= shrink;
    for (int i = 0; i < vectors; i++) {
        vec score = load(scores + i * LANES);
        vec kept = exponential(score - most);
        kept = score > vec{} + LOWEST ? kept : vec{};
        weight += kept;
        *(vec*)(scores + i * LANES) = kept;
    }
    largest = most;
    int i = 0;
    for (; i + TILE * LANES <= d_vo; i += TILE * LANES)
        add_values<V, HEADS, TILE>(scores, values + i, value_row, tokens, out + i, d_vo);
    for (; i + 2 * LANES <= d_vo; i += 2 * LANES)
        add_values<V, HEADS, 2>(scores, values + i, value_row, tokens, out + i, d_vo);
    for (; i < d_vo; i += LANES) add_values<V, HEADS, 1>(scores, values + i, value_row, tokens, out + i, d_vo);
}

// A run of heads that share keys and values, as many as fit the registers, and what their online softmax holds.
struct Heads {
    int first, count, lanes;  // lanes: 1, 2 or 4, those beyond count idle
    vec largest, weight;
};

struct Call {
    const float* query;   // [B, K, G, d_qk], numbers of the cache's type
    const char *keys, *values;  // [B, K, S, width], rows contiguous
    const uint8_t* mask;  // [B, S] or null
    float* out;           // [B, K, G, d_vo]
    int64_t heads, group, length, d_qk, d_vo, key_strides[3], value_strides[3], mask_stride;
    float scale;
};

inline int64_t whole(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

// Rows of whole vectors: those of the cache where the width allows it, else a copy filled up with zeros.
template <typename T>
void fill_up(const T* from, int64_t row, int tokens, int64_t width, float* to) {
    for (int token = 0; token < tokens; token++)
        for (int64_t i = 0; i < width; i++) to[token * whole(width) + i] = widen(from[token * row + i]);
}

template <typename Q, typename K, typename V>
void attend_heads(Heads& heads, const Q* query, float scale, const K* keys, int64_t key_row, int d_qk, const V* values,
                  int64_t value_row, int d_vo, int tokens, const uint8_t* mask, float* out) {
    query += heads.first * d_qk;
    out += heads.first * d_vo;
    auto attend = heads.lanes == 4   ? attend_block<Q, K, V, 4>
                  : heads.lanes == 2 ? attend_block<Q, K, V, 2>
                                     : attend_block<Q, K, V, 1>;
    attend(query, scale, keys, key_row, d_qk, values, value_row, d_vo, tokens, mask, heads.largest, heads.weight, out);
}

// Positions from `begin` to `end` of one key-value head. Leaves G x (largest, weight, weighted sum [d_vo]) in `part`.
template <typename T>
void attend_span(const Call& call, int64_t batch, int64_t head, int64_t begin, int64_t end, float* part) {
    const int64_t d_qk = whole(call.d_qk), d_vo = whole(call.d_vo), slots = (call.group + 3) / 4 * 4;
    std::vector<float> query(slots * d_qk), out(slots * d_vo), key_copy, value_copy;
    const float* asked = call.query + (batch * call.heads + head) * call.group * call.d_qk;
    for (int64_t g = 0; g < call.group; g++) std::copy_n(asked + g * call.d_qk, call.d_qk, &query[g * d_qk]);
    std::vector<uint16_t> pairs;  // the query as it came, where it and the keys are bfloat16
    if (MULTIPLIES_PAIRS && sizeof(T) == 2 && call.d_qk % (2 * LANES) == 0)
        for (float q : query) pairs.push_back(narrow(q));
    if (d_qk != call.d_qk) key_copy.resize(BLOCK * d_qk);
    if (d_vo != call.d_vo) value_copy.resize(BLOCK * d_vo);
    std::vector<Heads> runs;
    for (int first = 0; first < call.group; first += runs.back().count) {
        int left = call.group - first, lanes = left >= 3 ? 4 : left;
        runs.push_back({first, std::min(left, lanes), lanes, vec{} + LOWEST, vec{}});
    }
    auto keys = (const T*)call.keys + batch * call.key_strides[0] + head * call.key_strides[1];
    auto values = (const T*)call.values + batch * call.value_strides[0] + head * call.value_strides[1];
    for (int64_t at = begin; at < end; at += BLOCK) {
        int tokens = std::min<int64_t>(BLOCK, end - at);
        const T* key = keys + at * call.key_strides[2];
        const T* value = values + at * call.value_strides[2];
        const uint8_t* mask = call.mask ? call.mask + batch * call.mask_stride + at : nullptr;
        if (mask && !std::memchr(mask, 1, tokens)) continue;
        if (!key_copy.empty()) fill_up(key, call.key_strides[2], tokens, call.d_qk, key_copy.data());
        if (!value_copy.empty()) fill_up(value, call.value_strides[2], tokens, call.d_vo, value_copy.data());
        for (Heads& run : runs) {
            auto attend = [&](const auto* q, const auto* k, int64_t row) {
                if (value_copy.empty())
                    attend_heads(run, q, call.scale, k, row, d_qk, value, call.value_strides[2], d_vo, tokens, mask,
                                 out.data());
                else
                    attend_heads(run, q, call.scale, k, row, d_qk, value_copy.data(), d_vo, d_vo, tokens, mask,
                                 out.data());
            };
            if constexpr (MULTIPLIES_PAIRS && sizeof(T) == 2)
                if (!pairs.empty()) {
                    attend((const uint16_t*)pairs.data(), key, call.key_strides[2]);
                    continue;
                }
            if (key_copy.empty()) attend((const float*)query.data(), key, call.key_strides[2]);
            else attend((const float*)query.data(), (const float*)key_copy.data(), d_qk);
        }
    }
    for (const Heads& run : runs)
        for (int i = 0; i < run.count; i++, part += 2 + call.d_vo) {
            float weight = 0.0f;
            for (int lane = i; lane < LANES; lane += run.lanes) weight += run.weight[lane];
            part[0] = run.largest[i];
            part[1] = weight;
            std::copy_n(&out[(run.first + i) * d_vo], call.d_vo, part + 2);
        }
}

// The parts [splits, G, 2 + d_vo] of one key-value head to its output.
void combine(const Call& call, const float* parts, int64_t splits, float* out) {
    const int64_t row = 2 + call.d_vo, step = call.group * row;
    for (int64_t g = 0; g < call.group; g++, parts += row, out += call.d_vo) {
        float largest = LOWEST, weight = 0.0f;
        for (int64_t s = 0; s < splits; s++) largest = std::max(largest, parts[s * step]);
        std::fill_n(out, call.d_vo, 0.0f);
        for (int64_t s = 0; s < splits; s++) {
            float share = std::exp(parts[s * step] - largest);
            weight += share * parts[s * step + 1];
            for (int64_t i = 0; i < call.d_vo; i++) out[i] += share * parts[s * step + 2 + i];
        }
        for (int64_t i = 0; i < call.d_vo; i++) out[i] = weight > 0.0f ? out[i] / weight : 0.0f;
    }
}
}  // namespace

extern "C" void decode_attention(const Call* given, int64_t batch, int is_bfloat16, int threads) {
    const Call call = *given;
    const int64_t rows = batch * call.heads, blocks = (call.length + BLOCK - 1) / BLOCK;
    // A few spans a thread, so that a thread that is held up delays little; each at least a thousand positions.
    const int64_t wanted = threads == 1 ? 1 : (4 * threads + rows - 1) / rows;
    const int64_t splits = std::max<int64_t>(1, std::min(wanted, blocks / 16));
    const int64_t step = call.group * (2 + call.d_vo);
    std::vector<float> parts(rows * splits * step);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t task = 0; task < rows * splits; task++) {
        int64_t row = task / splits, split = task % splits;
        int64_t begin = blocks * split / splits * BLOCK;
        int64_t end = std::min(blocks * (split + 1) / splits * BLOCK, call.length);
        auto attend = is_bfloat16 ? attend_span<uint16_t> : attend_span<float>;
        attend(call, row / call.heads, row % call.heads, begin, end, &parts[task * step]);
    }
    for (int64_t row = 0; row < rows; row++)
        combine(call, &parts[row * splits * step], splits, call.out + row * call.group * call.d_vo);
}
