/* What a process meets on its disk and its clock, for LD_PRELOAD: calls on files below CHAOS_PREFIX are counted, and from
 * one of them on fail, are slow, write less than asked, or kill the process. faults.py says what the variables mean. */
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
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, WRITE = 2, SYNC = 4, RENAME = 8, REMOVE = 16 };

static struct { atomic_long calls, matching, clock; } own, *shared = &own;
static char prefix[PATH_MAX];
static size_t prefix_length;
static int kinds, failure, deadly, partial_writes;
static long after, times, slow, clock_after, clock_offset;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

/* Reads the variables. Called when the library is loaded, and by a forked process that has set others. */
__attribute__((constructor, visibility("default"))) void faults_begin(void) {
    const char *text = getenv("CHAOS_PREFIX");
    snprintf(prefix, sizeof prefix, "%s", text ? text : "");
    prefix_length = strlen(prefix);
    kinds = number("CHAOS_KINDS", 0);
    failure = number("CHAOS_ERRNO", 0);
    deadly = number("CHAOS_KILL", 0);
    partial_writes = number("CHAOS_SHORT", 0);
    after = number("CHAOS_AFTER", 0);
    times = number("CHAOS_TIMES", -1);
    slow = number("CHAOS_SLOW", 0);
    clock_after = number("CHAOS_CLOCK_AFTER", -1);
    clock_offset = number("CHAOS_CLOCK_OFFSET", 0);
    if ((text = getenv("CHAOS_COUNTS")) && *text) {
        int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
        int file = real_open(text, O_RDWR);
        void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (page != MAP_FAILED) shared = page;
        if (file >= 0) close(file);
    }
}

/* The errno with which a call fails; 0 when it goes through. */
static int met(int kind, const char *path) {
    if (!prefix_length || strncmp(path, prefix, prefix_length)) return 0;
    atomic_fetch_add(&shared->calls, 1);
    if (kind == WRITE && slow) usleep(slow);
    if (!(kind & kinds)) return 0;
    long mine = atomic_fetch_add(&shared->matching, 1);
    if (mine < after || (times >= 0 && mine >= after + times)) return 0;
    if (deadly) {
        kill(getpid(), SIGKILL);
        pause();
    }
    return failure;
}

static const char *whole(int folder, const char *path, char *buffer) {
    if (!path || *path == '/') return path ? path : "";
    char link[64], place[PATH_MAX];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, place, sizeof place - 1);
    place[size < 0 ? 0 : size] = 0;
    snprintf(buffer, 2 * PATH_MAX, "%s/%s", place, path);
    return buffer;
}

static int met_at(int kind, int folder, const char *path) {
    char buffer[2 * PATH_MAX];
    return prefix_length ? met(kind, whole(folder, path, buffer)) : 0;
}

static int met_open(int kind, int file) {
    if (!prefix_length) return 0;
    char link[64], place[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t size = readlink(link, place, sizeof place - 1);
    errno = before;
    if (size < 0) return 0;
    place[size] = 0;
    return met(kind, place);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name);
#define FAIL(condition) \
    do { \
        int code = (condition); \
        if (code) { \
            errno = code; \
            return -1; \
        } \
    } while (0)
#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name) MODE(flags) \
        if (CHANGES(flags)) FAIL(met_at(CREATE, AT_FDCWD, path)); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name) MODE(flags) \
        if (CHANGES(flags)) FAIL(met_at(CREATE, folder, path)); \
        return real(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
int mkdir(const char *path, mode_t mode) { REAL(mkdir) FAIL(met_at(CREATE, AT_FDCWD, path)); return real(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat)
    FAIL(met_at(CREATE, folder, path));
    return real(folder, path, mode);
}

static size_t less(size_t count) { return partial_writes && prefix_length && count > 1 ? (count + 1) / 2 : count; }
static int ours(int file) {  /* whether a partial write concerns this file */
    char link[64], place[PATH_MAX];
    if (!partial_writes) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, place, sizeof place - 1);
    if (size < 0) return 0;
    place[size] = 0;
    return !strncmp(place, prefix, prefix_length);
}

ssize_t write(int file, const void *data, size_t count) {
    REAL(write)
    FAIL(met_open(WRITE, file));
    return real(file, data, ours(file) ? less(count) : count);
}
#define PWRITE(name, offset_type) \
    ssize_t name(int file, const void *data, size_t count, offset_type offset) { \
        REAL(name) \
        FAIL(met_open(WRITE, file)); \
        return real(file, data, ours(file) ? less(count) : count, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev)
    FAIL(met_open(WRITE, file));
    return real(file, parts, ours(file) && count > 1 ? 1 : count);
}
#define PWRITEV(name, offset_type) \
    ssize_t name(int file, const struct iovec *parts, int count, offset_type offset) { \
        REAL(name) \
        FAIL(met_open(WRITE, file)); \
        return real(file, parts, ours(file) && count > 1 ? 1 : count, offset); \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)
#define SENDFILE(name, offset_type) \
    ssize_t name(int to, int from, offset_type *offset, size_t count) { \
        REAL(name) \
        FAIL(met_open(WRITE, to)); \
        return real(to, from, offset, ours(to) ? less(count) : count); \
    }
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *place, size_t count, unsigned flags) {
    REAL(copy_file_range)
    FAIL(met_open(WRITE, to));
    return real(from, start, to, place, ours(to) ? less(count) : count, flags);
}
int ftruncate(int file, off_t size) { REAL(ftruncate) FAIL(met_open(WRITE, file)); return real(file, size); }
int ftruncate64(int file, off64_t size) { REAL(ftruncate64) FAIL(met_open(WRITE, file)); return real(file, size); }
int truncate(const char *path, off_t size) {
    REAL(truncate)
    FAIL(met_at(WRITE, AT_FDCWD, path));
    return real(path, size);
}
int truncate64(const char *path, off64_t size) {
    REAL(truncate64)
    FAIL(met_at(WRITE, AT_FDCWD, path));
    return real(path, size);
}
int fsync(int file) { REAL(fsync) FAIL(met_open(SYNC, file)); return real(file); }
int fdatasync(int file) { REAL(fdatasync) FAIL(met_open(SYNC, file)); return real(file); }

int rename(const char *old, const char *new) {
    REAL(rename)
    FAIL(met_at(RENAME, AT_FDCWD, new));
    return real(old, new);
}
int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    REAL(renameat)
    FAIL(met_at(RENAME, new_folder, new));
    return real(old_folder, old, new_folder, new);
}
int renameat2(int old_folder, const char *old, int new_folder, const char *new, unsigned flags) {
    REAL(renameat2)
    FAIL(met_at(RENAME, new_folder, new));
    return real(old_folder, old, new_folder, new, flags);
}
int unlink(const char *path) { REAL(unlink) FAIL(met_at(REMOVE, AT_FDCWD, path)); return real(path); }
int rmdir(const char *path) { REAL(rmdir) FAIL(met_at(REMOVE, AT_FDCWD, path)); return real(path); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat)
    FAIL(met_at(REMOVE, folder, path));
    return real(folder, path, flags);
}

/* The clock of the wall, not the monotonic one, jumps there and back with every `clock_after` looks at it. */
static long jump(void) {
    if (clock_after < 0) return 0;
    long look = atomic_fetch_add(&shared->clock, 1);
    return (look / (clock_after + 1)) % 2 ? clock_offset : 0;
}
int clock_gettime(clockid_t which, struct timespec *now) {
    REAL(clock_gettime)
    int status = real(which, now);
    if (!status && which == CLOCK_REALTIME) now->tv_sec += jump();
    return status;
}
int gettimeofday(struct timeval *now, void *zone) {
    REAL(gettimeofday)
    int status = real(now, zone);
    if (!status) now->tv_sec += jump();
    return status;
}
time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
