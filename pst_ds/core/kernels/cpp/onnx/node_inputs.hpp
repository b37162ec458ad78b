// Attributes and tensors of a node from ONNX Runtime, within bounds regardless of the file's contents.
//
// A Tensor has the address, type and sizes that the runtime reports; it owns only the list of sizes. Sizes are not
// negative and products of them fit in 64 bits, also with a few factors more, so that callers multiply without checks.
// A Status is owned by whoever receives it: it is either returned to the runtime (Failed) or released.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "functions.hpp"

namespace pst {

// A failed API call; the runtime has the message.
struct Failed {
    ort::Status* status;
};

inline void check(ort::Status* status) {
    if (status) throw Failed{status};
}

template <class... Parts> void require(bool holds, const Parts&... message) {
    if (holds) return;
    std::ostringstream text;
    (text << ... << message);
    throw std::invalid_argument(text.str());
}

// Limits for attributes and tensors of a file, so that the product of two attributes plus a third, and the product of a
// tensor's sizes, fit in 64 bits.
constexpr int64_t LARGEST_ATTRIBUTE = INT32_MAX;
constexpr int64_t MOST_ELEMENTS = int64_t(1) << 56;

// A tensor of the runtime, or nothing for a missing optional input.
struct Tensor {
    void* data = nullptr;
    int type = ort::ANY;
    std::vector<int64_t> shape;

    explicit operator bool() const { return data || !shape.empty(); }
    int64_t numel() const {
        int64_t count = 1;
        for (int64_t size : shape) count *= size;  // fits: see tensor_of
        return count;
    }
    int64_t width() const { return shape.empty() ? 1 : shape.back(); }
    int64_t rows() const { return width() ? numel() / width() : 0; }
    template <class T> const T* as() const { return static_cast<const T*>(data); }
};

// Sizes come from a file or a caller: a product of any of a tensor's sizes is at most MOST_ELEMENTS, even if another
// one is 0.
inline Tensor tensor_of(const ort::Api& api, const ort::Value* value) {
    Tensor tensor;
    if (!value) return tensor;
    ort::ShapeInfo* info = nullptr;
    check(api.shape_info(value, &info));
    size_t rank = 0;
    ort::Status* status = api.rank(info, &rank);
    tensor.shape.resize(rank);
    if (!status) status = api.sizes(info, tensor.shape.data(), rank);
    if (!status) status = api.element_type(info, &tensor.type);
    api.release(info);
    check(status);
    int64_t count = 1;
    for (int64_t size : tensor.shape) {
        require(size >= 0 && size <= MOST_ELEMENTS / count, "a size of a tensor is ", size, ": more than 2^56 elements");
        count *= std::max<int64_t>(size, 1);
    }
    check(api.data(const_cast<ort::Value*>(value), &tensor.data));
    return tensor;
}

// Information from which a node is created.
class Info {
   public:
    Info(const ort::Api& api, const ort::KernelInfo* info, const char* node) : api(api), info_(info), node_(node) {}
    // Attributes: `otherwise` if the node has no attribute of that name. Integers from `least` to LARGEST_ATTRIBUTE:
    int64_t integer(const char* name, int64_t otherwise, int64_t least) const {
        const int64_t found = value(name, otherwise);
        require(found >= least && found <= LARGEST_ATTRIBUTE, node_, ": ", name, " = ", found, " is not from ", least,
                " to ", LARGEST_ATTRIBUTE);
        return found;
    }
    // One of several integers:
    int64_t choice(const char* name, int64_t otherwise, std::initializer_list<int64_t> choices) const {
        const int64_t found = value(name, otherwise);
        std::string listed;
        for (int64_t choice : choices) listed += (listed.empty() ? "" : ", ") + std::to_string(choice);
        require(std::count(choices.begin(), choices.end(), found), node_, ": ", name, " = ", found, " is not one of ", listed);
        return found;
    }
    // Finite numbers of at least `least`:
    float number(const char* name, float otherwise, float least) const {
        const float found = value(name, otherwise);
        require(std::isfinite(found) && found >= least, node_, ": ", name, " = ", found, " is not a finite number from ",
                least, " on");
        return found;
    }
    Tensor constant(size_t index, const char* missing, bool may_miss = false) const {
        size_t count = 0;
        check(api.input_count(info_, &count));
        int is_constant = 0;
        const ort::Value* value = nullptr;
        if (index < count) {
            ort::Status* status = api.constant_input(info_, index, &is_constant, &value);
            if (status) {  // an omitted input
                api.release(status);
                value = nullptr;
            }
        }
        require(value || may_miss, missing);
        return tensor_of(api, value);
    }
    const ort::Api& api;

   private:
    template <class T> T value(const char* name, T otherwise) const {
        T found{};
        ort::Status* status = api.attribute(info_, name, &found);
        if (!status) return found;
        api.release(status);
        return otherwise;
    }
    const ort::KernelInfo* info_;
    const char* node_;
};

// Inputs and outputs of a node's computation.
class Call {
   public:
    Call(const ort::Api& api, ort::KernelContext* context) : parallel{&api, context}, api_(api), context_(context) {}
    Tensor input(size_t index) const {
        const ort::Value* value = nullptr;
        check(api_.input(context_, index, &value));
        return tensor_of(api_, value);
    }
    // The memory of an output; null if it is unused.
    float* output(size_t index, const std::vector<int64_t>& shape) const {
        ort::Value* value = nullptr;
        check(api_.output(context_, index, shape.data(), shape.size(), &value));
        void* data = nullptr;
        if (value) check(api_.data(value, &data));
        return static_cast<float*>(data);
    }
    const Parallel parallel;

   private:
    const ort::Api& api_;
    ort::KernelContext* context_;
};

}  // namespace pst
