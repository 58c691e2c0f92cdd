/* Stands between a process and the file system (LD_PRELOAD): counts what the process does to files under one
 * folder and, at the n-th such call, kills the process or says that the disk is full. It sees every thread,
 * also those of C++ libraries. Driven by interposer.py.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FAIL };            /* what to do at the n-th call */
enum { CHANGES, READS };                     /* which calls count */
enum { NAME, BYTES, REMOVE, SYNC, INPUT };   /* kinds of call: makes a name, writes bytes, takes away, syncs, reads */

static char under[PATH_MAX];
static size_t under_length;
static long at, until;
static int what, which, error_number, log_descriptor = -1;
static atomic_long calls;
static atomic_int armed;

/* Calls under `folder` count from 1. At call `n` (0: never) does `act`; FAIL goes on for `length` calls (0: for
 * ever). Every call is written to the descriptor `log` if that is not negative. */
void interposer_arm(const char *folder, long n, long length, int act, int number, int kind, int log) {
    strncpy(under, folder, sizeof under - 1);
    under_length = strlen(under);
    at = n, until = length ? n + length : LONG_MAX;
    what = act, error_number = number, which = kind, log_descriptor = log;
    atomic_store(&calls, 0);
    atomic_store(&armed, 1);
}

long interposer_calls(void) { return atomic_load(&calls); }

static int inside(const char *path) {
    return !strncmp(path, under, under_length) && (path[under_length] == 0 || path[under_length] == '/');
}

/* The absolute name of `path` as seen from the open folder `folder`. */
static void absolute(int folder, const char *path, char *result) {
    result[0] = 0;
    if (path[0] == '/') { strncpy(result, path, PATH_MAX - 1), result[PATH_MAX - 1] = 0; return; }
    char link[64], base[PATH_MAX];
    if (folder == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    long n = syscall(SYS_readlink, link, base, sizeof base - 1);
    if (n < 0) return;
    base[n] = 0;
    if (path[0]) snprintf(result, PATH_MAX, "%s/%s", base, path);
    else strcpy(result, base);
}

/* Counts a call. Returns an error number if it must fail, and sets *half if half of it must be done before the end. */
static int meet(const char *name, const char *path, int kind, int *half) {
    if (!atomic_load(&armed) || !inside(path) || (kind == INPUT) != (which == READS)) return 0;
    long n = atomic_fetch_add(&calls, 1) + 1;
    if (log_descriptor >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", n, name, path);
        syscall(SYS_write, log_descriptor, line, length);
    }
    if (!at || n < at || n >= until) return 0;
    if (what == TEAR && kind == BYTES && half) { *half = 1; return 0; }
    if (what == KILL || what == TEAR) { syscall(SYS_kill, getpid(), SIGKILL); pause(); }
    if (what != FAIL) return 0;
    int full = error_number == ENOSPC || error_number == EDQUOT;
    if (full && (kind == REMOVE || kind == SYNC)) return 0;
    if (error_number == EIO && (kind == NAME || kind == REMOVE)) return 0;
    return error_number;
}

static int meet_at(const char *name, int folder, const char *path, int kind) {
    char full[PATH_MAX];
    if (!atomic_load(&armed)) return 0;
    absolute(folder, path, full);
    return meet(name, full, kind, NULL);
}

static int meet_descriptor(const char *name, int descriptor, int kind, int *half) {
    char full[PATH_MAX];
    if (!atomic_load(&armed) || descriptor < 3) return 0;
    absolute(descriptor, "", full);
    return meet(name, full, kind, half);
}

#define REAL(type, name, ...)                                  \
    static type (*real)(__VA_ARGS__);                          \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define REFUSE(number)                       \
    do {                                     \
        int refused = number;                \
        if (refused) { errno = refused; return -1; } \
    } while (0)

static int opening(const char *name, int folder, const char *path, int flags) {
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT))) return meet_at(name, folder, path, INPUT);
    char full[PATH_MAX];
    struct stat about;
    if (!atomic_load(&armed)) return 0;
    absolute(folder, path, full);
    /* a full disk still opens the files that are there */
    return meet(name, full, stat(full, &about) ? NAME : SYNC, NULL);
}

#define OPEN(name)                                              \
    int name(const char *path, int flags, ...) {                \
        REAL(int, #name, const char *, int, ...);               \
        va_list more; va_start(more, flags);                    \
        mode_t mode = va_arg(more, mode_t); va_end(more);       \
        REFUSE(opening(#name, AT_FDCWD, path, flags));          \
        return real(path, flags, mode);                         \
    }
OPEN(open) OPEN(open64)

#define OPENAT(name)                                            \
    int name(int folder, const char *path, int flags, ...) {    \
        REAL(int, #name, int, const char *, int, ...);          \
        va_list more; va_start(more, flags);                    \
        mode_t mode = va_arg(more, mode_t); va_end(more);       \
        REFUSE(opening(#name, folder, path, flags));            \
        return real(folder, path, flags, mode);                 \
    }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name)                                             \
    FILE *name(const char *path, const char *mode) {            \
        REAL(FILE *, #name, const char *, const char *);        \
        int flags = strpbrk(mode, "wa+") ? O_RDWR | O_CREAT : O_RDONLY; \
        int refused = opening(#name, AT_FDCWD, path, flags);    \
        if (refused) { errno = refused; return NULL; }          \
        return real(path, mode);                                \
    }
FOPEN(fopen) FOPEN(fopen64)

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    REFUSE(meet_at("mkdir", AT_FDCWD, path, NAME));
    return real(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    REFUSE(meet_at("mkdirat", folder, path, NAME));
    return real(folder, path, mode);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    REFUSE(meet_at("rename", AT_FDCWD, to, REMOVE));
    return real(from, to);
}
int renameat(int one, const char *from, int other, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    REFUSE(meet_at("renameat", other, to, REMOVE));
    return real(one, from, other, to);
}
int renameat2(int one, const char *from, int other, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    REFUSE(meet_at("renameat2", other, to, REMOVE));
    return real(one, from, other, to, flags);
}
int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    REFUSE(meet_at("link", AT_FDCWD, to, NAME));
    return real(from, to);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    REFUSE(meet_at("unlink", AT_FDCWD, path, REMOVE));
    return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    REFUSE(meet_at("unlinkat", folder, path, REMOVE));
    return real(folder, path, flags);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    REFUSE(meet_at("rmdir", AT_FDCWD, path, REMOVE));
    return real(path);
}

/* Done to the half and killed: a file cut off in the middle, as a power cut leaves it. */
#define TORN(descriptor, call)                                  \
    do {                                                        \
        if (half) { (void)!(call); syscall(SYS_kill, getpid(), SIGKILL); pause(); } \
    } while (0)

ssize_t write(int descriptor, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int half = 0;
    REFUSE(meet_descriptor("write", descriptor, BYTES, &half));
    TORN(descriptor, real(descriptor, data, size / 2));
    return real(descriptor, data, size);
}
#define PWRITE(name, offset_type)                                                \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type where) { \
        REAL(ssize_t, #name, int, const void *, size_t, offset_type);            \
        int half = 0;                                                            \
        REFUSE(meet_descriptor(#name, descriptor, BYTES, &half));                \
        TORN(descriptor, real(descriptor, data, size / 2, where));               \
        return real(descriptor, data, size, where);                              \
    }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int half = 0;
    REFUSE(meet_descriptor("writev", descriptor, BYTES, &half));
    TORN(descriptor, real(descriptor, parts, count / 2));
    return real(descriptor, parts, count);
}
#define TRUNCATE(name, offset_type)                                              \
    int name(int descriptor, offset_type size) {                                 \
        REAL(int, #name, int, offset_type);                                      \
        REFUSE(meet_descriptor(#name, descriptor, SYNC, NULL));                  \
        return real(descriptor, size);                                           \
    }
TRUNCATE(ftruncate, off_t) TRUNCATE(ftruncate64, off64_t)
int fsync(int descriptor) {
    REAL(int, "fsync", int);
    REFUSE(meet_descriptor("fsync", descriptor, SYNC, NULL));
    return real(descriptor);
}
int fdatasync(int descriptor) {
    REAL(int, "fdatasync", int);
    REFUSE(meet_descriptor("fdatasync", descriptor, SYNC, NULL));
    return real(descriptor);
}

ssize_t read(int descriptor, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    REFUSE(meet_descriptor("read", descriptor, INPUT, NULL));
    return real(descriptor, data, size);
}
#define PREAD(name, offset_type)                                                 \
    ssize_t name(int descriptor, void *data, size_t size, offset_type where) {   \
        REAL(ssize_t, #name, int, void *, size_t, offset_type);                  \
        REFUSE(meet_descriptor(#name, descriptor, INPUT, NULL));                 \
        return real(descriptor, data, size, where);                              \
    }
PREAD(pread, off_t) PREAD(pread64, off64_t)
