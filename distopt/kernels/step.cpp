// One step of an elementwise rule on states stored as codes: decode, step, encode, tile by tile.
//
// A rule is one struct, a codec is one struct, and so is the way in which weights are stored; RULE, WEIGHTS, CODEC_A and
// CODEC_B pick them when this file is compiled. The same operations in the same order as the rule's text and the codec's,
// compiled without contraction, with fused multiply-adds only where torch has them (lerp, addcmul, add with alpha). The bits
// are torch's but for roots: those of torch come from a library that is off by one ulp in one of six, these are the nearest
// number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

constexpr int BLOCK = 128;
constexpr float FLOOR = 0x1p-90f;
constexpr int STRETCH = 64;  // tiles
constexpr int FACTOR = 7;  // the scalar that gradients are multiplied by

static inline int32_t bits_of(float x) { int32_t b; std::memcpy(&b, &x, 4); return b; }
static inline float float_of(int32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// Formats of numbers, each of which is a codec without scales as well.

struct Unscaled {
    static constexpr bool scaled = false, stochastic = false;
};

struct Fp32 : Unscaled {
    using Code = float;
    static float decode(Code code, float = 0) { return code; }
    static Code encode(float x, float = 0, uint32_t = 0) { return x; }
};

struct Bf16 : Unscaled {
    using Code = uint16_t;
    static float decode(Code code, float = 0) { return float_of(int32_t(code) << 16); }
    static Code encode(float x, float = 0, uint32_t = 0) {
        uint32_t b = uint32_t(bits_of(x));
        return x != x ? 0x7FC0 : Code((b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
};

struct Bf16Stochastic : Bf16 {
    static constexpr bool stochastic = true;
    static Code encode(float x, float, uint32_t noise) {
        uint32_t b = uint32_t(bits_of(x));
        return (b & 0x7F800000) == 0x7F800000 ? Bf16::encode(x) : Code((b + noise) >> 16);
    }
};

// Floating point with few bits: MANTISSA of them after the point, exponents biased by BIAS, magnitudes from TOP on inf or NaN.
template <class CODE, int BIAS, int MANTISSA, int TOP>
struct Small : Unscaled {
    using Code = CODE;
    static constexpr int32_t sign = 1 << (8 * sizeof(Code) - 1);
    static float decode(Code code, float = 0) {
        int32_t magnitude = code & (sign - 1), wide = magnitude << (23 - MANTISSA);
        float x = magnitude >= TOP ? float_of(wide | 0x7F800000) : float_of(wide) * float_of((254 - BIAS) << 23);
        return float_of(bits_of(x) | (code & sign ? INT32_MIN : 0));
    }
    static Code encode(float x, float = 0, uint32_t = 0) {
        int32_t b = bits_of(x) & 0x7FFFFFFF;
        constexpr int32_t least = (128 - BIAS) << 23;                // of what is normal here
        constexpr int32_t unit = (128 - BIAS - MANTISSA + 23) << 23;  // its ulp is the smallest number here
        int32_t odd = b >> (23 - MANTISSA) & 1;
        int32_t normal = (b - least + (1 << (22 - MANTISSA)) - 1 + odd) >> (23 - MANTISSA);
        int32_t below = bits_of(float_of(b) + float_of(unit)) - unit;
        int32_t found = b < least ? below : std::min(normal + (1 << MANTISSA), TOP);
        return Code((b > 0x7F800000 ? sign - 1 : found) | (bits_of(x) < 0 ? sign : 0));
    }
};
using Fp16 = Small<uint16_t, 15, 10, 0x7C00>;
using E4M3 = Small<uint8_t, 7, 3, 0x7F>;
using E5M2 = Small<uint8_t, 15, 2, 0x7C>;

// Codecs with scales.

struct Scaled {
    static constexpr bool scaled = true, stochastic = false;
};

struct Int8 : Scaled {
    using Code = int8_t;
    static float decode(Code code, float scale) {
        float root = float(code) / 127.0f;
        return root * std::fabs(root) * scale;
    }
    static Code encode(float x, float scale, uint32_t) {
        float root = std::nearbyint(std::sqrt(std::fabs(x) / scale) * 127.0f);
        return Code(int32_t(std::copysign(root, x)));
    }
};

struct UInt8 : Scaled {
    using Code = uint8_t;
    static float decode(Code code, float scale) {
        float root = float(code) / 255.0f;
        float square = root * root;
        return square * square * scale;
    }
    static Code encode(float x, float scale, uint32_t) {
        int32_t code = int32_t(std::nearbyint(std::sqrt(std::sqrt(x / scale)) * 255.0f));
        return Code(x > 0 ? std::max(code, 1) : 0);
    }
};

struct Fp8 : Scaled {
    using Code = uint8_t;
    static float decode(Code code, float scale) { return E4M3::decode(code) / 448.0f * scale; }
    static Code encode(float x, float scale, uint32_t) { return E4M3::encode(x / scale * 448.0f); }
};

struct UFp8 : Scaled {
    using Code = uint8_t;
    static float decode(Code code, float scale) { return E5M2::decode(code) / 57344.0f * scale; }
    static Code encode(float x, float scale, uint32_t) {
        float share = x / scale * 57344.0f;
        return E5M2::encode(x > 0 ? std::max(share, 0x1p-16f) : share);
    }
};

// How weights are stored: the format of the parameter, and what is kept of fp32 beside it.

template <class F>
struct Alone {
    using Format = F;
    using Rest = char;
    static constexpr bool kept = false;
    static float join(typename F::Code param, Rest) { return F::decode(param); }
    static void split(float x, typename F::Code& param, Rest&) { param = F::encode(x); }
};

template <class F>
struct Copied {
    using Format = F;
    using Rest = float;
    static constexpr bool kept = true;
    static float join(typename F::Code param, Rest rest) {
        float x = F::decode(param);
        return F::decode(F::encode(rest)) == x ? rest : x;
    }
    static void split(float x, typename F::Code& param, Rest& rest) {
        param = F::encode(x);
        rest = x;
    }
};

template <class F, class REST>
struct ErrorBits;

template <class REST>
struct ErrorBits<Bf16, REST> {
    using Format = Bf16;
    using Rest = REST;
    static constexpr bool kept = true;
    static constexpr int shift = 16 - 8 * sizeof(Rest);
    static float join(uint16_t param, Rest rest) {
        uint32_t lower = (param & 0x7FFF) == 0 ? 0 : uint32_t(int32_t(rest)) << shift;
        return float_of(int32_t((uint32_t(param) << 16) + lower));
    }
    static void split(float x, uint16_t& param, Rest& rest) {
        uint32_t b = uint32_t(bits_of(x));
        if (shift) b = (b + (1u << shift >> 1)) & ~((1u << shift) - 1);
        uint32_t upper = (b + 0x8000) >> 16;
        param = uint16_t(upper);
        rest = (upper & 0x7FFF) == 0 ? 0 : Rest(int32_t(b - (upper << 16)) >> shift);
    }
};

template <class REST>
struct ErrorBits<Fp16, REST> {
    using Format = Fp16;
    using Rest = REST;
    static constexpr bool kept = true;
    static constexpr int bits = 8 * sizeof(Rest);
    static constexpr float most = (1 << (bits - 1)) - (bits == 16 ? 8 : 1);
    // The ulp of a half; of zero that of 1/2, as frexp has it.
    static float ulp(uint16_t param) {
        int32_t exponent = (param & 0x7FFF) == 0 ? 14 : std::max(param >> 10 & 31, 1);
        return float_of((exponent + 102) << 23);
    }
    static float join(uint16_t param, Rest rest) {
        return Fp16::decode(param) + float(rest) * (ulp(param) * (1.0f / (1 << bits)));
    }
    static void split(float x, uint16_t& param, Rest& rest) {
        param = Fp16::encode(std::min(std::max(x, -65504.0f), 65504.0f));
        float share = std::nearbyint((x - Fp16::decode(param)) / ulp(param) * float(1 << bits));
        rest = Rest(std::min(std::max(share, -most), most));
    }
};

// Rules: s has the scalars of the table in kernels/elementwise.py.

static inline float lerp(float start, float end, float weight) {
    return std::fabs(weight) < 0.5f ? std::fma(weight, end - start, start) : std::fma(weight - 1, end - start, end);
}

struct AdamW {
    static constexpr int states = 2;
    static void step(float& w, float g, float& m, float& v, const float* s) {
        m = lerp(m, g, s[0]);
        v = std::fma(s[2] * g, g, v * s[1]);
        float denominator = std::sqrt(v) / s[3] + s[4];
        w = w * s[5] + s[6] * m / denominator;
    }
};

struct Lion {
    static constexpr int states = 1;
    static void step(float& w, float g, float& m, float&, const float* s) {
        float mixed = std::fma(g, s[1], m * s[0]);
        float sign = float(mixed > 0) - float(mixed < 0);
        m = std::fma(g, s[3], m * s[2]);
        w = std::fma(sign, s[5], w * s[4]);
    }
};

template <bool NESTEROV>
struct Momentum {
    static constexpr int states = 1;
    static void step(float& w, float g, float& m, float&, const float* s) {
        g = std::fma(w, s[0], g);
        m = std::fma(g, s[2], m * s[1]);
        w = std::fma(NESTEROV ? std::fma(m, s[4], g) : m, s[3], w);
    }
};
using SGD = Momentum<false>;
using SGDNesterov = Momentum<true>;

// The columns of a job: see kernels/jobs.py.
struct State {
    void* codes;
    float* scales;
    float* agreed;
};
struct Job {
    void* weight;
    const void* grad;
    const int64_t* starts;
    int64_t tiles, numel;
    State a, b;
    void* rest;
    const int64_t* numbers;
    uint64_t keys[3];
};

// 16 random bits for an element of this number: see state/noise.py.
static inline uint32_t random_bits(uint64_t element, uint64_t key) {
    uint64_t x = element * 0x9E3779B97F4A7C15 + key;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
    return uint32_t(x >> 48);
}

template <class C>
static void decode(const State& state, int64_t start, int64_t tile, int n, float* x) {
    auto codes = static_cast<const typename C::Code*>(state.codes) + start;
    float scale = C::scaled ? state.scales[tile] : 0;
    for (int i = 0; i < n; ++i) x[i] = C::decode(codes[i], scale);
}

static float largest(const float* x, int n) {
    int32_t most = 0;  // without its sign a float is ordered as its bits are
    for (int i = 0; i < n; ++i) most = std::max(most, bits_of(x[i]) & 0x7FFFFFFF);
    return float_of(most);
}

template <class C>
static void encode(const Job& job, int place, int64_t start, int64_t tile, int n, const float* x, bool look) {
    const State& state = place ? job.b : job.a;
    if (look) {
        if (C::scaled && state.agreed) state.agreed[tile] = largest(x, n);
        return;
    }
    float scale = 0;
    if (C::scaled) {
        scale = std::max(largest(x, n), FLOOR);
        if (state.agreed) scale = std::max(scale, state.agreed[tile]);
        state.scales[tile] = scale;
    }
    auto codes = static_cast<typename C::Code*>(state.codes) + start;
    uint64_t first = C::stochastic ? uint64_t(job.numbers[tile]) : 0, key = job.keys[place];
    for (int i = 0; i < n; ++i) codes[i] = C::encode(x[i], scale, C::stochastic ? random_bits(first + i, key) : 0);
}

template <class R, class W, class G, class A, class B>
static void run(const Job& job, int64_t first, int64_t last, const float* s, bool look) {
    alignas(64) float a[BLOCK], b[BLOCK], w[BLOCK], g[BLOCK];
    auto weight = static_cast<typename W::Format::Code*>(job.weight);
    auto grad = static_cast<const typename G::Code*>(job.grad);
    typename W::Rest nothing = 0, *rest = W::kept ? static_cast<typename W::Rest*>(job.rest) : &nothing;
    float scalars[8];
    std::copy(s, s + 8, scalars);
    if constexpr (!A::scaled && !A::stochastic && !B::scaled && !B::stochastic) {
        if (look || first == last) return;
        // Nothing depends on tiles: one loop, whose numbers stay in registers.
        auto end = [&](int64_t tile) {
            return job.starts ? job.starts[tile] - job.starts[0] : std::min(tile * BLOCK, job.numel);
        };
        auto codes_a = static_cast<typename A::Code*>(job.a.codes);
        auto codes_b = static_cast<typename B::Code*>(job.b.codes);
        int64_t stop = end(last);
#pragma GCC ivdep
        for (int64_t i = end(first); i < stop; ++i) {
            float w = W::join(weight[i], rest[W::kept ? i : 0]), g = G::decode(grad[i]) * scalars[FACTOR];
            float a = A::decode(codes_a[i], 0), b = R::states > 1 ? B::decode(codes_b[i], 0) : 0;
            R::step(w, g, a, b, scalars);
            W::split(w, weight[i], rest[W::kept ? i : 0]);
            codes_a[i] = A::encode(a, 0, 0);
            if (R::states > 1) codes_b[i] = B::encode(b, 0, 0);
        }
        return;
    }
    for (int64_t tile = first; tile < last; ++tile) {
        int64_t start = job.starts ? job.starts[tile] - job.starts[0] : tile * BLOCK;
        int64_t stop = job.starts ? job.starts[tile + 1] - job.starts[0] : std::min(start + BLOCK, job.numel);
        int n = int(stop - start);
        decode<A>(job.a, start, tile, n, a);
        if (R::states > 1) decode<B>(job.b, start, tile, n, b);
        for (int i = 0; i < n; ++i) w[i] = W::join(weight[start + i], rest[W::kept ? start + i : 0]);
        for (int i = 0; i < n; ++i) g[i] = G::decode(grad[start + i]) * scalars[FACTOR];
        for (int i = 0; i < n; ++i) R::step(w[i], g[i], a[i], b[i], scalars);
        if (!look)
            for (int i = 0; i < n; ++i) W::split(w[i], weight[start + i], rest[W::kept ? start + i : 0]);
        encode<A>(job, 0, start, tile, n, a, look);
        if (R::states > 1) encode<B>(job, 1, start, tile, n, b, look);
    }
}

// Steps `count` jobs, whose gradients are in the format of the weights or, with `wide`, in fp32; with `look` only the maxima of
// tiles are written, where `agreed` is not null. Unless `scale` is 1 gradients, fp32 and of jobs without `starts`, are multiplied
// by it in place first, a stretch at a time that then is in cache.
extern "C" void step(const Job* jobs, int64_t count, const float* scalars, int threads, int look, int wide, float scale) {
    auto step_tiles = wide ? run<RULE, WEIGHTS, Fp32, CODEC_A, CODEC_B> : run<RULE, WEIGHTS, WEIGHTS::Format, CODEC_A, CODEC_B>;
    std::vector<int64_t> firsts(count + 1);  // of the elements of all jobs
    for (int64_t j = 0; j < count; ++j) firsts[j + 1] = firsts[j] + jobs[j].numel;
    int64_t total = firsts[count];
    // Piece k has the elements k/pieces … (k+1)/pieces of all jobs, up to whole tiles.
    shared_out(total, threads, [&](int64_t k, int64_t pieces) {
        int64_t from = total * k / pieces, to = total * (k + 1) / pieces;
        int64_t j = std::upper_bound(firsts.begin(), firsts.end(), from) - firsts.begin() - 1;
        for (; j < count && firsts[j] < to; ++j) {
            auto tile = [&](int64_t element) {
                int64_t inside = std::min(std::max<int64_t>(element - firsts[j], 0), jobs[j].numel);
                return inside == jobs[j].numel ? jobs[j].tiles : int64_t(double(inside) / jobs[j].numel * jobs[j].tiles);
            };
            int64_t first = tile(from), last = tile(to), stretch = scale == 1 ? last - first : STRETCH;
            for (int64_t stop; first < last; first = stop) {
                stop = std::min(first + stretch, last);
                auto grad = static_cast<float*>(const_cast<void*>(jobs[j].grad));
                if (scale != 1)
                    for (int64_t i = first * BLOCK, end = std::min(stop * BLOCK, jobs[j].numel); i < end; ++i) grad[i] *= scale;
                step_tiles(jobs[j], first, stop, scalars, look);
            }
        }
    });
}
