// Memory for tensors that are made, used and dropped over and over: a fresh mapping costs more in page faults than it
// takes to fill, and malloc maps and unmaps large ones each time.
#pragma once
#include <ATen/ATen.h>

#include <memory>
#include <mutex>
#include <vector>

namespace hqqtensor {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  Pool() = default;
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();
  // An uninitialized tensor of `like`'s dtype on the CPU. Its memory comes back once no tensor uses it any more; two
  // pieces at most wait for their next use.
  at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like);

 private:
  struct Piece {
    void* data;
    size_t bytes;
  };
  void give_back(Piece);

  std::mutex lock_;
  std::vector<Piece> free_;
};

}  // namespace hqqtensor
