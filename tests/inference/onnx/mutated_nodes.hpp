// The operators as a runtime would make and run them from a crafted file: attributes and tensors are mutated, and every
// tensor lies in an array of exactly its size. A node has to run, or to be refused with a message that names the attribute.

#include <cfloat>
#include <map>

namespace ort {

struct Status {
    std::string message;
};
struct Value {
    int type;
    std::vector<int64_t> shape;
    std::unique_ptr<uint8_t[]> data;
};
struct ShapeInfo {
    const Value* value;
};
// A node: its attributes, and its inputs, null where one is left out.
struct KernelInfo {
    std::map<std::string, int64_t> integers;
    std::map<std::string, float> numbers;
    std::vector<std::unique_ptr<Value>> inputs;
    const Value* input(size_t index) const { return index < inputs.size() ? inputs[index].get() : nullptr; }
};
struct KernelContext {
    const KernelInfo* node;
    size_t num_outputs;
    std::vector<std::unique_ptr<Value>> outputs;
};

}  // namespace ort

namespace driver {

constexpr int64_t MOST_BYTES = 1 << 22;  // of a tensor in a file of these tests

int64_t bytes_of(int type, const std::vector<int64_t>& shape) {
    int64_t bytes = type == ort::INT64 ? 8 : type == ort::FLOAT ? 4 : type == ort::BFLOAT16 ? 2 : 1;
    for (int64_t size : shape)
        if (size == 0) return 0;
    for (int64_t size : shape)
        if (size < 0 || bytes > MOST_BYTES / size) return -1;
        else bytes *= size;
    return bytes;
}

// A tensor with the bytes of `from`, or of `random` where there are no more. Null where no file would have it.
std::unique_ptr<ort::Value> tensor(Random& random, int type, std::vector<int64_t> shape, const void* from = nullptr, int64_t size = 0) {
    const int64_t bytes = bytes_of(type, shape);
    if (bytes < 0) return nullptr;
    std::unique_ptr<ort::Value> made(new ort::Value{type, shape, Exact<uint8_t>(new uint8_t[size_t(bytes)])});
    for (int64_t i = 0; i < bytes; ++i) made->data[i] = i < size ? static_cast<const uint8_t*>(from)[i] : uint8_t(random());
    return made;
}

template <class T> std::unique_ptr<ort::Value> filled(Random& random, int type, std::vector<int64_t> shape, const T* from) {
    return tensor(random, type, shape, from, bytes_of(type, shape));
}

std::unique_ptr<ort::Value> random_numbers(Random& random, std::vector<int64_t> shape) {
    const int64_t count = bytes_of(ort::FLOAT, shape) / 4;
    return filled(random, ort::FLOAT, shape, numbers(random, count).get());
}

template <class Function> void* entry(Function* function) { return reinterpret_cast<void*>(function); }

template <class T> ort::Status* find(const std::map<std::string, T>& in, const char* name, T* out) {
    const auto found = in.find(name);
    if (found == in.end()) return new ort::Status{"no such attribute"};
    *out = found->second;
    return nullptr;
}

// The part of the API that ort_api.hpp calls.
const void* runtime() {
    using namespace ort;
    static void* table[275] = {};
    table[0] = entry(+[](ErrorCode, const char* message) { return new Status{message}; });
    table[51] = entry(+[](Value* value, void** out) -> Status* { return *out = value->data.get(), nullptr; });
    table[60] = entry(+[](const ShapeInfo* info, int* out) -> Status* { return *out = info->value->type, nullptr; });
    table[61] = entry(+[](const ShapeInfo* info, size_t* out) -> Status* { return *out = info->value->shape.size(), nullptr; });
    table[62] = entry(+[](const ShapeInfo* info, int64_t* out, size_t count) -> Status* {
        return std::copy_n(info->value->shape.begin(), count, out), nullptr;
    });
    table[65] = entry(+[](const Value* value, ShapeInfo** out) -> Status* { return *out = new ShapeInfo{value}, nullptr; });
    table[85] = entry(+[](const KernelInfo* node, const char* name, float* out) { return find(node->numbers, name, out); });
    table[86] = entry(+[](const KernelInfo* node, const char* name, int64_t* out) { return find(node->integers, name, out); });
    table[90] = entry(+[](const KernelContext* context, size_t index, const Value** out) -> Status* {
        return *out = context->node->input(index), nullptr;
    });
    table[91] = entry(+[](KernelContext* context, size_t index, const int64_t* sizes, size_t rank, Value** out) -> Status* {
        *out = nullptr;
        if (index >= context->num_outputs) return nullptr;
        const std::vector<int64_t> shape(sizes, sizes + rank);
        const int64_t bytes = bytes_of(FLOAT, shape);
        if (bytes < 0) return new Status{"no memory"};
        context->outputs.emplace_back(new Value{FLOAT, shape, Exact<uint8_t>(new uint8_t[size_t(bytes)])});
        return *out = context->outputs.back().get(), nullptr;
    });
    table[93] = entry(+[](Status* status) { delete status; });
    table[99] = entry(+[](ShapeInfo* info) { delete info; });
    table[230] = entry(+[](const KernelInfo* node, size_t* out) -> Status* { return *out = node->inputs.size(), nullptr; });
    table[249] = entry(+[](const KernelInfo* node, size_t index, int* is_constant, const Value** out) -> Status* {
        return *out = node->input(index), *is_constant = *out != nullptr, nullptr;
    });
    table[274] = entry(+[](const KernelContext*, void (*work)(void*, size_t), size_t count, size_t, void* state) -> Status* {
        for (size_t i = 0; i < count; ++i) work(state, i);
        return nullptr;
    });
    return table;
}

// Makes and runs a node; returns the message of what refused it, "" where nothing did.
template <class Node> std::string run(const ort::KernelInfo& node) {
    const ort::Operator op = pst::describe<Node>();
    void* kernel = nullptr;
    std::unique_ptr<ort::Status> status(op.create_kernel_v2(&op, runtime(), &node, &kernel));
    if (!status) {
        ort::KernelContext context{&node, Node::outputs, {}};
        status.reset(op.compute_v2(kernel, &context));
        op.destroy_kernel(kernel);
    }
    return status ? (status->message.empty() ? "an empty message" : status->message) : "";
}

ort::KernelInfo sparse_linear(Random& random) {
    const int64_t rows = between(random, 1, 20), cols = between(random, 1, 80);
    const Weight w = random_weight(random, rows, cols);
    const bool has_codes = w.parts.kind >= pst::Parts::CODES8;
    const int types[] = {ort::FLOAT, ort::BFLOAT16, ort::INT8, ort::UINT8};
    ort::KernelInfo node;
    node.integers = {{"bits", has_codes ? (w.parts.kind == pst::Parts::CODES8 ? 8 : 4) : 0}, {"columns", cols}};
    node.integers["activation"] = between(random, 0, 5), node.integers["activation_bits"] = one_of(random, {8, 16});
    node.inputs.push_back(random_numbers(random, {between(random, 1, 9), cols}));
    node.inputs.push_back(filled(random, ort::UINT8, {rows, (cols + 7) / 8}, w.mask.get()));
    node.inputs.push_back(filled(random, types[w.parts.kind], {w.parts.count}, w.bytes.get()));
    node.inputs.push_back(has_codes ? filled(random, ort::BFLOAT16, {rows, w.parts.groups}, w.scales.get()) : nullptr);
    if (random() % 2) node.inputs.push_back(random_numbers(random, {rows}));
    return node;
}

ort::KernelInfo skip_layer_norm(Random& random) {
    const int64_t tokens = between(random, 1, 9), width = between(random, 1, 40);
    ort::KernelInfo node;
    node.numbers["epsilon"] = 1e-5f;
    node.inputs.push_back(random_numbers(random, {tokens, width}));
    node.inputs.push_back(random() % 2 ? random_numbers(random, {tokens, width}) : nullptr);
    node.inputs.push_back(random_numbers(random, {width}));
    if (random() % 2) node.inputs.push_back(random_numbers(random, {width}));
    return node;
}

ort::KernelInfo attention_node(Random& random) {
    const int64_t batch = between(random, 1, 2), queries = between(random, 1, 9), keys = between(random, 1, 20);
    const int64_t head = one_of(random, {16, between(random, 1, 20)}), shared = between(random, 1, 2), heads = shared * between(random, 1, 3);
    ort::KernelInfo node;
    node.integers = {{"heads", heads}, {"key_value_heads", shared}, {"head_size", head}, {"activation_bits", one_of(random, {8, 16})}};
    node.numbers["scale"] = 0.3f;
    for (const char* name : {"q", "k", "v"}) {
        const bool is_query = name[0] == 'q';
        const int64_t offset = between(random, 0, 5), columns = offset + (is_query ? heads : shared) * head;
        node.integers[std::string(name) + "_offset"] = offset;
        node.inputs.push_back(random_numbers(random, {batch, is_query ? queries : keys, columns + between(random, 0, 3)}));
    }
    if (random() % 2)
        node.inputs.push_back(random_numbers(
            random, {random() % 2 ? batch : 1, random() % 2 ? heads : 1, random() % 2 ? queries : 1, keys}));
    return node;
}

ort::KernelInfo embedding(Random& random) {
    const int64_t bits = one_of(random, {4, 8, 16}), groups = between(random, 1, 3), cols = groups * between(random, 1, 9);
    const int64_t tokens = between(random, 1, 9), count = between(random, 1, 9);
    ort::KernelInfo node;
    node.integers = {{"bits", bits}, {"columns", cols}};
    Exact<int64_t> ids = exact<int64_t>(count);
    for (int64_t i = 0; i < count; ++i) ids[i] = between(random, -tokens, tokens - 1);
    node.inputs.push_back(filled(random, ort::INT64, {count}, ids.get()));
    const int type = bits == 16 ? ort::BFLOAT16 : bits == 8 ? ort::INT8 : ort::UINT8;
    node.inputs.push_back(tensor(random, type, {tokens, bits == 4 ? (cols + 1) / 2 : cols}));
    if (bits < 16) node.inputs.push_back(tensor(random, ort::BFLOAT16, {tokens, groups}));
    return node;
}

int64_t odd_integer(Random& random, int64_t old) {
    const int64_t power = int64_t(1) << between(random, 0, 62), part = INT64_MAX / std::max<int64_t>(old, 2);
    switch (random() % 8) {
        case 0: return one_of(random, {0, -1, 1, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, INT64_MIN + 1});
        case 1: return INT64_MAX - one_of(random, {7, 31, 63});
        case 2: return old + one_of(random, {-1, 1});
        case 3: return one_of(random, {2 * old, -old, old / 2, part, part + 1});
        case 4: return power + one_of(random, {-1, 0});
        case 5: return -power;
        case 6: return int64_t(random());
        default: return between(random, 0, 100);
    }
}

float odd_number(Random& random) {
    const float odd[] = {0.0f, -0.0f, -1.0f, FLT_MAX, -FLT_MAX, FLT_MIN / 4, INFINITY, -INFINITY, NAN};
    float any;
    const uint32_t bits = uint32_t(random());
    std::memcpy(&any, &bits, 4);
    return random() % 2 ? odd[random() % 9] : any;
}

// Changes an attribute, or removes it; returns its name.
std::string mutate_attribute(Random& random, ort::KernelInfo& node) {
    size_t which = random() % (node.integers.size() + node.numbers.size());
    const bool remove = random() % 10 == 0;
    for (auto& [name, value] : node.integers)
        if (!which--) {
            const std::string found = name;
            return remove ? (void)node.integers.erase(found) : (void)(value = odd_integer(random, value)), found;
        }
    auto& [name, value] = *std::next(node.numbers.begin(), int64_t(which));
    const std::string found = name;
    return remove ? (void)node.numbers.erase(found) : (void)(value = odd_number(random)), found;
}

// Gives an input other sizes, another type or other contents, or leaves it out.
void mutate_tensor(Random& random, ort::KernelInfo& node) {
    std::unique_ptr<ort::Value>& input = node.inputs[random() % node.inputs.size()];
    if (!input || random() % 8 == 0) return input.reset();
    int type = input->type;
    std::vector<int64_t> shape = input->shape;
    const int64_t held = random() % 4 ? bytes_of(type, shape) : 0;
    if (random() % 4 == 0) type = int(one_of(random, {ort::FLOAT, ort::UINT8, ort::INT8, ort::INT64, ort::BFLOAT16}));
    for (int64_t& size : shape)
        if (random() % 3 == 0) size = one_of(random, {0, 1, size - 1, size + 1, size, int64_t(1) << between(random, 30, 62)});
    if (random() % 8 == 0) shape.push_back(between(random, 0, 2));
    if (random() % 8 == 0 && !shape.empty()) shape.pop_back();
    if (random() % 8 == 0)  // no elements
        shape = {int64_t(1) << between(random, 30, 55), int64_t(1) << between(random, 0, 62), 0};
    if (auto made = tensor(random, type, shape, input->data.get(), held)) input = std::move(made);
}

void mutated_nodes(Random& random, int64_t count) {
    struct Kind {
        const char* name;
        ort::KernelInfo (*make)(Random&);
        std::string (*run)(const ort::KernelInfo&);
    };
    const Kind kinds[] = {{"SparseLinear", sparse_linear, run<pst::SparseLinear>},
                          {"SkipLayerNorm", skip_layer_norm, run<pst::SkipLayerNorm>},
                          {"Attention", attention_node, run<pst::Attention>},
                          {"Embedding", embedding, run<pst::Embedding>}};
    for (int64_t i = 0; i < count; ++i) {
        const Kind& kind = kinds[i % 4];
        ort::KernelInfo node = kind.make(random);
        const auto report = [&](const std::string& what) {
            if (++wrong < 10) std::printf("%s: %s\n", kind.name, what.c_str());
        };
        const std::string refused_whole = kind.run(node);
        if (!refused_whole.empty()) report("not mutated, but refused: " + refused_whole);
        const std::string name = mutate_attribute(random, node), message = kind.run(node);
        if (!message.empty() && message.find(name) == std::string::npos) report(name + " was mutated: " + message);
        mutate_tensor(random, node);
        kind.run(node);
    }
}

}  // namespace driver
