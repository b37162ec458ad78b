// The part of ONNX Runtime's C API that the operators call. The API is a table of functions that only grows: a function
// keeps its index in every release, so the indices below replace its header.
//
// Layout: Api holds the address of an array of function pointers, which the runtime owns for the lifetime of the process.
// Operator has the fields of OrtCustomOp in their order; the runtime reads as many of them as its own version knows, and
// API_VERSION tells it which exist. The other structs are opaque: only the runtime looks into them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;

constexpr uint32_t API_VERSION = 18;  // of ONNX Runtime 1.18, the first with every function below

enum ElementType { ANY = 0, FLOAT = 1, UINT8 = 2, INT8 = 3, INT64 = 7, BFLOAT16 = 16 };
enum ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2 };
enum Presence { REQUIRED = 0, OPTIONAL = 1 };

class Api {
   public:
    explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

    Status* error(ErrorCode code, const char* message) const {
        return at<Status*(ErrorCode, const char*)>(0)(code, message);
    }
    Status* create_domain(const char* name, Domain** out) const {
        return at<Status*(const char*, Domain**)>(26)(name, out);
    }
    Status* add_operator(Domain* domain, const void* op) const {
        return at<Status*(Domain*, const void*)>(27)(domain, op);
    }
    Status* add_domain(SessionOptions* options, Domain* domain) const {
        return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
    }
    Status* data(Value* value, void** out) const { return at<Status*(Value*, void**)>(51)(value, out); }
    Status* element_type(const ShapeInfo* info, int* out) const {
        return at<Status*(const ShapeInfo*, int*)>(60)(info, out);
    }
    Status* rank(const ShapeInfo* info, size_t* out) const {
        return at<Status*(const ShapeInfo*, size_t*)>(61)(info, out);
    }
    Status* sizes(const ShapeInfo* info, int64_t* out, size_t count) const {
        return at<Status*(const ShapeInfo*, int64_t*, size_t)>(62)(info, out, count);
    }
    Status* shape_info(const Value* value, ShapeInfo** out) const {
        return at<Status*(const Value*, ShapeInfo**)>(65)(value, out);
    }
    Status* attribute(const KernelInfo* info, const char* name, float* out) const {
        return at<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
    }
    Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const {
        return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
    }
    Status* input(const KernelContext* context, size_t index, const Value** out) const {
        return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, out);
    }
    Status* output(KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** out) const {
        return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, sizes, rank, out);
    }
    void release(Status* status) const { at<void(Status*)>(93)(status); }
    void release(ShapeInfo* info) const { at<void(ShapeInfo*)>(99)(info); }
    Status* input_count(const KernelInfo* info, size_t* out) const {
        return at<Status*(const KernelInfo*, size_t*)>(230)(info, out);
    }
    // *out is null if the input is not a constant.
    Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** out) const {
        return at<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, is_constant, out);
    }
    // Call work(state, 0 .. count - 1) on the session's threads and wait.
    Status* parallel_for(const KernelContext* context, void (*work)(void*, size_t), size_t count, void* state) const {
        return at<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, work, count,
                                                                                                   0, state);
    }

   private:
    template <class Function> Function* at(size_t place) const { return reinterpret_cast<Function*>(table_[place]); }
    void* const* table_;
};

struct ApiBase {
    const void* (*get_api)(uint32_t version);
    const char* (*get_version)();
};

// The description of an operator for the runtime, in the order of its header. Fields from may_inplace on are unused.
struct Operator {
    uint32_t version;
    void* (*create_kernel)(const Operator*, const void* api, const KernelInfo*);
    const char* (*name)(const Operator*);
    const char* (*provider)(const Operator*);
    int (*input_type)(const Operator*, size_t);
    size_t (*input_count)(const Operator*);
    int (*output_type)(const Operator*, size_t);
    size_t (*output_count)(const Operator*);
    void (*compute)(void* kernel, KernelContext*);
    void (*destroy_kernel)(void* kernel);
    int (*input_presence)(const Operator*, size_t);
    int (*output_presence)(const Operator*, size_t);
    int (*input_memory)(const Operator*, size_t);
    int (*variadic_input_least)(const Operator*);
    int (*variadic_input_is_uniform)(const Operator*);
    int (*variadic_output_least)(const Operator*);
    int (*variadic_output_is_uniform)(const Operator*);
    Status* (*create_kernel_v2)(const Operator*, const void* api, const KernelInfo*, void** kernel);
    Status* (*compute_v2)(void* kernel, KernelContext*);
    void* infer_shape;
    int (*first_version)(const Operator*);
    int (*last_version)(const Operator*);
    void* may_inplace;
    void* release_may_inplace;
    void* alias_map;
    void* release_alias_map;
};

}  // namespace ort
