// arguments [--seconds S] [--inputs N] [--first SEED]: random inputs, each from a seed.
// arguments FILE: the input in a file.
#include <sys/time.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "harness.h"

namespace {

volatile uint64_t current_seed = 0;

void on_signal(int signal) {
  char text[100];
  const char* const what = signal == SIGPROF ? "a hang" : signal == SIGABRT ? "a finding" : "a crash";
  const int size = std::snprintf(text, sizeof(text), "seed %llu: %s\n", (unsigned long long)current_seed, what);
  (void)!write(2, text, (size_t)size);
  if (signal != SIGABRT) fake::print_current();  // a finding has been printed
  _exit(1);
}

void limit_processor_time(time_t seconds) {
  const itimerval limit{{0, 0}, {seconds, 0}};
  setitimer(ITIMER_PROF, &limit, nullptr);
}

// What was called; 1 where nothing was.
int report() {
  const auto& s = fake::statistics();
  if (s.calls == 0) {
    std::fprintf(stderr, "no operator was called\n");
    return 1;
  }
  std::printf("%lld inputs, %lld taken; %lld calls, %lld served:", (long long)s.inputs, (long long)s.taken, (long long)s.calls,
              (long long)s.served);
  for (const auto& [name, count] : s.served_by_operator) std::printf(" %s %lld,", name.c_str(), (long long)count);
  std::printf(" all well\n");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  double seconds = 1e9;
  int64_t inputs = INT64_MAX, first = 0;
#if !defined(__SANITIZE_ADDRESS__)
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}) std::signal(signal, on_signal);
#endif
  for (const int signal : {SIGPROF, SIGABRT}) std::signal(signal, on_signal);
  if (count == 2) {
    std::ifstream file(arguments[1], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    fake::run_input((const uint8_t*)bytes.data(), bytes.size());
    return report();
  }
  for (int i = 1; i + 1 < count; i += 2) {
    if (!std::strcmp(arguments[i], "--seconds")) seconds = std::atof(arguments[i + 1]);
    if (!std::strcmp(arguments[i], "--inputs")) inputs = std::atoll(arguments[i + 1]);
    if (!std::strcmp(arguments[i], "--first")) first = std::atoll(arguments[i + 1]);
  }
  const auto start = std::chrono::steady_clock::now();
  for (int64_t seed = first; seed - first < inputs; ++seed) {
    current_seed = (uint64_t)seed;
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() > seconds) break;
    std::mt19937_64 random((uint64_t)seed);
    std::vector<uint8_t> bytes(random() % 700);
    for (uint8_t& byte : bytes) byte = (uint8_t)random();
    limit_processor_time(10);
    fake::run_input(bytes.data(), bytes.size());
  }
  limit_processor_time(0);
  return report();
}
