// A library for LD_PRELOAD that counts a process's calls of libc on files of one folder, or its requests for much
// memory, and lets one of them go wrong. `inject.py` compiles and controls it.
//
// Calls from within libc (fopen's read and write) do not come by here; Python, torch, safetensors and libstdc++ do.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

// In the order of OPS in inject.py.
enum op { OPEN, CREATE, READ, WRITE, SYNC, TRUNCATE, RENAME, UNLINK, MKDIR, MMAP, CLOSE, COPY, MEMORY };

// In the order of FAULTS in inject.py.
enum fault {
  NONE,       // only count
  ERROR,      // the call fails with `error`
  ERRORS,     // it and all counted calls after it do
  SHORT,      // a read or write does half of what it is asked for
  KILL,       // the process dies before the call
  TORN,       // a write does half of its work, then the process dies
  INTERRUPT,  // SIGINT (Ctrl-C) arrives before the call
};

#define LOG_LENGTH 65536

// Shared with the process that started this one, so that it can be read after a kill.
struct state {
  int64_t at;         // number of the counted call that goes wrong, from 1 on
  int64_t mask;       // bit `op`: calls of this kind are counted
  int64_t fault;      // enum fault
  int64_t error;      // errno
  int64_t threshold;  // bytes from which a request for memory is counted
  int64_t count;      // calls counted so far
  int64_t hits;       // calls that went wrong
  char folder[4096];  // absolute path
  uint8_t log[LOG_LENGTH];  // enum op of each counted call
};

static struct state* state;
static size_t folder_length;
static _Atomic unsigned char is_watched[65536];  // by file descriptor

void faults_arm(struct state* shared) {
  folder_length = shared ? strlen(shared->folder) : 0;
  state = shared;
}

static int is_within(const char* path) {
  return state && path && !strncmp(path, state->folder, folder_length) &&
         (path[folder_length] == '/' || path[folder_length] == 0);
}

static int is_watched_fd(int fd) { return state && fd >= 0 && fd < 65536 && is_watched[fd]; }

static int is_within_at(int folder, const char* path) {
  return path && (path[0] == '/' || folder == AT_FDCWD ? is_within(path) : is_watched_fd(folder));
}

static int watch(int fd) {
  if (fd >= 0 && fd < 65536) is_watched[fd] = 1;
  return fd;
}

enum outcome { GO_ON, FAIL, HALF, HALF_AND_DIE };

// Counts a call of a watched file, and says what is to become of it. With FAIL errno is set.
static enum outcome count(enum op op) {
  struct state* s = state;
  if (!s || !(s->mask >> op & 1)) return GO_ON;
  int64_t number = __atomic_add_fetch(&s->count, 1, __ATOMIC_SEQ_CST);
  if (number <= LOG_LENGTH) s->log[number - 1] = op;
  if (s->fault == NONE || number < s->at || (number > s->at && s->fault != ERRORS)) return GO_ON;
  __atomic_add_fetch(&s->hits, 1, __ATOMIC_SEQ_CST);
  switch (s->fault) {
    case KILL:
      kill(getpid(), SIGKILL);
      for (;;) pause();
    case INTERRUPT:
      kill(getpid(), SIGINT);
      return GO_ON;
    case SHORT:
      return HALF;
    case TORN:
      return HALF_AND_DIE;
    default:
      errno = (int)s->error;
      return FAIL;
  }
}

#define REAL(name) \
  static __typeof__(name)* real; \
  if (!real) real = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)

static ssize_t finished(enum outcome outcome, ssize_t done) {
  if (outcome == HALF_AND_DIE) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  return done;
}

static size_t share(enum outcome outcome, size_t bytes) {
  return outcome == GO_ON || bytes < 2 ? bytes : bytes / 2;
}

// ---- opening and closing

static enum op opening(int flags) { return flags & (O_CREAT | O_TRUNC) ? CREATE : OPEN; }

static mode_t mode_of(int flags, va_list arguments) {
  return flags & (O_CREAT | __O_TMPFILE) ? (mode_t)va_arg(arguments, int) : 0;
}

#define OPEN_FUNCTION(name) \
  int name(const char* path, int flags, ...) { \
    REAL(name); \
    va_list arguments; \
    va_start(arguments, flags); \
    mode_t mode = mode_of(flags, arguments); \
    va_end(arguments); \
    if (!is_within(path)) return real(path, flags, mode); \
    return count(opening(flags)) == FAIL ? -1 : watch(real(path, flags, mode)); \
  }

OPEN_FUNCTION(open)
OPEN_FUNCTION(open64)

#define OPENAT_FUNCTION(name) \
  int name(int folder, const char* path, int flags, ...) { \
    REAL(name); \
    va_list arguments; \
    va_start(arguments, flags); \
    mode_t mode = mode_of(flags, arguments); \
    va_end(arguments); \
    if (!is_within_at(folder, path)) return real(folder, path, flags, mode); \
    return count(opening(flags)) == FAIL ? -1 : watch(real(folder, path, flags, mode)); \
  }

OPENAT_FUNCTION(openat)
OPENAT_FUNCTION(openat64)

#define FOPEN_FUNCTION(name) \
  FILE* name(const char* path, const char* mode) { \
    REAL(name); \
    if (!is_within(path)) return real(path, mode); \
    if (count(strchr(mode, 'r') ? OPEN : CREATE) == FAIL) return NULL; \
    FILE* file = real(path, mode); \
    if (file) watch(fileno(file)); \
    return file; \
  }

FOPEN_FUNCTION(fopen)
FOPEN_FUNCTION(fopen64)

int close(int fd) {
  REAL(close);
  if (!is_watched_fd(fd)) return real(fd);
  enum outcome outcome = count(CLOSE);
  int error = errno;
  is_watched[fd] = 0;
  int result = real(fd);  // a descriptor is gone after an error, too
  if (outcome != FAIL) return result;
  errno = error;
  return -1;
}

// ---- reading and writing

#define TRANSFER(name, op, buffer) \
  ssize_t name(int fd, buffer data, size_t bytes) { \
    REAL(name); \
    if (!is_watched_fd(fd)) return real(fd, data, bytes); \
    enum outcome outcome = count(op); \
    return outcome == FAIL ? -1 : finished(outcome, real(fd, data, share(outcome, bytes))); \
  }

TRANSFER(read, READ, void*)
TRANSFER(write, WRITE, const void*)

#define TRANSFER_AT(name, op, buffer, place) \
  ssize_t name(int fd, buffer data, size_t bytes, place offset) { \
    REAL(name); \
    if (!is_watched_fd(fd)) return real(fd, data, bytes, offset); \
    enum outcome outcome = count(op); \
    return outcome == FAIL ? -1 : finished(outcome, real(fd, data, share(outcome, bytes), offset)); \
  }

TRANSFER_AT(pread, READ, void*, off_t)
TRANSFER_AT(pread64, READ, void*, off64_t)
TRANSFER_AT(pwrite, WRITE, const void*, off_t)
TRANSFER_AT(pwrite64, WRITE, const void*, off64_t)

// Half of a vector: the first half of its parts, or of its only part.
static int halve(enum outcome outcome, const struct iovec* parts, int number, struct iovec* first) {
  *first = parts[0];
  if (outcome == GO_ON || number > 1) return outcome == GO_ON ? number : number / 2;
  first->iov_len = share(outcome, first->iov_len);
  return 1;
}

#define VECTOR(name, op, parameters, arguments) \
  ssize_t name(int fd, const struct iovec* parts, int number parameters) { \
    REAL(name); \
    if (!is_watched_fd(fd) || number < 1) return real(fd, parts, number arguments); \
    enum outcome outcome = count(op); \
    if (outcome == FAIL) return -1; \
    struct iovec first; \
    number = halve(outcome, parts, number, &first); \
    if (number == 1) parts = &first; \
    return finished(outcome, real(fd, parts, number arguments)); \
  }

#define AND ,
VECTOR(readv, READ, , )
VECTOR(writev, WRITE, , )
VECTOR(preadv, READ, AND off_t offset, AND offset)
VECTOR(preadv64, READ, AND off64_t offset, AND offset)
VECTOR(pwritev, WRITE, AND off_t offset, AND offset)
VECTOR(pwritev64, WRITE, AND off64_t offset, AND offset)
VECTOR(preadv2, READ, AND off_t offset AND int flags, AND offset AND flags)
VECTOR(preadv64v2, READ, AND off64_t offset AND int flags, AND offset AND flags)
VECTOR(pwritev2, WRITE, AND off_t offset AND int flags, AND offset AND flags)
VECTOR(pwritev64v2, WRITE, AND off64_t offset AND int flags, AND offset AND flags)

#define SENDFILE(name, place) \
  ssize_t name(int out, int in, place* offset, size_t bytes) { \
    REAL(name); \
    if (!is_watched_fd(out) && !is_watched_fd(in)) return real(out, in, offset, bytes); \
    enum outcome outcome = count(COPY); \
    return outcome == FAIL ? -1 : finished(outcome, real(out, in, offset, share(outcome, bytes))); \
  }

SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t bytes, unsigned flags) {
  REAL(copy_file_range);
  if (!is_watched_fd(out) && !is_watched_fd(in)) return real(in, from, out, to, bytes, flags);
  enum outcome outcome = count(COPY);
  return outcome == FAIL ? -1 : finished(outcome, real(in, from, out, to, share(outcome, bytes), flags));
}

// ---- everything else that changes files

#define ON_FD(name, op, parameters, arguments) \
  int name(int fd parameters) { \
    REAL(name); \
    return is_watched_fd(fd) && count(op) == FAIL ? -1 : real(fd arguments); \
  }

ON_FD(fsync, SYNC, , )
ON_FD(fdatasync, SYNC, , )
ON_FD(ftruncate, TRUNCATE, AND off_t length, AND length)
ON_FD(ftruncate64, TRUNCATE, AND off64_t length, AND length)

#define ON_PATH(name, op, parameters, arguments) \
  int name(const char* path parameters) { \
    REAL(name); \
    return is_within(path) && count(op) == FAIL ? -1 : real(path arguments); \
  }

ON_PATH(truncate, TRUNCATE, AND off_t length, AND length)
ON_PATH(unlink, UNLINK, , )
ON_PATH(rmdir, UNLINK, , )
ON_PATH(mkdir, MKDIR, AND mode_t mode, AND mode)
ON_PATH(rename, RENAME, AND const char* to, AND to)
ON_PATH(link, RENAME, AND const char* to, AND to)

int unlinkat(int folder, const char* path, int flags) {
  REAL(unlinkat);
  return is_within_at(folder, path) && count(UNLINK) == FAIL ? -1 : real(folder, path, flags);
}

int mkdirat(int folder, const char* path, mode_t mode) {
  REAL(mkdirat);
  return is_within_at(folder, path) && count(MKDIR) == FAIL ? -1 : real(folder, path, mode);
}

int renameat(int from, const char* old, int to, const char* new) {
  REAL(renameat);
  return is_within_at(from, old) && count(RENAME) == FAIL ? -1 : real(from, old, to, new);
}

int linkat(int from, const char* old, int to, const char* new, int flags) {
  REAL(linkat);
  return is_within_at(to, new) && count(RENAME) == FAIL ? -1 : real(from, old, to, new, flags);
}

// ---- memory: files that are mapped, and large requests

static int is_refused(size_t bytes) {
  return state && (int64_t)bytes >= state->threshold && count(MEMORY) == FAIL;
}

#define MMAP_FUNCTION(name, place) \
  void* name(void* address, size_t bytes, int protection, int flags, int fd, place offset) { \
    REAL(name); \
    int fails = (is_watched_fd(fd) && count(MMAP) == FAIL) || \
                (!(protection & PROT_EXEC) && protection != PROT_NONE && is_refused(bytes)); \
    return fails ? MAP_FAILED : real(address, bytes, protection, flags, fd, offset); \
  }

MMAP_FUNCTION(mmap, off_t)
MMAP_FUNCTION(mmap64, off64_t)

// Not by dlsym, which may itself ask for memory.
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) { return is_refused(bytes) ? NULL : __libc_malloc(bytes); }

void* calloc(size_t number, size_t bytes) {
  return is_refused(number * bytes) ? NULL : __libc_calloc(number, bytes);
}

void* realloc(void* old, size_t bytes) { return is_refused(bytes) ? NULL : __libc_realloc(old, bytes); }

void* memalign(size_t alignment, size_t bytes) {
  return is_refused(bytes) ? NULL : __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void** out, size_t alignment, size_t bytes) {
  void* memory = memalign(alignment, bytes);
  if (!memory) return ENOMEM;
  *out = memory;
  return 0;
}
