/* A disk that fails where and when it is told to: preloaded (LD_PRELOAD), it stands before the calls of the C library.

   bad_disk(rules, log): a rule a line, of fields between tabs:
       calls     names, each before a "|": open create read pread write pwrite fsync truncate allocate rename close
                 mkdir link unlink map written
       path      a glob of whole paths (fnmatch); of a rename and a link either name
       nth       the first call that it is for, from 1; counted in each process
       count     for how many calls from there on; 0: all
       errno     what they fail with; 0: they do not fail
       short     at least 0: read or write at most so many bytes
       delay     milliseconds that they take longer
   log: a descriptor; each call with a path that some rule matches is written to it, "CALL<tab>PATH". -1: none.

   A file's buffered calls (fread, fwrite) are those that they stand for. A mapping whose rule fails with EIO is made,
   and each of its pages ends the process by SIGBUS, as one that a disk cannot read; system calls on it return EFAULT. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 16 };
struct rule {
    char calls[128], path[PATH_MAX];
    long nth, count, error, most, delay;
    long seen;
};
static struct rule rules[MOST];
static int number_of_rules = 0, log_file = -1;

void bad_disk(const char *text, int log) {
    number_of_rules = 0;
    log_file = log;
    int made = 0;
    while (*text && made < MOST) {
        struct rule *r = &rules[made];
        memset(r, 0, sizeof *r);
        if (sscanf(text, "%127[^\t]\t%4095[^\t]\t%ld\t%ld\t%ld\t%ld\t%ld", r->calls, r->path, &r->nth, &r->count,
                   &r->error, &r->most, &r->delay) == 7)
            made++;
        text += strcspn(text, "\n");
        text += *text == '\n';
    }
    number_of_rules = made;
}

static int named(const struct rule *r, const char *call) {
    const char *at = r->calls;
    size_t length = strlen(call);
    while (*at) {
        size_t here = strcspn(at, "|");
        if (here == length && memcmp(at, call, length) == 0) return 1;
        at += here + (at[here] == '|');
    }
    return 0;
}

static const char *whole(const char *path, char *room) {
    if (path[0] == '/') return path;
    if (!getcwd(room, PATH_MAX)) return path;
    size_t length = strlen(room);
    snprintf(room + length, PATH_MAX - length, "/%s", path);
    return room;
}

/* The rule that this call is to obey, after its delay; NULL for none. */
static const struct rule *found(const char *call, const char *path, const char *other) {
    const struct rule *chosen = NULL;
    int noted = 0;
    for (int i = 0; i < number_of_rules; i++) {
        struct rule *r = &rules[i];
        if (fnmatch(r->path, path, 0) && (!other || fnmatch(r->path, other, 0))) continue;
        if (log_file >= 0 && !noted) {
            char line[PATH_MAX + 32];
            int length = snprintf(line, sizeof line, "%s\t%s\n", call, other ? other : path);
            syscall(SYS_write, log_file, line, length);
            noted = 1;
        }
        if (!named(r, call)) continue;
        long place = __atomic_add_fetch(&r->seen, 1, __ATOMIC_SEQ_CST);
        if (place >= r->nth && (!r->count || place < r->nth + r->count) && !chosen) chosen = r;
    }
    if (chosen && chosen->delay) {
        struct timespec time = {chosen->delay / 1000, chosen->delay % 1000 * 1000000L};
        nanosleep(&time, NULL);
    }
    return chosen;
}

static const struct rule *of_path(const char *call, const char *path) {
    char room[PATH_MAX];
    return number_of_rules ? found(call, whole(path, room), NULL) : NULL;
}

static const struct rule *of_two(const char *call, const char *path, const char *other) {
    char room[PATH_MAX], more[PATH_MAX];
    return number_of_rules ? found(call, whole(path, room), whole(other, more)) : NULL;
}

static const struct rule *of_file(const char *call, int file) {
    char link[64], path[PATH_MAX];
    if (!number_of_rules || file == log_file) return NULL;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length <= 0 || path[0] != '/') return NULL;
    path[length] = 0;
    return found(call, path, NULL);
}

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(rule, result) \
    if ((rule) && (rule)->error) { errno = (int)(rule)->error; return result; }
#define LEAST(rule, count) ((rule) && (rule)->most >= 0 && (size_t)(rule)->most < (count) ? (size_t)(rule)->most : (count))

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
        const struct rule *r = of_path(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", path); \
        FAIL(r, -1) \
        NEXT(name); \
        return next(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
        const struct rule *r = folder == AT_FDCWD || path[0] == '/' \
            ? of_path(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", path) : NULL; \
        FAIL(r, -1) \
        NEXT(name); \
        return next(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        const struct rule *r = of_path(strpbrk(mode, "wa+") ? "create" : "open", path); \
        FAIL(r, NULL) \
        NEXT(name); \
        return next(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t read(int file, void *data, size_t count) {
    const struct rule *r = of_file("read", file);
    FAIL(r, -1)
    NEXT(read);
    return next(file, data, LEAST(r, count));
}
ssize_t write(int file, const void *data, size_t count) {
    const struct rule *r = of_file("write", file);
    FAIL(r, -1)
    NEXT(write);
    return next(file, data, LEAST(r, count));
}
#define AT(name, kind, type) \
    ssize_t name(int file, type data, size_t count, off_t place) { \
        const struct rule *r = of_file(kind, file); \
        FAIL(r, -1) \
        NEXT(name); \
        return next(file, data, LEAST(r, count), place); \
    }
AT(pread, "pread", void *)
AT(pread64, "pread", void *)
AT(pwrite, "pwrite", const void *)
AT(pwrite64, "pwrite", const void *)
#define PARTS(name, kind) \
    ssize_t name(int file, const struct iovec *parts, int count) { \
        const struct rule *r = of_file(kind, file); \
        FAIL(r, -1) \
        NEXT(name); \
        if (r && r->most >= 0 && count) { \
            struct iovec first = {parts[0].iov_base, LEAST(r, parts[0].iov_len)}; \
            return next(file, &first, 1); \
        } \
        return next(file, parts, count); \
    }
PARTS(readv, "read")
PARTS(writev, "write")

size_t fread(void *data, size_t size, size_t count, FILE *file) {
    const struct rule *r = of_file("read", fileno(file));
    FAIL(r, 0)
    NEXT(fread);
    return next(data, size, count, file);
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    const struct rule *r = of_file("write", fileno(file));
    FAIL(r, 0)
    NEXT(fwrite);
    return next(data, size, count, file);
}

#define OF_FILE(name, kind) \
    int name(int file) { \
        const struct rule *r = of_file(kind, file); \
        FAIL(r, -1) \
        NEXT(name); \
        return next(file); \
    }
OF_FILE(fsync, "fsync")
OF_FILE(fdatasync, "fsync")
OF_FILE(syncfs, "fsync")
int close(int file) {
    const struct rule *r = of_file("close", file);
    NEXT(close);
    int result = next(file);
    FAIL(r, -1)
    return result;
}
int sync_file_range(int file, off64_t place, off64_t count, unsigned flags) {
    const struct rule *r = of_file("written", file);
    FAIL(r, -1)
    NEXT(sync_file_range);
    return next(file, place, count, flags);
}
#define TRUNCATE(name, type) \
    int name(int file, type size) { \
        const struct rule *r = of_file("truncate", file); \
        FAIL(r, -1) \
        NEXT(name); \
        return next(file, size); \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)
#define ALLOCATE(name, type) \
    int name(int file, type place, type count) { \
        const struct rule *r = of_file("allocate", file); \
        if (r && r->error) return (int)r->error; \
        NEXT(name); \
        return next(file, place, count); \
    }
ALLOCATE(posix_fallocate, off_t)
ALLOCATE(posix_fallocate64, off64_t)

int rename(const char *path, const char *other) {
    const struct rule *r = of_two("rename", path, other);
    FAIL(r, -1)
    NEXT(rename);
    return next(path, other);
}
int link(const char *path, const char *other) {
    const struct rule *r = of_two("link", path, other);
    FAIL(r, -1)
    NEXT(link);
    return next(path, other);
}
int unlink(const char *path) {
    const struct rule *r = of_path("unlink", path);
    FAIL(r, -1)
    NEXT(unlink);
    return next(path);
}
int mkdir(const char *path, mode_t mode) {
    const struct rule *r = of_path("mkdir", path);
    FAIL(r, -1)
    NEXT(mkdir);
    return next(path, mode);
}

/* A file of no bytes in the place of pages: they cannot be read. */
int spoil(void *address, size_t size, int protection) {
    int empty = memfd_create("bad pages", MFD_CLOEXEC);
    if (empty < 0) return -1;
    void *pages = (void *)syscall(SYS_mmap, address, size, protection, MAP_SHARED | MAP_FIXED, empty, 0L);
    syscall(SYS_close, empty);
    return pages == MAP_FAILED ? -1 : 0;
}

#define MAP(name, type) \
    void *name(void *address, size_t size, int protection, int flags, int file, type place) { \
        const struct rule *r = file >= 0 ? of_file("map", file) : NULL; \
        if (r && r->error && r->error != EIO) { errno = (int)r->error; return MAP_FAILED; } \
        NEXT(name); \
        void *made = next(address, size, protection, flags, file, place); \
        if (r && r->error && made != MAP_FAILED) spoil(made, size, protection); \
        return made; \
    }
MAP(mmap, off_t)
MAP(mmap64, off64_t)
