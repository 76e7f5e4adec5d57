/* To be preloaded into PostgreSQL: fsync fails, or takes long, as long as the file that $FAULT_CONTROL names says so:
   "fail", or "slow" and a number of milliseconds. Anything else: nothing is changed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fault(void) {
    char said[32] = "";
    const char *path = getenv("FAULT_CONTROL");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return 0;
    ssize_t length = read(file, said, sizeof said - 1);
    close(file);
    if (length > 0 && !strncmp(said, "slow", 4))
        usleep(1000 * atoi(said + 4));
    return length > 0 && !strncmp(said, "fail", 4);
}

#define FAULTY(name)                                                                                                   \
    int name(int file) {                                                                                               \
        static int (*real)(int);                                                                                       \
        if (!real)                                                                                                     \
            real = (int (*)(int))dlsym(RTLD_NEXT, #name);                                                              \
        if (fault()) {                                                                                                 \
            errno = EIO;                                                                                               \
            return -1;                                                                                                 \
        }                                                                                                              \
        return real(file);                                                                                             \
    }

FAULTY(fsync)
FAULTY(fdatasync)
