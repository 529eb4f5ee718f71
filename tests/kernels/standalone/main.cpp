// Drives the kernels with random calls: see docs/reliability.md.
//   standalone [--seconds S] [--first SEED] [--set NAME] [--threads N]
// Each call is made twice, with buffers that end at a page that cannot be touched and with buffers that begin behind one, and
// must give the same bytes. --threads: both calls in a pool of N threads, while another thread makes calls of its own.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>

#include "standalone.h"

using namespace hqqtensor;

namespace {

struct Options {
  double seconds = 5;
  uint64_t first = 0;
  std::string set;
  int64_t threads = 0;
};

// What runs now, for the message of a handler.
std::atomic<uint64_t> current_seed{0};
std::string current_set;

[[maybe_unused]] void on_fault(int signal) {
  char text[200];
  const char* const what = signal == SIGILL || signal == SIGTRAP ? "undefined behaviour" : "an access out of bounds";
  const int size = std::snprintf(text, sizeof(text), "%s, seed %llu: %s (signal %d)\n", current_set.c_str(),
                                 (unsigned long long)current_seed.load(), what, signal);
  (void)!write(2, text, (size_t)size);
  _exit(1);
}

Result run(uint64_t seed, bool touches_end, const char** name) {
  Random random(seed);
  Buffers buffers(touches_end, touches_end ? 0xA5 : 0xFF);
  fill_scratch(touches_end);
  const Case& c = kCases[(size_t)random.below((int64_t)kCases.size())];
  *name = c.name;
  return c.run(random, buffers);
}

bool is_decoder(const char* name) { return std::strcmp(name, "decoder") == 0; }

// How the case of a seed is threaded where there is one thread: a team cannot wait for pieces that come later.
void thread_pieces(uint64_t seed, int64_t pieces) {
  Random random(seed);
  const bool team = is_decoder(kCases[(size_t)random.below((int64_t)kCases.size())].name);
  set_threading(team ? Threading::whole : Threading::pieces, team ? 1 : pieces);
}

// The case of a seed twice; false where the results differ or are wrong.
bool check(uint64_t seed, int64_t threads, std::map<std::string, int64_t>& counts) {
  const char* name = "";
  try {
    threads ? set_threading(Threading::pool, threads) : thread_pieces(seed, 3);
    const Result first = run(seed, true, &name), second = run(seed, false, &name);
    ++counts[name];
    if (first == second) return true;
    std::fprintf(stderr, "%s, seed %llu, %s: two runs differ\n", current_set.c_str(), (unsigned long long)seed, name);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s, seed %llu, %s: %s\n", current_set.c_str(), (unsigned long long)seed, name, error.what());
  }
  return false;
}

// Cases of one instruction set until `seconds` have passed; false after the first that fails.
bool run_set(const Options& o) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(o.seconds);
  std::map<std::string, int64_t> counts;
  std::atomic<bool> good{true};
  std::thread other;
  if (o.threads)
    other = std::thread([&] {
      std::map<std::string, int64_t> ignored;
      for (uint64_t seed = o.first + (1u << 30); Clock::now() < end && good; ++seed)
        if (!check(seed, 2, ignored)) good = false;
    });
  for (uint64_t seed = o.first; Clock::now() < end && good; ++seed) {
    current_seed = seed;
    if (!check(seed, o.threads, counts)) good = false;
  }
  if (other.joinable()) other.join();
  std::printf("%s:", current_set.c_str());
  for (const auto& [name, count] : counts) std::printf(" %s %lld,", name.c_str(), (long long)count);
  std::printf(" %s\n", good ? "all well" : "FAILED");
  std::fflush(stdout);
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  Options o;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--seconds") o.seconds = std::atof(value.c_str());
    if (name == "--first") o.first = std::strtoull(value.c_str(), nullptr, 10);
    if (name == "--set") o.set = value;
    if (name == "--threads") o.threads = std::atoll(value.c_str());
  }
#if !defined(__SANITIZE_THREAD__)
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) std::signal(signal, on_fault);
#endif
  bool good = true;
  for (const std::string& name : instruction_sets()) {
    if (!o.set.empty() && o.set != name) continue;
    use_instruction_set(current_set = name);
    good = run_set(o) && good;
  }
  return good ? 0 : 1;
}
