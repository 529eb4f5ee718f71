// Runs a language model from an AOTInductor package: decode PACKAGE NEW TOKEN [TOKEN ...] writes NEW tokens, the likeliest
// each time. It needs torch's libraries and libhqqtensor_cpu.so, and no Python. docs/export.md says how to build it.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

extern "C" int hqqtensor_define_operators();  // in libhqqtensor_cpu.so

int main(int count, char** words) try {
  if (count < 4) return std::fprintf(stderr, "usage: %s PACKAGE NEW TOKEN [TOKEN ...]\n", words[0]), 2;
  if (hqqtensor_define_operators() != 0) return std::fprintf(stderr, "hqqtensor's operators are defined already\n"), 1;
  torch::inductor::AOTIModelPackageLoader model(words[1]);

  std::vector<int64_t> tokens;
  for (int i = 3; i < count; ++i) tokens.push_back(std::atoll(words[i]));
  at::Tensor ids = at::tensor(tokens, at::kLong).unsqueeze(0);  // the whole prompt first, [1, length]
  int64_t position = 0;
  for (long left = std::atol(words[2]); left > 0; --left) {
    const int64_t length = ids.size(1);
    const at::Tensor positions = at::arange(position, position + length, at::kLong);
    const at::Tensor logits = model.run({ids, positions}).at(0);  // [1, length, vocabulary]
    position += length;
    ids = logits.select(1, length - 1).argmax(-1, /*keepdim=*/true);  // then one token at a time, [1, 1]
    std::printf("%lld\n", (long long)ids.item<int64_t>());
  }
  return 0;
} catch (const c10::Error& error) {
  std::fprintf(stderr, "%s\n", error.what_without_backtrace());
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
