// Logs what a program does to the files below $POWER_LOSS_FOLDER, in order, into $POWER_LOSS_LOG.
// tests/power_loss.py replays the log: what was synced is durable, all else may be lost.
//
//   cc -shared -fPIC -O1 -o power_loss.so power_loss.c && LD_PRELOAD=./power_loss.so PROGRAM
//
// One lock is held during a call and while it is logged, by all threads and processes, so the order
// of the log is the order of the calls. Descriptors are looked up in /proc, so dup, fork and close
// need nothing. Not seen: system calls that do not go through libc, and stores into a writable
// mapping. A sync logs the whole file, so it is right for those too; `Disk.check` finds the rest.
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

// Followed by n1 bytes of a path, n2 bytes of another one, and n3 bytes of data.
struct record { uint64_t op, inode, offset, n1, n2, n3; };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int log_file = -1;
static char root[PATH_MAX];

static int real_open(const char *path, int flags, mode_t mode) { REAL(open); return real(path, flags, mode); }
static ssize_t real_write(int fd, const void *data, size_t n) { REAL(write); return real(fd, data, n); }

static void before_fork(void) { pthread_mutex_lock(&mutex); }
static void in_parent(void) { pthread_mutex_unlock(&mutex); }
static void in_child(void) {
  if (log_file >= 0) close(log_file);
  log_file = -1;
  pthread_mutex_unlock(&mutex);
}

__attribute__((constructor)) static void start(void) {
  const char *folder = getenv("POWER_LOSS_FOLDER");
  if (folder && getenv("POWER_LOSS_LOG")) {
    strncpy(root, folder, sizeof root - 1);
    pthread_atfork(before_fork, in_parent, in_child);
  }
}

static void fail(const char *what) {
  dprintf(2, "power_loss: %s: %s\n", what, strerror(errno));
  _exit(99);
}

static void lock(void) {
  pthread_mutex_lock(&mutex);
  if (log_file < 0) {
    log_file = real_open(getenv("POWER_LOSS_LOG"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (log_file < 0) fail("log");
    int high = fcntl(log_file, F_DUPFD_CLOEXEC, 700);  // programs may close low descriptors
    if (high >= 0) { close(log_file); log_file = high; }
  }
  struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
  while (fcntl(log_file, F_SETLKW, &all)) if (errno != EINTR) fail("lock");
}

static void unlock(void) {
  int saved = errno;
  struct flock all = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
  fcntl(log_file, F_SETLK, &all);
  pthread_mutex_unlock(&mutex);
  errno = saved;
}

static void put(const void *data, size_t n) {
  for (const char *p = data; n;) {
    ssize_t r = real_write(log_file, p, n);
    if (r < 0 && errno != EINTR) fail("log");
    if (r > 0) p += r, n -= r;
  }
}

static void record(char op, uint64_t inode, uint64_t offset, const char *a, const char *b,
                   const void *data, size_t n) {
  int saved = errno;
  struct record r = {op, inode, offset, a ? strlen(a) : 0, b ? strlen(b) : 0, n};
  put(&r, sizeof r);
  put(a, r.n1);
  put(b, r.n2);
  put(data, n);
  errno = saved;
}

static int is_below(const char *path) {
  size_t n = strlen(root);
  return n && !strncmp(path, root, n) && (path[n] == '/' || !path[n]);
}

// Whether a path is below the folder; `out`: without links above its last part.
static int find(int folder, const char *path, char *out) {
  if (!root[0] || !path || !path[0]) return 0;
  int saved = errno, found = 0;
  char whole[2 * PATH_MAX] = "", parent[PATH_MAX];
  if (path[0] != '/') {
    if (folder == AT_FDCWD) {
      if (!getcwd(whole, PATH_MAX)) goto end;
    } else {
      char link[64];
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t n = readlink(link, whole, PATH_MAX - 1);
      if (n < 0) goto end;
      whole[n] = 0;
    }
    strcat(whole, "/");
  }
  strncat(whole, path, PATH_MAX - 1);
  for (size_t n = strlen(whole); n > 1 && whole[n - 1] == '/';) whole[--n] = 0;
  char *last = strrchr(whole, '/');
  *last++ = 0;
  if (!strcmp(last, ".") || !strcmp(last, "..")) {
    last[-1] = '/';
    found = realpath(whole, out) && is_below(out);
    goto end;
  }
  if (!realpath(whole[0] ? whole : "/", parent)) goto end;
  if (strlen(parent) + strlen(last) + 2 > PATH_MAX) goto end;
  sprintf(out, "%s/%s", strcmp(parent, "/") ? parent : "", last);
  found = is_below(out);
end:
  errno = saved;
  return found;
}

// The inode if the descriptor is of a file (or of a folder, whose path is then in `out`) below the
// folder, else 0.
static uint64_t of(int fd, int want_folder, char *out) {
  struct stat s;
  char link[64], path[PATH_MAX];
  int saved = errno;
  uint64_t inode = 0;
  if (root[0] && !fstat(fd, &s) && (want_folder ? S_ISDIR(s.st_mode) : S_ISREG(s.st_mode))) {
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n > 0) {
      path[n] = 0;
      if (is_below(path)) inode = s.st_ino;
      if (out) strcpy(out, path);
    }
  }
  errno = saved;
  return inode;
}

// Logs bytes of a file as they are now; n < 0: all.
static void contents(char op, int fd, uint64_t inode, off_t offset, ssize_t n) {
  int saved = errno;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  int in = real_open(link, O_RDONLY | O_CLOEXEC, 0);
  struct stat s;
  if (in < 0 || fstat(in, &s)) fail("read");
  if (n < 0) n = s.st_size;
  char *data = malloc(n + 1);
  for (ssize_t have = 0; have < n;) {
    ssize_t r = pread(in, data + have, n - have, offset + have);
    if (r <= 0) fail("read");
    have += r;
  }
  close(in);
  record(op, inode, offset, 0, 0, data, n);
  free(data);
  errno = saved;
}

static int exists(const char *path) {
  struct stat s;
  int saved = errno, found = !lstat(path, &s);
  errno = saved;
  return found;
}

static uint64_t size_of(const char *path) {
  struct stat s;
  int saved = errno;
  uint64_t found = stat(path, &s) ? 0 : s.st_size;
  errno = saved;
  return found;
}

static void opened(int fd, const char *path, int existed, uint64_t size, int truncates) {
  struct stat s;
  if (fd < 0 || fstat(fd, &s) || !S_ISREG(s.st_mode)) return;
  if (!existed) record('C', s.st_ino, 0, path, 0, 0, 0);
  else if (truncates && size) record('T', s.st_ino, 0, 0, 0, 0, 0);
}

static int open_any(int folder, const char *path, int flags, mode_t mode) {
  REAL(openat);
  char full[PATH_MAX];
  if (!(flags & (O_ACCMODE | O_CREAT | O_TRUNC)) || !find(folder, path, full))
    return real(folder, path, flags, mode);
  lock();
  int existed = exists(full);
  uint64_t size = size_of(full);
  int fd = real(folder, path, flags, mode);
  if ((flags & O_TMPFILE) == O_TMPFILE) record('X', 0, 0, "O_TMPFILE", 0, 0, 0);
  else opened(fd, full, existed, size, flags & O_TRUNC);
  unlock();
  return fd;
}

#define MODE mode_t mode = 0; \
  if (flags & (O_CREAT | O_TMPFILE)) { va_list v; va_start(v, flags); mode = va_arg(v, mode_t); va_end(v); }
int open(const char *path, int flags, ...) { MODE return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_any(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return open_any(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return open_any(folder, path, flags, mode); }
int __open_2(const char *path, int flags) { return open_any(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_any(AT_FDCWD, path, flags, 0); }
int __openat_2(int folder, const char *path, int flags) { return open_any(folder, path, flags, 0); }
int __openat64_2(int folder, const char *path, int flags) { return open_any(folder, path, flags, 0); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

// What stdio writes is logged when the stream is closed or its descriptor synced.
static FILE *open_stream(const char *path, const char *mode, FILE *(*real)(const char *, const char *)) {
  char full[PATH_MAX];
  if (!strpbrk(mode, "wa+") || !find(AT_FDCWD, path, full)) return real(path, mode);
  lock();
  int existed = exists(full);
  uint64_t size = size_of(full);
  FILE *file = real(path, mode);
  if (file) opened(fileno(file), full, existed, size, mode[0] == 'w');
  unlock();
  return file;
}
FILE *fopen(const char *path, const char *mode) { REAL(fopen); return open_stream(path, mode, real); }
FILE *fopen64(const char *path, const char *mode) { REAL(fopen64); return open_stream(path, mode, real); }
int fclose(FILE *file) {
  REAL(fclose);
  uint64_t inode = file ? of(fileno(file), 0, 0) : 0;
  if (!inode || (fcntl(fileno(file), F_GETFL) & O_ACCMODE) == O_RDONLY) return real(file);
  lock();
  fflush(file);
  contents('V', fileno(file), inode, 0, -1);
  int r = real(file);
  unlock();
  return r;
}

static void written(int fd, uint64_t inode, off_t offset, const struct iovec *parts, int count, ssize_t n) {
  if (n <= 0) return;
  if (offset < 0) offset = lseek(fd, 0, SEEK_CUR) - n;
  for (int i = 0; i < count && n > 0; i++) {
    size_t m = parts[i].iov_len < (size_t)n ? parts[i].iov_len : (size_t)n;
    record('W', inode, offset, 0, 0, parts[i].iov_base, m);
    offset += m, n -= m;
  }
  if (fcntl(fd, F_GETFL) & O_DSYNC) contents('S', fd, inode, 0, -1);  // O_SYNC includes O_DSYNC
}

#define WRITER(call, offset, ...) \
  uint64_t inode = of(fd, 0, 0); \
  if (!inode) return call; \
  lock(); \
  ssize_t n = call; \
  written(fd, inode, offset, __VA_ARGS__, n); \
  unlock(); \
  return n;
#define ONE &(struct iovec){(void *)data, size}, 1
ssize_t write(int fd, const void *data, size_t size) {
  REAL(write); WRITER(real(fd, data, size), -1, ONE) }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
  REAL(pwrite); WRITER(real(fd, data, size, at), at, ONE) }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  REAL(pwrite64); WRITER(real(fd, data, size, at), at, ONE) }
ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev); WRITER(real(fd, parts, count), -1, parts, count) }
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
  REAL(pwritev); WRITER(real(fd, parts, count, at), at, parts, count) }
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
  REAL(pwritev64); WRITER(real(fd, parts, count, at), at, parts, count) }
ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t at, int flags) {
  REAL(pwritev2); WRITER(real(fd, parts, count, at, flags), at, parts, count) }
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) {
  REAL(pwritev64v2); WRITER(real(fd, parts, count, at, flags), at, parts, count) }

// The kernel copies: the bytes are read from the file afterwards.
#define COPIER(call, at) \
  uint64_t inode = of(out, 0, 0); \
  if (!inode) return call; \
  lock(); \
  off_t offset = at; \
  ssize_t n = call; \
  if (n > 0) contents('W', out, inode, offset, n); \
  unlock(); \
  return n;
#include <sys/sendfile.h>
ssize_t sendfile(int out, int in, off_t *from, size_t size) {
  REAL(sendfile); COPIER(real(out, in, from, size), lseek(out, 0, SEEK_CUR)) }
ssize_t sendfile64(int out, int in, off64_t *from, size_t size) {
  REAL(sendfile64); COPIER(real(out, in, from, size), lseek(out, 0, SEEK_CUR)) }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
  REAL(copy_file_range);
  COPIER(real(in, from, out, to, size, flags), to ? *to : lseek(out, 0, SEEK_CUR)) }

static void resized(int fd, uint64_t inode) {
  struct stat s;
  if (!fstat(fd, &s)) record('T', inode, s.st_size, 0, 0, 0, 0);
}
#define RESIZER(call) \
  uint64_t inode = of(fd, 0, 0); \
  if (!inode) return call; \
  lock(); \
  int r = call; \
  if (!r) resized(fd, inode); \
  unlock(); \
  return r;
int ftruncate(int fd, off_t size) { REAL(ftruncate); RESIZER(real(fd, size)) }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); RESIZER(real(fd, size)) }
int fallocate(int fd, int mode, off_t at, off_t n) { REAL(fallocate); RESIZER(real(fd, mode, at, n)) }
int fallocate64(int fd, int mode, off64_t at, off64_t n) { REAL(fallocate64); RESIZER(real(fd, mode, at, n)) }
int posix_fallocate(int fd, off_t at, off_t n) { REAL(posix_fallocate); RESIZER(real(fd, at, n)) }
int posix_fallocate64(int fd, off64_t at, off64_t n) { REAL(posix_fallocate64); RESIZER(real(fd, at, n)) }
int truncate(const char *path, off_t size) {
  int fd = open_any(AT_FDCWD, path, O_WRONLY, 0);
  if (fd < 0) return -1;
  int r = ftruncate(fd, size), saved = errno;
  close(fd);
  errno = saved;
  return r;
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }

// The sync itself is left out: what counts is the folder that is made from the log.
static int synced(int fd, int (*real)(int)) {
  char path[PATH_MAX];
  uint64_t inode = of(fd, 0, 0);
  if (inode) {
    lock();
    contents('S', fd, inode, 0, -1);
    unlock();
    return 0;
  }
  if (of(fd, 1, path)) {
    lock();
    record('D', 0, 0, path, 0, 0, 0);
    unlock();
    return 0;
  }
  return real(fd);
}
int fsync(int fd) { REAL(fsync); return synced(fd, real); }
int fdatasync(int fd) { REAL(fdatasync); return synced(fd, real); }
static void all_synced(void) {
  if (!root[0]) return;
  lock();
  record('A', 0, 0, 0, 0, 0, 0);
  unlock();
}
void sync(void) { all_synced(); }
int syncfs(int fd) { (void)fd; all_synced(); return 0; }

// Calls that change names: one path, or the two of a rename or a link.
#define NAMES(op, is_two, folder_a, a, folder_b, b, call) \
  char first[PATH_MAX], second[PATH_MAX]; \
  int in_a = find(folder_a, a, first), in_b = find(folder_b, b, second); \
  if (!in_a && !in_b) return call; \
  lock(); \
  int r = call; \
  if (!r && in_a != in_b) record('X', 0, 0, "a rename or link across the border", 0, 0, 0); \
  else if (!r) record(op, 0, 0, first, is_two ? second : 0, 0, 0); \
  unlock(); \
  return r;
#define ONE_NAME(op, folder, a, call) NAMES(op, 0, folder, a, folder, a, call)
int rename(const char *a, const char *b) {
  REAL(rename); NAMES('R', 1, AT_FDCWD, a, AT_FDCWD, b, real(a, b)) }
int renameat(int f, const char *a, int g, const char *b) {
  REAL(renameat); NAMES('R', 1, f, a, g, b, real(f, a, g, b)) }
int renameat2(int f, const char *a, int g, const char *b, unsigned flags) {
  REAL(renameat2); NAMES(flags & RENAME_EXCHANGE ? 'X' : 'R', 1, f, a, g, b, real(f, a, g, b, flags)) }
int link(const char *a, const char *b) {
  REAL(link); NAMES('L', 1, AT_FDCWD, a, AT_FDCWD, b, real(a, b)) }
int linkat(int f, const char *a, int g, const char *b, int flags) {
  REAL(linkat); NAMES('L', 1, f, a, g, b, real(f, a, g, b, flags)) }
int unlink(const char *a) { REAL(unlink); ONE_NAME('U', AT_FDCWD, a, real(a)) }
int unlinkat(int f, const char *a, int flags) { REAL(unlinkat); ONE_NAME('U', f, a, real(f, a, flags)) }
int remove(const char *a) { REAL(remove); ONE_NAME('U', AT_FDCWD, a, real(a)) }
int rmdir(const char *a) { REAL(rmdir); ONE_NAME('U', AT_FDCWD, a, real(a)) }
int mkdir(const char *a, mode_t mode) { REAL(mkdir); ONE_NAME('M', AT_FDCWD, a, real(a, mode)) }
int mkdirat(int f, const char *a, mode_t mode) { REAL(mkdirat); ONE_NAME('M', f, a, real(f, a, mode)) }
int symlinkat(const char *target, int f, const char *a) {
  REAL(symlinkat);
  char path[PATH_MAX];
  if (!find(f, a, path)) return real(target, f, a);
  lock();
  int r = real(target, f, a);
  if (!r) record('Y', 0, 0, path, target, 0, 0);
  unlock();
  return r;
}
int symlink(const char *target, const char *a) { return symlinkat(target, AT_FDCWD, a); }

static void *mapped(void *at, size_t n, int access, int flags, int fd, off64_t offset,
                    void *(*real)(void *, size_t, int, int, int, off64_t)) {
  void *found = real(at, n, access, flags, fd, offset);
  if (root[0] && fd >= 0 && (flags & 3) == MAP_SHARED && (access & PROT_WRITE) && of(fd, 0, 0)) {
    lock();
    record('X', 0, 0, "a shared writable mapping", 0, 0, 0);
    unlock();
  }
  return found;
}
typedef void *(*mapper)(void *, size_t, int, int, int, off64_t);
void *mmap(void *at, size_t n, int access, int flags, int fd, off_t offset) {
  REAL(mmap); return mapped(at, n, access, flags, fd, offset, (mapper)real); }
void *mmap64(void *at, size_t n, int access, int flags, int fd, off64_t offset) {
  REAL(mmap64); return mapped(at, n, access, flags, fd, offset, (mapper)real); }
