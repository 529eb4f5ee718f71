// Reads the quantized weights of a checkpoint and writes them dense: read OUT.safetensors IN.safetensors...
// Written from docs/format.md alone, so that a mistake there, or in hqqtensor, shows as a difference. No file makes it read
// or write out of bounds. Exit codes: 0, 2 for a wrong call, 3 for a file that is refused. Memory is left to the system.
//
// gcc -std=gnu11 -O1 -ffp-contract=off read.c -o read: float32 operations must be rounded one by one.
#include "weights.h"

_Noreturn void fail(const char* what) {
  fprintf(stderr, "%.*s%s%s\n", (int)subject.length, subject.bytes ? subject.bytes : "", subject.length ? ": " : "", what);
  exit(3);
}

int main(int count, char** arguments) {
  if (count < 3) {
    fprintf(stderr, "usage: read OUT.safetensors IN.safetensors...\n");
    return 2;
  }
  file_count = count - 2;
  files = allocate((size_t)file_count, sizeof(File));
  for (int i = 0; i < file_count; ++i) {
    subject = (Text){arguments[i + 2], strlen(arguments[i + 2])};
    files[i] = open_file(arguments[i + 2]);
  }
  char* dense = NULL;
  size_t size = 0;
  FILE* const in_memory = open_memstream(&dense, &size);
  check(in_memory != NULL, "out of memory");
  write_dense(in_memory);
  check(fclose(in_memory) == 0, "out of memory");
  FILE* const out = fopen(arguments[1], "wb");
  check(out != NULL, "the output cannot be written");
  fwrite(dense, 1, size, out);
  check(!ferror(out) && fclose(out) == 0, "the output cannot be written");
  return 0;
}
