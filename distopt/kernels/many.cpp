// Many tensors at once: where they lie, without a call of Python per tensor, and their squares. Needs nobody's headers: tensors
// are read through DLPack's exchange functions, whose structs are these (DLPack 1.2, dlpack.h), and lists are the interpreter's.

#include <cmath>
#include <cstdint>

#include "threads.h"

struct Type {
    uint8_t code, bits;
    uint16_t lanes;
};
struct Tensor {
    void* data;
    int32_t device_type, device_id, ndim;
    Type type;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Exchange {
    uint32_t major, minor;
    void *older, *allocate, *from_object, *to_object;
    int (*read)(void* object, Tensor* out);
};

extern "C" void* PyList_GetItem(void* list, intptr_t index);
extern "C" void PyErr_Clear();

static bool is_contiguous(const Tensor& x, int64_t numel) {
    int64_t below = 1;
    for (int d = x.ndim - 1; d >= 0; below *= x.shape[d--])
        if (x.shape[d] != 1 && x.strides[d] != below && numel) return false;
    return below == numel;
}

// Write where the tensors of a list lie: 0 for one that is not contiguous, on the device (type, number), with as many elements as
// `numels` says, of the type (code, bits) that `types` says, or that has no memory. How many are not.
extern "C" int64_t look(const Exchange* exchange, void* list, int64_t device, const int64_t* numels, const int64_t* types,
                        int64_t count, int64_t* addresses) {
    int64_t others = 0;
    for (int64_t i = 0; i < count; ++i) {
        Tensor x;
        bool read = exchange->read(PyList_GetItem(list, i), &x) == 0;
        if (!read) PyErr_Clear();
        bool plain = read && (int64_t(x.device_type) << 8 | x.device_id) == device && (x.type.code << 8 | x.type.bits) == types[i];
        plain = plain && is_contiguous(x, numels[i]) && (x.data || !numels[i]);
        addresses[i] = plain ? int64_t(x.data) + int64_t(x.byte_offset) : 0;
        others += !plain;
    }
    return others;
}

// Squares are added in fp32, a RUN of elements side by side in LANES sums, and these in fp64, a SLICE at a time.
constexpr int64_t LANES = 16, RUN = 4096, SLICE = 16 * RUN;
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef double Wide __attribute__((vector_size(8 * LANES)));

struct Slice {
    const float* x;
    int64_t n;
};

// Of slices of one size, read in turn: processors fetch two streams of small pages faster than one.
template <int COUNT>
static void squares_of(const Slice* slices, double* found) {
    int64_t n = slices[0].n, whole = n / LANES * LANES;
    Wide sums[COUNT] = {};
    for (int64_t i = 0, stop; i < whole; i = stop) {
        Vector parts[COUNT] = {};
        stop = std::min(i + RUN, whole);
        for (int64_t j = i; j < stop; j += LANES)
            for (int k = 0; k < COUNT; ++k) {
                auto x = *reinterpret_cast<const Vector*>(slices[k].x + j);
                parts[k] += x * x;
            }
        for (int k = 0; k < COUNT; ++k) sums[k] += __builtin_convertvector(parts[k], Wide);
    }
    for (int k = 0; k < COUNT; ++k) {
        auto x = slices[k].x;
        double sum = 0;
        for (int lane = 0; lane < LANES; ++lane) sum += sums[k][lane];
        for (int64_t i = whole; i < n; ++i) sum += double(x[i]) * x[i];
        if (!std::isfinite(sum)) {  // a square may be beyond fp32 where its number is not
            sum = 0;
            for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * x[i];
        }
        found[k] = sum;
    }
}

// Sums of squares of `count` fp32 tensors: of slices, added up in their order whatever the threads.
extern "C" void squares(const int64_t* addresses, const int64_t* numels, int64_t count, int threads, double* found) {
    std::vector<Slice> slices;
    int64_t elements = 0;
    for (int64_t j = 0; j < count; elements += numels[j++])
        for (int64_t i = 0; i < numels[j]; i += SLICE)
            slices.push_back({reinterpret_cast<const float*>(addresses[j]) + i, std::min(SLICE, numels[j] - i)});
    std::vector<double> sums(slices.size());
    shared_out(elements, threads, [&](int64_t k, int64_t pieces) {
        int64_t to = slices.size() * (k + 1) / pieces;
        for (int64_t i = slices.size() * k / pieces; i < to;) {
            bool two = i + 1 < to && slices[i].n == slices[i + 1].n;
            (two ? squares_of<2> : squares_of<1>)(&slices[i], &sums[i]);
            i += 1 + two;
        }
    });
    for (int64_t j = 0, slice = 0; j < count; ++j) {
        found[j] = 0;
        for (int64_t i = 0; i < numels[j]; i += SLICE) found[j] += sums[slice++];
    }
}
