// Checks a kernel's outputs against golden files, element by element:  |got - expected| <= bound.
//
//     paged oracle export golden
//     c++ -std=c++17 -O2 check.cpp -o check && ./check golden output.safetensors
//
// Exit code 0: all right; 1: something is wrong; 2: a file is missing or is not what it should be.
#include <cstdio>

#include "safetensors.hpp"

// How large an element's error is as a share of what is allowed; more than 1 is wrong.
double share(double got, double expected, double bound) {
    if (got == expected || (std::isnan(got) && std::isnan(expected)) || std::isinf(bound)) return 0;
    const double error = std::fabs(got - expected);
    return std::isnan(error) ? INFINITY : error / bound;
}

// The largest share of one result, "out" [T, Hq, Dv] or "lse" [T, Hq]; where it is too large, says where that is.
double check(const Safetensors& golden, const Safetensors& output, const std::string& name, const std::string& what) {
    const Tensor got = output[name + "." + what], expected = golden[what], bound = golden[what + "_bound"];
    if (got.shape != expected.shape) throw std::runtime_error(name + "." + what + " has another shape than expected");
    double worst = 0;
    size_t at = 0;
    for (size_t i = 0; i < got.values.size(); ++i) {
        const double now = share(got.values[i], expected.values[i], bound.values[i]);
        if (now > worst) worst = now, at = i;
    }
    if (worst > 1) {
        const size_t heads = got.shape[1], dims = what == "out" ? got.shape[2] : 1;
        std::printf("%s.%s: row %zu, head %zu, dim %zu: expected %g, got %g, error %.2g times what is allowed\n",
                    name.c_str(), what.c_str(), at / dims / heads, at / dims % heads, at % dims, expected.values[at],
                    got.values[at], worst);
    }
    return worst;
}

int main(int argc, char** argv) try {
    if (argc != 3) throw std::runtime_error("usage: check FOLDER OUTPUT");
    const auto files = golden_files(argv[1]);
    const Safetensors output(argv[2]);
    double worst = 0;
    size_t wrong = 0;
    for (const auto& path : files) {
        const Safetensors golden(path.string());
        const std::string name = path.stem().string();
        double largest = check(golden, output, name, "out");
        if (output.has(name + ".lse")) largest = std::max(largest, check(golden, output, name, "lse"));
        worst = std::max(worst, largest);
        wrong += largest > 1;
    }
    std::printf("%zu files, %zu wrong; the largest error is %.3g times what is allowed\n", files.size(), wrong, worst);
    return wrong ? 1 : 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "check: error: %s\n", error.what());
    return 2;
}
