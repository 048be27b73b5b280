// Reads a safetensors file: 8 bytes that say how long the header is; a header in JSON with each tensor's dtype, shape
// and where its bytes lie; then the bytes. All numbers become doubles, which hold every one of them exactly
// but for integers beyond 2^53. For machines whose least significant byte comes first, as it does in the file.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Tensor {
    std::string dtype;
    std::vector<size_t> shape;
    std::vector<double> values;  // row after row
};

// A number of 16 or 8 bits: sign, exponent, significand. e4m3fn, which has no infinities, is the odd one out.
inline double small_float(unsigned bits, int exponent_bits, int significand_bits, bool infinities = true) {
    const int largest = (1 << exponent_bits) - 1, bias = largest / 2;
    const int exponent = bits >> significand_bits & largest, significand = bits & ((1 << significand_bits) - 1);
    const double sign = bits >> (exponent_bits + significand_bits) ? -1 : 1;
    if (exponent == largest && infinities) return significand ? NAN : sign * INFINITY;
    if (exponent == largest && significand == (1 << significand_bits) - 1) return NAN;
    if (exponent == 0) return sign * std::ldexp(significand, 1 - bias - significand_bits);
    return sign * std::ldexp(significand + (1 << significand_bits), exponent - bias - significand_bits);
}

template <class Number> double read_number(const char* at) {
    Number number;
    std::memcpy(&number, at, sizeof number);
    return static_cast<double>(number);
}

inline double element(const std::string& dtype, const char* bytes, size_t i) {
    if (dtype == "F64") return read_number<double>(bytes + 8 * i);
    if (dtype == "F32") return read_number<float>(bytes + 4 * i);
    if (dtype == "F16") return small_float(read_number<uint16_t>(bytes + 2 * i), 5, 10);
    if (dtype == "BF16") return small_float(read_number<uint16_t>(bytes + 2 * i), 8, 7);
    if (dtype == "F8_E4M3") return small_float(read_number<uint8_t>(bytes + i), 4, 3, false);
    if (dtype == "F8_E5M2") return small_float(read_number<uint8_t>(bytes + i), 5, 2);
    if (dtype == "I64") return read_number<int64_t>(bytes + 8 * i);
    if (dtype == "I32") return read_number<int32_t>(bytes + 4 * i);
    if (dtype == "I8") return read_number<int8_t>(bytes + i);
    throw std::runtime_error("dtype " + dtype + " is not known here");
}

class Safetensors {
public:
    explicit Safetensors(const std::string& path) {
        std::ifstream file(path, std::ios::binary);
        const std::string all{std::istreambuf_iterator<char>(file), {}};
        uint64_t length = 0;
        if (all.size() >= 8) std::memcpy(&length, all.data(), 8);
        if (all.size() < 8 || length > all.size() - 8) throw std::runtime_error(path + " is no safetensors file");
        path_ = path, header_ = all.substr(8, length), bytes_ = all.substr(8 + length);
    }

    bool has(const std::string& name) const { return header_.find(quoted(name)) != std::string::npos; }

    Tensor operator[](const std::string& name) const {
        if (!has(name)) throw std::runtime_error(path_ + " has no tensor " + name);
        // An entry reads "name":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}, its keys in any order.
        const size_t at = header_.find(quoted(name));
        const std::string entry = header_.substr(at, header_.find('}', at) - at);
        const size_t quote = entry.find('"', entry.find(':', entry.find(quoted("dtype"))));
        Tensor tensor{entry.substr(quote + 1, entry.find('"', quote + 1) - quote - 1), list(entry, "shape"), {}};
        size_t count = 1;
        for (size_t length : tensor.shape) count *= length;
        const size_t bits = std::stoul(tensor.dtype.substr(tensor.dtype.find_first_of("123456789")));
        const std::vector<size_t> offsets = list(entry, "data_offsets");
        if (offsets.size() != 2 || offsets[1] > bytes_.size() || offsets[0] + count * bits / 8 != offsets[1])
            throw std::runtime_error(path_ + ": the offsets of " + name + " do not fit");
        for (size_t i = 0; i < count; ++i) tensor.values.push_back(element(tensor.dtype, &bytes_[offsets[0]], i));
        return tensor;
    }

private:
    static std::string quoted(const std::string& name) { return '"' + name + '"'; }

    static std::vector<size_t> list(const std::string& entry, const std::string& key) {
        const size_t open = entry.find('[', entry.find(quoted(key)));
        std::string text = entry.substr(open + 1, entry.find(']', open) - open - 1);
        std::replace(text.begin(), text.end(), ',', ' ');
        std::istringstream words(text);
        std::vector<size_t> numbers;
        for (size_t number; words >> number;) numbers.push_back(number);
        return numbers;
    }

    std::string path_, header_, bytes_;
};

// The golden files of a folder, simplest first.
inline std::vector<std::filesystem::path> golden_files(const std::string& folder) {
    std::vector<std::filesystem::path> files;
    for (const auto& file : std::filesystem::directory_iterator(folder))
        if (file.path().extension() == ".safetensors") files.push_back(file.path());
    if (files.empty()) throw std::runtime_error(folder + " holds no golden files");
    std::sort(files.begin(), files.end());
    return files;
}
