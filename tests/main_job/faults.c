/*
 * Preloaded into the daemon: makes one call fail, at the moment that a test chooses.
 *
 * FAULT_CALL   write, sync, rename, create, chmod, unlink, directory-sync-after-rename,
 *              directory-sync-after-create, connect or send
 * FAULT_PATH   a glob (fnmatch(3), FNM_EXTMATCH) for the file: the old name of a rename; for the sync of a directory, the file
 *              whose name the same thread changed there just before. Not for sockets.
 * FAULT_AFTER  optional: a glob; the call counts only once a file of such a name was created while armed
 * FAULT_MODE   failed: nothing of it happened; persisted: all of it happened, and an error is reported; half: half
 *              of the bytes were written, and the next such call fails; hung: only for the sync of a file, which
 *              waits until FAULT_ARM is created a second time and then happens; power-loss: only for the write and the
 *              sync of a file: all files that fit FAULT_PATH are as a power loss leaves them, and the process is killed
 * FAULT_ERRNO  the error by its name, see `errors`
 * FAULT_ARM    a file. Nothing is done before it exists. The thread that removes it takes the fault, so there is one for
 *              each time that the file is created. For sockets it holds the port, of either end.
 *
 * A sync that failed takes back everything that was written since the last one that succeeded, as a kernel does
 * that drops the pages which it could not write. A sync of a directory that failed leaves FAULT_ARM with `.names`
 * appended: which name a power loss would take back, in three lines: `create` or `rename`, the old name, the new one
 * of a rename. A later sync of the directory removes that file.
 *
 * A power loss takes back everything that was written since the last sync, and every file whose directory was not
 * synced since it was created: nothing that was promised may depend on either.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static const struct {
    const char *name;
    int number;
} errors[] = {{"EIO", EIO},     {"ENOSPC", ENOSPC},         {"ECONNREFUSED", ECONNREFUSED},
              {"EPIPE", EPIPE}, {"ECONNRESET", ECONNRESET}, {"ETIMEDOUT", ETIMEDOUT}};

static const char *call, *path_glob, *after_glob, *mode, *arm;
static int error;
static char names[PATH_MAX];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
/* The second half of a write is still to fail. */
static volatile int owed;
/* A file of FAULT_AFTER was made. */
static volatile int primed;

/* What a thread did last to the names of a directory. */
static __thread char last_change[16], last_old[PATH_MAX], last_new[PATH_MAX];
/* The directory whose sync failed. */
static char unsynced[PATH_MAX];

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL) {
        abort();
    }
    return found;
}

__attribute__((constructor)) static void read_environment(void) {
    call = getenv("FAULT_CALL");
    path_glob = getenv("FAULT_PATH");
    after_glob = getenv("FAULT_AFTER");
    mode = getenv("FAULT_MODE");
    arm = getenv("FAULT_ARM");
    const char *name = getenv("FAULT_ERRNO");
    for (size_t known = 0; name != NULL && known < sizeof errors / sizeof *errors; known++) {
        error = strcmp(name, errors[known].name) == 0 ? errors[known].number : error;
    }
    if (call == NULL || path_glob == NULL || mode == NULL || arm == NULL || error == 0) {
        fputs("the fault is not described in the environment\n", stderr);
        abort();
    }
    snprintf(names, sizeof names, "%s.names", arm);
}

static int is_call(const char *name) { return strcmp(call, name) == 0; }

static int is_mode(const char *name) { return strcmp(mode, name) == 0; }

static int fits(const char *path) { return fnmatch(path_glob, path, FNM_EXTMATCH) == 0; }

static int is_armed(void) { return syscall(SYS_access, arm, F_OK) == 0; }

/* Of several threads one removes the file. */
static int strike(void) {
    int before = errno;
    int struck = (after_glob == NULL || primed) && syscall(SYS_unlink, arm) == 0;
    errno = before;
    return struck;
}

static int fail(void) {
    errno = error;
    return -1;
}

/* The path that a descriptor was opened at, or where it was moved to since; empty for a socket. */
static const char *path_of(int fd, char path[PATH_MAX]) {
    char link[64];
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    errno = before;
    path[length > 0 && path[0] == '/' ? length : 0] = '\0';
    return path;
}

/* --- What was written and not yet synced --- */

struct undo {
    struct undo *older;
    dev_t device;
    ino_t inode;
    off_t size, at;
    size_t length;
    char bytes[];
};

static struct undo *undo;

/* Keeps what is about to be overwritten or cut off. */
static void remember(int fd, off_t at, size_t length) {
    struct stat status;
    int is_taken_back = is_mode("power-loss") || (is_call("sync") && is_mode("failed"));
    if (!is_taken_back || fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) {
        return;
    }
    size_t there = at < status.st_size ? (size_t)(status.st_size - at) : 0;
    length = length < there ? length : there;
    struct undo *step = malloc(sizeof *step + length);
    if (step == NULL || (length > 0 && pread(fd, step->bytes, length, at) != (ssize_t)length)) {
        abort();
    }
    *step = (struct undo){undo, status.st_dev, status.st_ino, status.st_size, at, length};
    undo = step;
}

/* Forgets a file's steps, the newest first, taking each back where that is asked for. */
static void settle(int fd, int take_back) {
    struct stat status;
    if (fstat(fd, &status) != 0) {
        return;
    }
    for (struct undo **next = &undo; *next != NULL;) {
        struct undo *step = *next;
        if (step->device != status.st_dev || step->inode != status.st_ino) {
            next = &step->older;
            continue;
        }
        if (take_back && ((step->length > 0 && syscall(SYS_pwrite64, fd, step->bytes, step->length, step->at) < 0) ||
                          syscall(SYS_ftruncate, fd, step->size) != 0)) {
            abort();
        }
        *next = step->older;
        free(step);
    }
}

/* --- Power losses --- */

/* A file whose directory was not synced since it was created. */
struct created {
    struct created *older;
    char path[];
};

static struct created *created;

static void remember_name(const char *path) {
    size_t size = strlen(path) + 1;
    struct created *name = malloc(sizeof *name + size);
    if (name == NULL) {
        abort();
    }
    name->older = created;
    memcpy(name->path, path, size);
    created = name;
}

/* Forgets the names of a directory that was synced. */
static void settle_names(const char *directory) {
    size_t length = strlen(directory);
    for (struct created **next = &created; *next != NULL;) {
        struct created *name = *next;
        if (strncmp(name->path, directory, length) == 0 && strchr(name->path + length + 1, '/') == NULL) {
            *next = name->older;
            free(name);
        } else {
            next = &name->older;
        }
    }
}

static void lose_power(void) {
    const int descriptors = 1024;
    for (int fd = 0; fd < descriptors; fd++) {
        int flags = fcntl(fd, F_GETFL);
        if (flags >= 0 && (flags & O_ACCMODE) != O_RDONLY) {
            settle(fd, 1);
        }
    }
    for (struct created *name = created; name != NULL; name = name->older) {
        syscall(SYS_unlink, name->path);
    }
    kill(getpid(), SIGKILL);
}

/* --- Files --- */

/* How many of `length` bytes are really written; what is to be returned if it is not that. */
static size_t share(int fits_call, size_t length, int *outcome) {
    *outcome = 0;
    if (!fits_call) {
        return length;
    }
    if (owed) {
        owed = 0;
        *outcome = fail();
        return 0;
    }
    if (!strike()) {
        return length;
    }
    if (is_mode("power-loss")) {
        lose_power();
    }
    if (is_mode("half") && length > 1) {
        owed = 1;
        return length / 2;
    }
    *outcome = -1;
    return is_mode("persisted") ? length : 0;
}

#define WRITE(WHERE, ...)                                                                                    \
    char path[PATH_MAX];                                                                                     \
    int fitting = path_glob[0] != '\0' && fits(path_of(fd, path));                                           \
    if (!fitting) {                                                                                          \
        return next(fd, bytes, length, ##__VA_ARGS__);                                                       \
    }                                                                                                        \
    pthread_mutex_lock(&lock);                                                                               \
    remember(fd, WHERE, length);                                                                             \
    int outcome;                                                                                             \
    length = share(is_call("write"), length, &outcome);                                                      \
    ssize_t written = length > 0 || outcome == 0 ? next(fd, bytes, length, ##__VA_ARGS__) : 0;               \
    if (written >= 0 && outcome != 0) {                                                                      \
        written = fail();                                                                                    \
    }                                                                                                        \
    pthread_mutex_unlock(&lock);                                                                             \
    return written;

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at) {
    __typeof__(&pwrite64) next = REAL(pwrite64);
    WRITE(at, at)
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return pwrite64(fd, bytes, length, at); }

static ssize_t write_to_file(int fd, const void *bytes, size_t length) {
    __typeof__(&write) next = REAL(write);
    WRITE(lseek(fd, 0, SEEK_CUR))
}

int ftruncate64(int fd, off64_t size) {
    char path[PATH_MAX];
    int fitting = fits(path_of(fd, path));
    pthread_mutex_lock(&lock);
    if (fitting) {
        remember(fd, size, SIZE_MAX);
    }
    int result = REAL(ftruncate64)(fd, size);
    pthread_mutex_unlock(&lock);
    return result;
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

static int sync_directory(int fd, int (*next)(int), const char *directory) {
    char wanted[64];
    snprintf(wanted, sizeof wanted, "directory-sync-after-%s", last_change);
    size_t length = strlen(directory);
    int is_ours = strncmp(last_old, directory, length) == 0 && last_old[length] == '/';
    if (last_change[0] != '\0' && is_ours && is_call(wanted) && fits(last_old) && strike()) {
        if (is_mode("persisted")) {
            next(fd);
        } else {
            char whole[PATH_MAX + 16];
            snprintf(unsynced, sizeof unsynced, "%s", directory);
            snprintf(whole, sizeof whole, "%s.unfinished", names);
            /* By another name first, since the test may kill this process now. */
            int out = syscall(SYS_open, whole, O_WRONLY | O_CREAT | O_TRUNC, 0600);
            dprintf(out, "%s\n%s\n%s\n", last_change, last_old, last_new);
            close(out);
            syscall(SYS_rename, whole, names);
        }
        return fail();
    }
    int result = next(fd);
    if (result == 0) {
        pthread_mutex_lock(&lock);
        settle_names(directory);
        pthread_mutex_unlock(&lock);
        last_change[0] = '\0';
        if (strcmp(unsynced, directory) == 0) {
            unsynced[0] = '\0';
            syscall(SYS_unlink, names);
        }
    }
    return result;
}

static int sync_file(int fd, int (*next)(int)) {
    char path[PATH_MAX];
    struct stat status;
    path_of(fd, path);
    if (path[0] != '\0' && fstat(fd, &status) == 0 && S_ISDIR(status.st_mode)) {
        return sync_directory(fd, next, path);
    }
    if (path[0] == '\0' || !fits(path)) {
        return next(fd);
    }
    pthread_mutex_lock(&lock);
    int struck = is_call("sync") && strike();
    if (struck && is_mode("power-loss")) {
        lose_power();
    }
    if (struck && is_mode("hung")) {
        do {
            /* Only this thread hangs. */
            pthread_mutex_unlock(&lock);
            usleep(1000);
            pthread_mutex_lock(&lock);
        } while (!strike());
        struck = 0;
    }
    int result = struck && is_mode("failed") ? -1 : next(fd);
    settle(fd, result != 0);
    if (struck) {
        result = fail();
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int fsync(int fd) { return sync_file(fd, REAL(fsync)); }

int fdatasync(int fd) { return sync_file(fd, REAL(fdatasync)); }

static void change(const char *what, const char *old, const char *new) {
    snprintf(last_change, sizeof last_change, "%s", what);
    snprintf(last_old, sizeof last_old, "%s", old);
    snprintf(last_new, sizeof last_new, "%s", new);
}

int rename(const char *old, const char *new) {
    int struck = is_call("rename") && fits(old) && strike();
    if (struck && is_mode("failed")) {
        return fail();
    }
    int result = REAL(rename)(old, new);
    if (result == 0) {
        change("rename", old, new);
    }
    return struck ? fail() : result;
}

int fchmod(int fd, mode_t bits) {
    char path[PATH_MAX];
    int struck = is_call("chmod") && fits(path_of(fd, path)) && strike();
    if (struck && is_mode("failed")) {
        return fail();
    }
    int result = REAL(fchmod)(fd, bits);
    return struck ? fail() : result;
}

int unlink(const char *path) {
    int struck = is_call("unlink") && fits(path) && strike();
    if (struck && is_mode("failed")) {
        return fail();
    }
    int result = REAL(unlink)(path);
    return struck ? fail() : result;
}

static int open_file(int (*next)(const char *, int, ...), const char *path, int flags, mode_t bits) {
    if (!(flags & O_CREAT) || syscall(SYS_access, path, F_OK) == 0) {
        return next(path, flags, bits);
    }
    int struck = is_call("create") && fits(path) && strike();
    if (struck && is_mode("failed")) {
        return fail();
    }
    int fd = next(path, flags, bits);
    if (fd >= 0) {
        change("create", path, "");
        if (is_mode("power-loss") && fits(path)) {
            pthread_mutex_lock(&lock);
            remember_name(path);
            pthread_mutex_unlock(&lock);
        }
        if (after_glob != NULL && fnmatch(after_glob, path, 0) == 0 && is_armed()) {
            primed = 1;
        }
        if (struck) {
            close(fd);
            return fail();
        }
    }
    return fd;
}

#define OPEN(NAME)                                                                                           \
    int NAME(const char *path, int flags, ...) {                                                             \
        mode_t bits = 0;                                                                                     \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                                               \
            va_list rest;                                                                                    \
            va_start(rest, flags);                                                                           \
            bits = va_arg(rest, mode_t);                                                                     \
            va_end(rest);                                                                                    \
        }                                                                                                    \
        return open_file(REAL(NAME), path, flags, bits);                                                     \
    }

OPEN(open)
OPEN(open64)

/* --- Sockets --- */

static int port(const struct sockaddr_storage *address) {
    switch (address->ss_family) {
    case AF_INET:
        return ntohs(((const struct sockaddr_in *)address)->sin_port);
    case AF_INET6:
        return ntohs(((const struct sockaddr_in6 *)address)->sin6_port);
    default:
        return 0;
    }
}

/* Whether the arm file names one of the ports. */
static int is_port(int one, int other) {
    char text[16] = "";
    int in = syscall(SYS_open, arm, O_RDONLY | O_CLOEXEC);
    if (in < 0) {
        return 0;
    }
    ssize_t length = read(in, text, sizeof text - 1);
    close(in);
    int wanted = length > 0 ? atoi(text) : 0;
    return wanted != 0 && (wanted == one || wanted == other);
}

static int is_connection(int fd) {
    struct sockaddr_storage here = {0}, there = {0};
    socklen_t length = sizeof here, other_length = sizeof there;
    int before = errno;
    int fitting = getsockname(fd, (struct sockaddr *)&here, &length) == 0 &&
                  getpeername(fd, (struct sockaddr *)&there, &other_length) == 0 && is_port(port(&here), port(&there));
    errno = before;
    return fitting;
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    struct sockaddr_storage there = {0};
    memcpy(&there, address, length < sizeof there ? length : sizeof there);
    int struck = is_call("connect") && is_port(port(&there), 0) && strike();
    if (struck && is_mode("failed")) {
        return fail();
    }
    int result = REAL(connect)(fd, address, length);
    if (struck) {
        struct pollfd done = {fd, POLLOUT, 0};
        poll(&done, 1, 1000);
        return fail();
    }
    return result;
}

/* The connection of which the second half is still to fail. */
static int owing = -1;

/* Half of the bytes: sent as they are, then the connection fails once more. */
static ssize_t send_pieces(int fd, const struct msghdr *message, int flags, ssize_t (*next)(int, const struct msghdr *, int)) {
    int is_next = owed && owing == fd;
    if (is_next) {
        owed = 0;
        return fail();
    }
    if (!is_call("send") || !is_connection(fd) || !strike()) {
        return next(fd, message, flags);
    }
    if (is_mode("failed")) {
        return fail();
    }
    if (is_mode("persisted")) {
        next(fd, message, flags);
        return fail();
    }
    size_t length = 0, half = 0;
    for (size_t piece = 0; piece < message->msg_iovlen; piece++) {
        length += message->msg_iov[piece].iov_len;
    }
    char *bytes = malloc(length);
    if (bytes == NULL) {
        abort();
    }
    for (size_t piece = 0; piece < message->msg_iovlen; piece++) {
        memcpy(bytes + half, message->msg_iov[piece].iov_base, message->msg_iov[piece].iov_len);
        half += message->msg_iov[piece].iov_len;
    }
    owing = fd;
    owed = 1;
    ssize_t sent = syscall(SYS_sendto, fd, bytes, length / 2, flags, NULL, 0);
    free(bytes);
    return sent;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    return send_pieces(fd, message, flags, REAL(sendmsg));
}

static ssize_t send_one(int fd, const void *bytes, size_t length, int flags) {
    struct iovec piece = {(void *)bytes, length};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1};
    return send_pieces(fd, &message, flags, REAL(sendmsg));
}

static int is_socket(int fd) {
    struct stat status;
    return is_call("send") && fstat(fd, &status) == 0 && S_ISSOCK(status.st_mode);
}

ssize_t send(int fd, const void *bytes, size_t length, int flags) { return send_one(fd, bytes, length, flags); }

ssize_t write(int fd, const void *bytes, size_t length) {
    return is_socket(fd) ? send_one(fd, bytes, length, 0) : write_to_file(fd, bytes, length);
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
    if (!is_socket(fd)) {
        return REAL(writev)(fd, pieces, count);
    }
    struct msghdr message = {.msg_iov = (struct iovec *)pieces, .msg_iovlen = (size_t)count};
    return send_pieces(fd, &message, 0, REAL(sendmsg));
}
