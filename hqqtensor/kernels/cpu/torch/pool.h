// Memory for tensors that are made, used and dropped over and over: a fresh mapping costs more in page faults than it
// takes to fill, and malloc maps and unmaps large ones each time.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "torch/tensor.h"

namespace hqqtensor {

class Pool : public std::enable_shared_from_this<Pool> {
 public:
  Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();
  // An uninitialized tensor on the CPU. Its memory comes back once no tensor uses it any more; two pieces at most wait for
  // their next use.
  Tensor empty(Sizes, Scalar, int64_t item_size);

 private:
  struct Piece {
    void* data;
    size_t bytes;
  };
  struct Lease {  // of a piece by a tensor: keeps the pool until it is given back
    std::shared_ptr<Pool> pool;
    Piece piece;
  };
  void give_back(Piece);

  std::mutex lock_;
  std::vector<Piece> free_;
};

}  // namespace hqqtensor
