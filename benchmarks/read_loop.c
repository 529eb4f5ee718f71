// Reads a buffer with several threads, each over several streams with prefetch, and returns the xor of its words.
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t Line __attribute__((vector_size(64), aligned(16)));
typedef struct {
  const Line* lines;
  size_t count;
  int streams;
  uint64_t out;
} Part;

static void* read_part(void* arg) {
  Part* part = arg;
  const size_t each = part->count / part->streams;
  const Line* p = part->lines;
  Line a = {0}, b = {0}, c = {0}, d = {0};
  if (part->streams == 1) {
    for (size_t i = 0; i + 4 <= each; i += 4) {
      for (int j = 0; j < 4; ++j) __builtin_prefetch(p + i + j + 64, 0, 2);
      a ^= p[i], b ^= p[i + 1], c ^= p[i + 2], d ^= p[i + 3];
    }
  } else {
    const Line *q = p + each, *r = q + each, *s = r + each;
    for (size_t i = 0; i < each; ++i) {
      __builtin_prefetch(p + i + 32), __builtin_prefetch(q + i + 32);
      __builtin_prefetch(r + i + 32), __builtin_prefetch(s + i + 32);
      a ^= p[i], b ^= q[i], c ^= r[i], d ^= s[i];
    }
  }
  a ^= b ^ c ^ d;
  for (int i = 0; i < 8; ++i) part->out ^= a[i];
  return NULL;
}

// streams: 1 or 4 a thread. Words beyond a whole number of lines a stream are left out.
uint64_t read_loop(const void* buffer, size_t nbytes, int threads, int streams) {
  enum { MOST = 64 };
  pthread_t ids[MOST];
  Part parts[MOST];
  if (threads > MOST) threads = MOST;
  const size_t each = nbytes / sizeof(Line) / threads;
  for (int t = 0; t < threads; ++t) {
    parts[t] = (Part){(const Line*)buffer + t * each, each, streams, 0};
    if (t && pthread_create(&ids[t], NULL, read_part, &parts[t])) return 0;
  }
  read_part(&parts[0]);
  uint64_t out = parts[0].out;
  for (int t = 1; t < threads; ++t) pthread_join(ids[t], NULL), out ^= parts[t].out;
  return out;
}
