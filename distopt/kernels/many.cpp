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

// Elements whose squares are added in fp32, side by side in LANES sums, before they are added in fp64.
constexpr int64_t SLICE = 4096, LANES = 64;

static double squares_of(const float* x, int64_t n) {
    int64_t whole = n / LANES * LANES;
    float sums[LANES] = {};
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; ++k) sums[k] = std::fma(x[i + k], x[i + k], sums[k]);
    double sum = 0;
    for (int k = 0; k < LANES; ++k) sum += sums[k];
    for (int64_t i = whole; i < n; ++i) sum += double(x[i]) * x[i];
    if (!std::isfinite(sum)) {  // a square may be beyond fp32 where its number is not
        sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * x[i];
    }
    return sum;
}

static int64_t slices_of(int64_t numel) { return (numel + SLICE - 1) / SLICE; }

// Sums of squares of `count` fp32 tensors: of slices, added up in their order whatever the threads.
extern "C" void squares(const int64_t* addresses, const int64_t* numels, int64_t count, int threads, double* found) {
    int64_t slices = 0, elements = 0;
    for (int64_t j = 0; j < count; ++j) slices += slices_of(numels[j]), elements += numels[j];
    std::vector<double> sums(slices);
    shared_out(elements, threads, [=, &sums](int64_t k, int64_t workers) {
        int64_t from = slices * k / workers, to = slices * (k + 1) / workers;
        for (int64_t j = 0, first = 0; j < count && first < to; first += slices_of(numels[j++])) {
            auto x = reinterpret_cast<const float*>(addresses[j]);
            for (int64_t i = std::max(from, first); i < std::min(to, first + slices_of(numels[j])); ++i) {
                int64_t start = (i - first) * SLICE;
                sums[i] = squares_of(x + start, std::min(SLICE, numels[j] - start));
            }
        }
    });
    for (int64_t j = 0, slice = 0; j < count; ++j) {
        found[j] = 0;
        for (int64_t i = 0; i < slices_of(numels[j]); ++i) found[j] += sums[slice++];
    }
}
