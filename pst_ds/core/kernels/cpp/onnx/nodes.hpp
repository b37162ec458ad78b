// The operators as ONNX Runtime sees them, with their inputs, attributes and shapes checked.
//
// A node is made once per session from constants and attributes of the file, which may be damaged or hostile: everything
// that a loop relies on is checked here, in the constructor if the file determines it and in compute() otherwise.
// Tensors are those of the runtime, contiguous; x is (..., columns) fp32 and its leading dimensions are rows of one
// matrix. Constants live as long as the session, which outlives its nodes. compute() is const and may run on several
// threads at once; failures leave as exceptions only as far as guarded(), since the runtime is written for C.
#pragma once

#include <cfloat>

#include "codes.hpp"
#include "functions.hpp"
#include "node_inputs.hpp"

namespace pst {

// Whether inputs keep 16 bits regardless of the node.
inline bool& exact_inputs() {
    static bool exact = false;
    return exact;
}

class SparseLinear {
   public:
    static constexpr const char* name = "SparseLinear";
    static constexpr size_t inputs = 5;
    static constexpr size_t required = 3;
    static constexpr size_t outputs = 1;

    explicit SparseLinear(const Info& info) : activation_(info.choice("activation", 0, {0, 1, 2, 3, 4, 5})) {
        const Tensor mask = info.constant(1, "SparseLinear takes its mask as a constant");
        const Tensor values = info.constant(2, "SparseLinear takes its values as a constant");
        const Tensor scales = info.constant(3, "", true);
        const Tensor bias = info.constant(4, "", true);
        const int64_t bits = info.choice("bits", 0, {0, 4, 8});
        const int64_t cols = info.integer("columns", 0, 1);
        const int64_t activation_bits = info.choice("activation_bits", 16, {8, 16});
        require(mask.shape.size() == 2 && mask.type == ort::UINT8 && mask.width() == (cols + 7) / 8 && mask.shape[0] > 0 &&
                    mask.shape[0] <= LARGEST_ATTRIBUTE,
                "the mask of SparseLinear is (rows, ceil(columns / 8)) bytes, for columns = ", cols);
        Parts parts{Parts::FP32, values.data, values.numel(), mask.as<uint8_t>(), nullptr, 0, mask.shape[0], cols};
        if (bits) {
            require(values.type == (bits == 8 ? ort::INT8 : ort::UINT8),
                    "the codes of SparseLinear are int8, or uint8 for two of 4 bits; bits = ", bits);
            require(scales.type == ort::BFLOAT16 && scales.shape.size() == 2 && scales.shape[0] == parts.rows &&
                        scales.shape[1] > 0 && cols % scales.shape[1] == 0,
                    "the scales of SparseLinear are (rows, groups) bf16, of groups that divide columns = ", cols);
            parts.kind = bits == 8 ? Parts::CODES8 : Parts::CODES4;
            parts.scales = scales.as<bf16>();
            parts.groups = scales.shape[1];
        } else {
            require(values.type == ort::FLOAT || values.type == ort::BFLOAT16, "the values of SparseLinear are fp32 or bf16, for bits = 0");
            if (values.type == ort::BFLOAT16) parts.kind = Parts::BF16;
        }
        rows_ = parts.rows;
        columns_ = parts.cols;
        const bool in_bytes = activation_bits == 8 && !exact_inputs();
        const bool expands = CodeProduct::pays(parts, in_bytes);
        // instructions that do not expand bits take entries, of the same bytes
        const bool takes_bytes = in_bytes && Stream::takes_bytes(parts) && CodeProduct::is_dense(parts, true);
        const bool fits = expands ? codes_.make(parts, in_bytes) : entries_.make(parts, operators().panel, takes_bytes);
        require(fits, "the mask of SparseLinear keeps another number of values than there are, for columns = ", cols);
        if (bias) {
            require(bias.type == ort::FLOAT && bias.numel() == parts.rows, "the bias of SparseLinear is (rows,) fp32");
            bias_.assign(bias.as<float>(), bias.as<float>() + parts.rows);
        }
    }

    void compute(const Call& call) const {
        const Tensor x = call.input(0);
        require(x.type == ort::FLOAT && !x.shape.empty() && x.width() == columns_, "x of SparseLinear is (..., columns) fp32");
        std::vector<int64_t> shape = x.shape;
        shape.back() = rows_;
        float* y = call.output(0, shape);
        if (!y || !x.numel()) return;
        const float* bias = bias_.empty() ? nullptr : bias_.data();
        if (codes_) return codes_.multiply(x.as<float>(), x.rows(), bias, activation_, y, call.parallel);
        if (!operators().product(entries_, x.as<float>(), x.rows(), bias, activation_, y, call.parallel)) throw std::bad_alloc();
    }

   private:
    int64_t activation_;
    int64_t rows_ = 0;
    int64_t columns_ = 0;
    CodeProduct codes_;  // exactly one is used
    Stream entries_;
    std::vector<float> bias_;
};

class SkipLayerNorm {
   public:
    static constexpr const char* name = "SkipLayerNorm";
    static constexpr size_t inputs = 4;
    static constexpr size_t required = 1;
    static constexpr size_t outputs = 2;

    explicit SkipLayerNorm(const Info& info) : epsilon_(info.number("epsilon", 1e-5f, 0)) {}

    void compute(const Call& call) const {
        const Tensor x = call.input(0);
        const Tensor skip = call.input(1);
        const Tensor gain = call.input(2);
        const Tensor shift = call.input(3);
        const int64_t width = x.width();
        require(x.type == ort::FLOAT && gain.type == ort::FLOAT && gain.numel() == width &&
                    (!shift || (shift.type == ort::FLOAT && shift.numel() == width)),
                "gain and shift of SkipLayerNorm are fp32 of the width of x");
        require(!skip || (skip.type == ort::FLOAT && skip.shape == x.shape), "skip of SkipLayerNorm has the shape of x");
        float* y = call.output(0, x.shape);
        float* sum = call.output(1, x.shape);
        if (!y || !x.numel()) return;
        const int64_t rows = x.rows();
        const int64_t step = 32;
        call.parallel((rows + step - 1) / step, [&](int64_t piece) {
            for (int64_t row = piece * step; row < rows && row < (piece + 1) * step; ++row)
                operators().layer_norm(x.as<float>() + row * width, skip ? skip.as<float>() + row * width : nullptr,
                                       gain.as<float>(), shift ? shift.as<float>() : nullptr, epsilon_, width,
                                       y + row * width, sum ? sum + row * width : nullptr);
        });
    }

   private:
    float epsilon_;
};

class Attention {
   public:
    static constexpr const char* name = "Attention";
    static constexpr size_t inputs = 4;
    static constexpr size_t required = 3;
    static constexpr size_t outputs = 1;

    explicit Attention(const Info& info)
        : heads_(info.integer("heads", 0, 1)), key_value_heads_(info.integer("key_value_heads", 0, 1)),
          head_(info.integer("head_size", 0, 1)), q_at_(info.integer("q_offset", 0, 0)), k_at_(info.integer("k_offset", 0, 0)),
          v_at_(info.integer("v_offset", 0, 0)), scale_(info.number("scale", 1.0f, -FLT_MAX)),
          is_narrow_(info.choice("activation_bits", 16, {8, 16}) == 8 && !exact_inputs() && operators().narrow_attention) {
        require(heads_ % key_value_heads_ == 0, "Attention: key_value_heads = ", key_value_heads_,
                " does not divide heads = ", heads_);
    }

    void compute(const Call& call) const {
        const Tensor q = call.input(0);
        const Tensor k = call.input(1);
        const Tensor v = call.input(2);
        const Tensor mask = call.input(3);
        require_heads(q, "q", q_at_, "heads", heads_);
        require_heads(k, "k", k_at_, "key_value_heads", key_value_heads_);
        require_heads(v, "v", v_at_, "key_value_heads", key_value_heads_);
        require(q.shape[0] == k.shape[0] && k.shape[0] == v.shape[0] && k.shape[1] == v.shape[1],
                "q, k and v of Attention are of one batch, k and v of as many tokens");
        AttentionCall job{};
        job.batch = q.shape[0];
        job.queries = q.shape[1];
        job.keys = k.shape[1];
        job.heads = heads_;
        job.key_value_heads = key_value_heads_;
        job.head = head_;
        job.scale = scale_;
        job.q_width = q.width();
        job.k_width = k.width();
        job.v_width = v.width();
        job.y_width = heads_ * head_;
        if (mask) add_mask(mask, job);
        job.y = call.output(0, {job.batch, job.queries, job.y_width});
        if (!job.y || !job.batch || !job.queries) return;
        require(job.keys > 0, "k and v of Attention have no tokens");
        job.q = q.as<float>() + q_at_;
        job.k = k.as<float>() + k_at_;
        job.v = v.as<float>() + v_at_;
        const auto attend = is_narrow_ ? operators().narrow_attention : operators().attention;
        if (!attend(job, call.parallel)) throw std::bad_alloc();
    }

   private:
    void require_heads(const Tensor& x, const char* name, int64_t at, const char* of, int64_t heads) const {
        require(x.type == ort::FLOAT && x.shape.size() == 3, name, " of Attention is (batch, tokens, columns) fp32");
        require(x.width() >= at + heads * head_, name, " of Attention has ", x.width(), " columns: too few for ", of, " = ",
                heads, " of head_size = ", head_, " from ", name, "_offset = ", at, " on");
    }
    void add_mask(const Tensor& mask, AttentionCall& job) const {
        const std::vector<int64_t> whole{job.batch, job.heads, job.queries, job.keys};
        bool holds = mask.type == ort::FLOAT && mask.shape.size() == 4 && mask.shape[3] == job.keys;
        for (int i = 0; holds && i < 3; ++i) holds = mask.shape[i] == whole[i] || mask.shape[i] == 1;
        require(holds, "the mask of Attention is (batch, heads, queries, keys) fp32, all but keys may be 1");
        job.mask = mask.as<float>();
        job.mask_query = mask.shape[2] == 1 ? 0 : job.keys;
        job.mask_head = mask.shape[1] == 1 ? 0 : mask.shape[2] * job.keys;
        job.mask_batch = mask.shape[0] == 1 ? 0 : mask.shape[1] * mask.shape[2] * job.keys;
    }
    int64_t heads_;
    int64_t key_value_heads_;
    int64_t head_;
    int64_t q_at_;
    int64_t k_at_;
    int64_t v_at_;
    float scale_;
    bool is_narrow_;
};

class Embedding {
   public:
    static constexpr const char* name = "Embedding";
    static constexpr size_t inputs = 3;
    static constexpr size_t required = 2;
    static constexpr size_t outputs = 1;

    explicit Embedding(const Info& info)
        : bits_(info.choice("bits", 0, {4, 8, 16})), width_(info.integer("columns", 0, 1)) {
        values_ = info.constant(1, "Embedding takes its values as a constant");
        scales_ = info.constant(2, "", true);
        require(values_.type == (bits_ == 16 ? ort::BFLOAT16 : bits_ == 8 ? ort::INT8 : ort::UINT8),
                "the values of Embedding are bf16, int8 codes, or uint8 for two codes of 4 bits; bits = ", bits_);
        require(values_.shape.size() == 2 && values_.width() == (bits_ == 4 ? (width_ + 1) / 2 : width_),
                "the values of Embedding are (tokens, columns), of columns = ", width_);
        require(bits_ == 16 || (scales_.type == ort::BFLOAT16 && scales_.shape.size() == 2 && scales_.width() > 0 &&
                                scales_.shape[0] == values_.shape[0] && width_ % scales_.width() == 0),
                "the scales of Embedding are (tokens, groups) bf16, of groups that divide columns = ", width_);
    }

    void compute(const Call& call) const {
        const Tensor ids = call.input(0);
        require(ids.type == ort::INT64, "ids of Embedding are int64");
        std::vector<int64_t> shape = ids.shape;
        shape.push_back(width_);
        float* y = call.output(0, shape);
        for (int64_t i = 0; y && i < ids.numel(); ++i, y += width_) {
            const int64_t tokens = values_.shape[0];
            const int64_t given = ids.as<int64_t>()[i];
            const int64_t id = given < 0 ? given + tokens : given;
            require(id >= 0 && id < tokens, "an id of Embedding is outside its table");
            if (bits_ == 16)
                for (int64_t col = 0; col < width_; ++col) y[col] = widen(values_.as<bf16>()[id * width_ + col]);
            else
                row_of_codes(id, y);
        }
    }

   private:
    void row_of_codes(int64_t id, float* y) const {
        const int64_t groups = scales_.width();
        const int64_t group = width_ / groups;
        const int8_t* eight = values_.as<int8_t>() + id * values_.width();
        const uint8_t* four = values_.as<uint8_t>() + id * values_.width();
        for (int64_t g = 0; g < groups; ++g) {
            const float scale = widen(scales_.as<bf16>()[id * groups + g]);
            const int64_t first = g * group;
            const int64_t last = first + group;
            if (bits_ == 8)
                for (int64_t col = first; col < last; ++col) y[col] = float(eight[col]) * scale;
            else
                for (int64_t col = first; col < last; ++col) y[col] = float(nibble(four[col / 2], col & 1)) * scale;
        }
    }
    int64_t bits_;
    int64_t width_;
    // Owned by the session, which outlives its nodes.
    Tensor values_;
    Tensor scales_;
};

// Call `work`, and return its error as the runtime expects it.
template <class Work> ort::Status* guarded(const ort::Api& api, const Work& work) {
    try {
        work();
        return nullptr;
    } catch (const Failed& failed) {
        return failed.status;
    } catch (const std::invalid_argument& error) {
        return api.error(ort::INVALID_ARGUMENT, error.what());
    } catch (const std::exception& error) {
        return api.error(ort::FAIL, error.what());
    }
}

template <class Node> struct Kernel {
    ort::Api api;
    Node node;
};

template <class Node> ort::Operator describe() {
    ort::Operator op{};
    op.version = ort::API_VERSION;
    op.name = [](const ort::Operator*) { return Node::name; };
    op.provider = [](const ort::Operator*) -> const char* { return "CPUExecutionProvider"; };
    op.input_type = [](const ort::Operator*, size_t) -> int { return ort::ANY; };
    op.input_count = [](const ort::Operator*) { return Node::inputs; };
    op.output_type = [](const ort::Operator*, size_t) -> int { return ort::FLOAT; };
    op.output_count = [](const ort::Operator*) { return Node::outputs; };
    op.input_presence = [](const ort::Operator*, size_t index) -> int {
        return index < Node::required ? ort::REQUIRED : ort::OPTIONAL;
    };
    op.output_presence = [](const ort::Operator*, size_t index) -> int { return index ? ort::OPTIONAL : ort::REQUIRED; };
    op.input_memory = [](const ort::Operator*, size_t) { return 0; };
    const auto one = [](const ort::Operator*) { return 1; };
    op.variadic_input_least = op.variadic_input_is_uniform = op.variadic_output_least = op.variadic_output_is_uniform = one;
    op.first_version = one;
    op.last_version = [](const ort::Operator*) { return 1 << 30; };
    op.create_kernel_v2 = [](const ort::Operator*, const void* table, const ort::KernelInfo* info, void** out) {
        const ort::Api api(table);
        return guarded(api, [&] { *out = new Kernel<Node>{api, Node(Info(api, info, Node::name))}; });
    };
    op.compute_v2 = [](void* kernel, ort::KernelContext* context) {
        const auto* self = static_cast<const Kernel<Node>*>(kernel);
        return guarded(self->api, [&] { self->node.compute(Call(self->api, context)); });
    };
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel<Node>*>(kernel); };
    return op;
}

inline ort::Status* register_operators(ort::SessionOptions* options, const ort::ApiBase* base) {
    const void* table = base->get_api(ort::API_VERSION);
    if (!table) return ort::Api(base->get_api(1)).error(ort::FAIL, "the operators of pst-ds need ONNX Runtime 1.18 or newer");
    const ort::Api api(table);
    static const ort::Operator operators[] = {describe<SparseLinear>(), describe<SkipLayerNorm>(), describe<Attention>(),
                                              describe<Embedding>()};
    static ort::Domain* domain = nullptr;  // a domain is shared by all sessions for the lifetime of the process
    return guarded(api, [&] {
        if (!domain) {
            ort::Domain* made = nullptr;
            check(api.create_domain("pst_ds", &made));
            for (const ort::Operator& op : operators) check(api.add_operator(made, &op));
            domain = made;
        }
        check(api.add_domain(options, domain));
    });
}

}  // namespace pst
