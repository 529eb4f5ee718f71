// Reads damaged checkpoints in memory: fuzz CURRENT. fuzz/reader.py sends it files and looks at what comes back.
//
// A request: the number of files, of variants, of the first variant, which is the files as they are; each file as its size
// and bytes. An answer for each variant that is taken: its number + 1, its files, and the dense file of read.c, each as its
// size and bytes. Then a zero, and how many were refused. Every number has 8 bytes, in the order of this machine. The variant
// that is read now is in the file CURRENT, in the form of a request, for whoever finds this program dead.
#include <fcntl.h>
#include <malloc.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include "mutate.h"
#include "weights.h"

#define MOST_FILES 4
#define MOST_MEMORY ((size_t)64 << 20)  // that a variant may ask for, in all
#define PROCESSOR_SECONDS 10            // that 256 variants may take

static jmp_buf refused;

_Noreturn void fail(const char* what) {
  (void)what;
  longjmp(refused, 1);
}

static void need_bytes(void* to, size_t count) {
  if (fread(to, 1, count, stdin) != count) exit(feof(stdin) ? 0 : 1);
}

static uint64_t need_number(void) {
  uint64_t out;
  need_bytes(&out, 8);
  return out;
}

static void expect(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "a request has %s\n", what);
  exit(2);
}

static void put(const void* data, uint64_t size, FILE* out) {
  fwrite(&size, 8, 1, out);
  fwrite(data, 1, (size_t)size, out);
}

static void limit_processor_time(void) {
  const struct itimerval limit = {{0, 0}, {PROCESSOR_SECONDS, 0}};
  setitimer(ITIMER_PROF, &limit, NULL);
}

static void put_current(uint8_t* to, const Bytes* all, size_t count) {
  const uint64_t head[] = {count, 1, 0};
  memcpy(to, head, sizeof(head));
  to += sizeof(head);
  for (size_t i = 0; i < count; to += 8 + all[i].size, ++i) {
    const uint64_t size = all[i].size;
    memcpy(to, &size, 8);
    memcpy(to + 8, all[i].data, size);
  }
}

// Whether the files are taken; then `out` has the dense file.
static bool take_files(const Bytes* all, size_t count, FILE* out) {
  File here[MOST_FILES];
  subject = (Text){NULL, 0}, files = here, file_count = (int)count;
  if (setjmp(refused)) return false;
  for (size_t i = 0; i < count; ++i) {
    uint8_t* const exact = allocate(all[i].size, 1);  // so that a read behind its end is noticed
    memcpy(exact, all[i].data, all[i].size);
    here[i] = parse_file(exact, all[i].size);
  }
  write_dense(out);
  return true;
}

static void check_memory(void) {
  size_t memory = 0;
  for (size_t i = 0; i < allocated_count; ++i) memory += malloc_usable_size(allocated[i]);
  if (memory <= MOST_MEMORY) return;
  fprintf(stderr, "a variant took %zu bytes of memory\n", memory);
  abort();
}

int main(int count, char** arguments) {
  const size_t room = MOST_FILES * (MOST_BYTES + 8) + 24;
  const int file = count == 2 ? open(arguments[1], O_RDWR | O_CREAT, 0600) : -1;
  if (file < 0 || ftruncate(file, (off_t)room)) {
    fprintf(stderr, "usage: fuzz CURRENT, a file that can be written\n");
    return 2;
  }
  uint8_t* const current = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (current == MAP_FAILED) return 1;
  Bytes base[MOST_FILES], damaged[MOST_FILES];
  for (int i = 0; i < MOST_FILES; ++i) base[i].data = malloc(MOST_BYTES), damaged[i].data = malloc(MOST_BYTES);
  for (;;) {
    const uint64_t files_here = need_number(), variants = need_number(), first = need_number();
    expect(files_here && files_here <= MOST_FILES, "no files, or too many");
    for (uint64_t i = 0; i < files_here; ++i) {
      base[i].size = need_number();
      expect(base[i].size <= MOST_BYTES, "a file that is too long");
      need_bytes(base[i].data, base[i].size);
    }
    uint64_t refusals = 0;
    for (uint64_t v = first; v - first < variants; ++v) {
      for (uint64_t i = 0; i < files_here; ++i) {
        memcpy(damaged[i].data, base[i].data, base[i].size);
        damaged[i].size = base[i].size;
      }
      Random random = {v};
      if (v != first) damage(&random, damaged, files_here);
      put_current(current, damaged, files_here);
      if ((v - first) % 256 == 0) limit_processor_time();
      char* dense = NULL;
      size_t size = 0;
      FILE* const out = open_memstream(&dense, &size);
      if (!out) return 1;
      const bool taken = take_files(damaged, files_here, out);
      fclose(out);
      check_memory();
      free_all();
      if (taken) {
        const uint64_t number = v + 1;
        fwrite(&number, 8, 1, stdout);
        for (uint64_t i = 0; i < files_here; ++i) put(damaged[i].data, damaged[i].size, stdout);
        put(dense, size, stdout);
      }
      refusals += !taken;
      free(dense);
    }
    const uint64_t end[] = {0, refusals};
    fwrite(end, 8, 2, stdout);
    fflush(stdout);
  }
}
