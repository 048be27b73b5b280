// Paged attention by definition, in float: reads golden files, writes its outputs to one safetensors file.
//
//     c++ -std=c++17 -O2 attend.cpp -o attend && ./attend golden output.safetensors
//     paged oracle judge golden --output output.safetensors
//
// With -DMISTAKE the last token of a sequence that fills its last block is never read.
#include <cstdio>

#include "safetensors.hpp"

// What a kernel is called with; the letters of shapes are those of the contract.
struct Inputs {
    explicit Inputs(const Safetensors& golden)
        : query(golden["query"]), keys(golden["key_cache"]), values(golden["value_cache"]),
          tables(golden["block_tables"]), lengths(golden["seq_lens"]), starts(golden["query_start_loc"]),
          scale(golden["scale"]), window(given(golden, "window")), softcap(given(golden, "softcap")),
          slopes(given(golden, "alibi_slopes")), sinks(given(golden, "sinks")), k_scale(given(golden, "k_scale")),
          v_scale(given(golden, "v_scale")) {}

    static std::vector<double> given(const Safetensors& golden, const char* name) {
        return golden.has(name) ? golden[name].values : std::vector<double>();
    }

    Tensor query, keys, values, tables, lengths, starts, scale;
    std::vector<double> window, softcap, slopes, sinks, k_scale, v_scale;  // empty where there is none
};

// A scale of all numbers, of each head [Hkv], or of each slot and head [N * P, Hkv].
float scale_at(const std::vector<double>& scale, size_t slot, size_t head, size_t num_heads) {
    if (scale.empty()) return 1;
    return scale.size() == 1 ? scale[0] : scale.size() == num_heads ? scale[head] : scale[slot * num_heads + head];
}

// One query token and head, which sees keys `first` to `last` of sequence b: adds to out [Dv], returns the log-sum-exp.
float attend_row(const Inputs& in, size_t b, size_t t, size_t h, long first, long last, long position, float* out) {
    const size_t heads = in.query.shape[1], dim = in.query.shape[2], value_dim = in.values.shape[3];
    const size_t block_size = in.keys.shape[1], kv_heads = in.keys.shape[2], kv_head = h / (heads / kv_heads);
    const double* query = &in.query.values[(t * heads + h) * dim];
    std::vector<size_t> slots;
    std::vector<float> scores;
    for (long key = first; key <= last; ++key) {
        const size_t block = in.tables.values[b * in.tables.shape[1] + key / block_size];
        const size_t slot = block * block_size + key % block_size;
        float dot = 0;
        for (size_t d = 0; d < dim; ++d)
            dot += float(query[d]) * float(in.keys.values[(slot * kv_heads + kv_head) * dim + d]);
        float score = float(in.scale.values[0]) * scale_at(in.k_scale, slot, kv_head, kv_heads) * dot;
        if (!in.softcap.empty()) score = float(in.softcap[0]) * std::tanh(score / float(in.softcap[0]));
        if (!in.slopes.empty()) score += float(in.slopes[h]) * float(key - position);
        slots.push_back(slot);
        scores.push_back(score);
    }
    if (slots.empty()) return -INFINITY;
    const float largest = *std::max_element(scores.begin(), scores.end());
    float sum = 0;
    for (float score : scores) sum += std::exp(score - largest);
    const float whole = sum + (in.sinks.empty() ? 0 : std::exp(float(in.sinks[h]) - largest));
    for (size_t i = 0; i < slots.size(); ++i) {
        const float weight = std::exp(scores[i] - largest) / whole * scale_at(in.v_scale, slots[i], kv_head, kv_heads);
        for (size_t d = 0; d < value_dim; ++d)
            out[d] += weight * float(in.values.values[(slots[i] * kv_heads + kv_head) * value_dim + d]);
    }
    return largest + std::log(sum);
}

// All rows: out [T, Hq, Dv] and lse [T, Hq].
void attend(const Inputs& in, std::vector<float>& out, std::vector<float>& lse) {
    const size_t heads = in.query.shape[1], value_dim = in.values.shape[3];
    out.assign(in.query.shape[0] * heads * value_dim, 0);
    for (size_t b = 0; b < in.lengths.values.size(); ++b)
        for (size_t t = in.starts.values[b]; t < in.starts.values[b + 1]; ++t) {
            const long length = in.lengths.values[b], position = length - long(in.starts.values[b + 1]) + long(t);
            const long first = in.window.empty() ? 0 : std::max(0L, position - long(in.window[0]) + 1);
            long last = position;
#ifdef MISTAKE
            if (position == length - 1 && length % in.keys.shape[1] == 0) --last;
#endif
            for (size_t h = 0; h < heads; ++h)
                lse.push_back(attend_row(in, b, t, h, first, last, position, &out[(t * heads + h) * value_dim]));
        }
}

// Adds a tensor to a safetensors file that is being made: its entry to the header, its numbers to the bytes.
void add(std::string& header, std::string& bytes, const std::string& name, const std::vector<float>& numbers,
         const std::vector<size_t>& shape) {
    std::string lengths;
    for (size_t length : shape) lengths += (lengths.empty() ? "" : ",") + std::to_string(length);
    const size_t begin = bytes.size();
    bytes.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(float));
    header += (header.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"F32\",\"shape\":[" + lengths +
              "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(bytes.size()) + "]}";
}

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: attend FOLDER OUTPUT");
    std::string header, bytes;
    for (const auto& path : golden_files(argv[1])) {
        const Inputs in{Safetensors(path.string())};
        std::vector<float> out, lse;
        attend(in, out, lse);
        const std::string name = path.stem().string();
        const size_t rows = in.query.shape[0], heads = in.query.shape[1], value_dim = in.values.shape[3];
        add(header, bytes, name + ".out", out, {rows, heads, value_dim});
        add(header, bytes, name + ".lse", lse, {rows, heads});
    }
    header += "}";
    const uint64_t length = header.size();
    std::ofstream file(argv[2], std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), 8) << header << bytes << std::flush;
    if (!file) throw std::runtime_error(std::string(argv[2]) + " cannot be written");
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "attend: error: %s\n", error.what());
    return 2;
}
