// One step of an elementwise rule on states stored as codes: decode, step, encode, tile by tile.
//
// A rule is one struct and a codec is one struct; RULE, CODEC_A and CODEC_B pick them when this file is compiled. The same
// operations in the same order as the rule's text and the codec's, compiled without contraction, with fused multiply-adds
// only where torch has them (lerp, addcmul, add with alpha). The bits are torch's but for roots: those of torch come from a
// library that is off by one ulp in one of six, these are the nearest number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

constexpr int BLOCK = 128;
constexpr float FLOOR = 0x1p-90f;
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 17;

static inline int32_t bits_of(float x) { int32_t b; std::memcpy(&b, &x, 4); return b; }
static inline float float_of(int32_t b) { float x; std::memcpy(&x, &b, 4); return x; }

// Codecs.

struct Fp32 {
    using Code = float;
    static constexpr bool scaled = false;
    static float decode(Code code, float) { return code; }
    static Code encode(float x, float) { return x; }
};

struct Bf16 {
    using Code = uint16_t;
    static constexpr bool scaled = false;
    static float decode(Code code, float) { return float_of(int32_t(code) << 16); }
    static Code encode(float x, float) {
        uint32_t b = uint32_t(bits_of(x));
        return x != x ? 0x7FC0 : Code((b + 0x7FFF + (b >> 16 & 1)) >> 16);
    }
};

struct Int8 {
    using Code = int8_t;
    static constexpr bool scaled = true;
    static float decode(Code code, float scale) {
        float root = float(code) / 127.0f;
        return root * std::fabs(root) * scale;
    }
    static Code encode(float x, float scale) {
        float root = std::nearbyint(std::sqrt(std::fabs(x) / scale) * 127.0f);
        return Code(int32_t(std::copysign(root, x)));
    }
};

struct UInt8 {
    using Code = uint8_t;
    static constexpr bool scaled = true;
    static float decode(Code code, float scale) {
        float root = float(code) / 255.0f;
        float square = root * root;
        return square * square * scale;
    }
    static Code encode(float x, float scale) {
        int32_t code = int32_t(std::nearbyint(std::sqrt(std::sqrt(x / scale)) * 255.0f));
        return Code(x > 0 ? std::max(code, 1) : 0);
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
    float* weight;
    const float* grad;
    const int64_t* starts;
    int64_t tiles, numel;
    State a, b;
    int64_t others[5];  // of what is not stepped here: weights of lower precision, stochastic rounding
};

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
static void encode(const State& state, int64_t start, int64_t tile, int n, const float* x, bool look) {
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
    for (int i = 0; i < n; ++i) codes[i] = C::encode(x[i], scale);
}

template <class R, class A, class B>
static void run(const Job& job, int64_t first, int64_t last, const float* s, bool look) {
    alignas(64) float a[BLOCK], b[BLOCK], w[BLOCK];
    float scalars[8];
    std::copy(s, s + 8, scalars);
    for (int64_t tile = first; tile < last; ++tile) {
        int64_t start = job.starts ? job.starts[tile] - job.starts[0] : tile * BLOCK;
        int64_t stop = job.starts ? job.starts[tile + 1] - job.starts[0] : std::min(start + BLOCK, job.numel);
        int n = int(stop - start);
        decode<A>(job.a, start, tile, n, a);
        if (R::states > 1) decode<B>(job.b, start, tile, n, b);
        std::copy(job.weight + start, job.weight + stop, w);
        for (int i = 0; i < n; ++i) R::step(w[i], job.grad[start + i], a[i], b[i], scalars);
        if (!look) std::copy(w, w + n, job.weight + start);
        encode<A>(job.a, start, tile, n, a, look);
        if (R::states > 1) encode<B>(job.b, start, tile, n, b, look);
    }
}

// Steps `count` jobs; with `look` only the maxima of tiles are written, where `agreed` is not null.
extern "C" void step(const Job* jobs, int64_t count, const float* scalars, int threads, int look) {
    int64_t total = 0;
    for (int64_t j = 0; j < count; ++j) total += jobs[j].numel;
    int64_t workers = std::max<int64_t>(1, std::min<int64_t>(threads, total / ELEMENTS_PER_THREAD));
    // Worker k has the elements k/workers … (k+1)/workers of all jobs, up to whole tiles.
    auto work = [=](int64_t k) {
        int64_t from = total * k / workers, to = total * (k + 1) / workers, before = 0;
        for (int64_t j = 0; j < count && before < to; before += jobs[j].numel, ++j) {
            auto tile = [&](int64_t element) {
                int64_t inside = std::min(std::max<int64_t>(element - before, 0), jobs[j].numel);
                return inside == jobs[j].numel ? jobs[j].tiles : int64_t(double(inside) / jobs[j].numel * jobs[j].tiles);
            };
            run<RULE, CODEC_A, CODEC_B>(jobs[j], tile(from), tile(to), scalars, look);
        }
    };
    std::vector<std::thread> others;
    for (int64_t k = 1; k < workers; ++k) others.emplace_back(work, k);
    work(0);
    for (auto& other : others) other.join();
}
