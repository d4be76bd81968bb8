/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Detect that the virtual machine was restored from a snapshot, before cached data
 * is used twice: the state of random number generators, UUIDs, nonces.
 *
 *	static struct vmgenid v;
 *	static uint64_t seeded_at;
 *
 *	int init(void)
 *	{
 *		int err = vmgenid_open(&v);
 *
 *		return err ? err : reseed();
 *	}
 *
 *	static int reseed(void)
 *	{
 *		uint64_t generation;
 *		int err = vmgenid_barrier(&v, &generation);
 *
 *		if (!err)
 *			err = seed_from(getrandom(...));
 *		if (!err)
 *			seeded_at = generation;
 *		return err;
 *	}
 *
 *	int draw(void *buf, size_t len)
 *	{
 *		int err;
 *
 *		for (;;) {
 *			generate(buf, len);
 *			if (vmgenid_get(&v) == seeded_at)
 *				return 0;
 *			err = reseed();
 *			if (err)
 *				return err;
 *		}
 *	}
 *
 * The check comes after the output, which is made again if there was a restore
 * before the check. A process that sees the change and reseeds from the kernel
 * without the barrier gets the same bytes in every clone for some milliseconds.
 *
 * This header does not detect fork(): see MADV_WIPEONFORK in madvise(2). A child may
 * use the struct vmgenid that it inherited.
 *
 * C99 and C++, on Linux, with POSIX.1-2008: -std=gnu99, or
 * -D_POSIX_C_SOURCE=200809L. Nothing is allocated. Errors are negative errno
 * values. See vmgenid(4) for the device.
 */
#ifndef VMGENID_H
#define VMGENID_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/*
 * The version of this header. VMGENID_VERSION can be compared in #if:
 *
 *	#if VMGENID_VERSION < VMGENID_MAKE_VERSION(0, 1, 0)
 *	#error "vmgenid.h is too old"
 *	#endif
 */
#define VMGENID_VERSION_MAJOR 0
#define VMGENID_VERSION_MINOR 1
#define VMGENID_VERSION_PATCH 0
#define VMGENID_VERSION_STRING "0.1.0"
#define VMGENID_MAKE_VERSION(major, minor, patch) ((major) * 1000000 + (minor) * 1000 + (patch))
#define VMGENID_VERSION \
	VMGENID_MAKE_VERSION(VMGENID_VERSION_MAJOR, VMGENID_VERSION_MINOR, VMGENID_VERSION_PATCH)

#if !defined(O_CLOEXEC) || !defined(CLOCK_MONOTONIC)
#error "vmgenid.h needs POSIX.1-2008: -std=gnu99, or -D_POSIX_C_SOURCE=200809L"
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The device that reports restores. */
enum vmgenid_source {
	/*
	 * /dev/vmgenid. The counter changes before the first instruction after the
	 * restore. This device has the barrier.
	 */
	VMGENID_SOURCE_VMGENID,
	/*
	 * /dev/vmclock0, where its page has VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT. It
	 * changes as early, but there is no barrier: in the first milliseconds, the
	 * kernel's random bytes can be the same in other clones. Callers must not keep
	 * data that was seeded within a second of a change.
	 */
	VMGENID_SOURCE_VMCLOCK,
	/*
	 * /dev/sysgenid. It changes after the kernel's reseed: until then, for
	 * milliseconds, clones continue with the data that they have cached. There
	 * is no barrier: this project's driver starts a reseed that is due when it
	 * is polled, but does not always complete it before poll() returns. Amazon
	 * Linux's driver does not reseed.
	 */
	VMGENID_SOURCE_SYSGENID
};

/* An open source. Only the functions below use its members. */
struct vmgenid {
	const volatile unsigned char *page;
	const volatile uint64_t *word;
	int fd;
	enum vmgenid_source source;
};

/* The size of the mapping, in bytes. */
#define VMGENID_SIZE 4096

static inline uint64_t vmgenid_from_le(uint64_t word)
{
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	return __builtin_bswap64(word);
#else
	return word;
#endif
}

/* A little-endian 32-bit word of the page. */
static inline uint32_t vmgenid_u32(const struct vmgenid *v, size_t offset)
{
	uint32_t word = *(const volatile uint32_t *)(v->page + offset);

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	word = __builtin_bswap32(word);
#endif
	return word;
}

/*
 * Returns the generation: one load, on 64-bit machines, and no barrier. Compare it
 * for equality with the generation that vmgenid_barrier() stored. If they differ,
 * call vmgenid_barrier().
 */
static inline uint64_t vmgenid_get(const struct vmgenid *v)
{
#if defined(__GNUC__)
	/* The compiler must not move earlier computations behind the load. */
	__asm__ __volatile__("" : : : "memory");
#endif
	return vmgenid_from_le(*v->word);
}

/* Whether the mapped page is VMClock's, through /dev/vmclock0 or /dev/vmgenid. */
static inline int vmgenid_maps_vmclock(const struct vmgenid *v)
{
	return (const volatile unsigned char *)v->word != v->page;
}

/* Milliseconds, of the monotonic clock. */
static inline int64_t vmgenid_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* A vmclock's counter, under the sequence count of linux/vmclock-abi.h. */
static inline int vmgenid_vmclock(const struct vmgenid *v, uint64_t *generation)
{
	const int64_t end = vmgenid_now() + 100;
	uint32_t before;

	do {
		before = vmgenid_u32(v, 12);
#if defined(__GNUC__)
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
#endif
		*generation = (uint64_t)vmgenid_u32(v, 108) << 32 | vmgenid_u32(v, 104);
#if defined(__GNUC__)
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
#endif
		if (before % 2 == 0 && before == vmgenid_u32(v, 12))
			return 0;
	} while (vmgenid_now() < end);
	return -EBUSY;
}

/*
 * Stores the generation. When this returns 0, the kernel's random number
 * generator has been reseeded since the restore that began this generation (with
 * the limits of the sources above): later draws from the kernel differ from those
 * of all other clones. After a restore this may sleep until the kernel has been
 * reseeded.
 *
 * -ENODEV: the device was unbound; there is no barrier.
 * -EAGAIN: the caller opened the file with O_NONBLOCK, and this would have to
 *  wait (VMGENID_SOURCE_VMGENID). poll() tells when to call this again.
 * -EBUSY: the hypervisor has been changing VMClock's page for 100 ms.
 * -EIO: the file does not behave like any of the devices.
 */
static inline int vmgenid_barrier(const struct vmgenid *v, uint64_t *generation)
{
	struct pollfd asked;
	uint32_t number;
	ssize_t len;
	int err;

	switch (v->source) {
	case VMGENID_SOURCE_VMCLOCK:
		return vmgenid_vmclock(v, generation);
	case VMGENID_SOURCE_SYSGENID:
		/* The driver starts a reseed that is due. */
		asked.fd = v->fd;
		asked.events = POLLIN;
		asked.revents = 0;
		while (poll(&asked, 1, 0) < 0)
			if (errno != EINTR)
				return -errno;
		if (asked.revents & (POLLHUP | POLLERR))
			return -ENODEV;
		number = vmgenid_u32(v, 0);
		/* For processes that poll it. It fails on a file opened for reading. */
		len = write(v->fd, &number, sizeof(number));
		break;
	default:
		for (;;) {
			/* The page has all 64 bits, perhaps of an earlier generation. */
			if (vmgenid_maps_vmclock(v)) {
				err = vmgenid_vmclock(v, generation);
				if (err)
					return err;
			}
			do {
				len = read(v->fd, &number, sizeof(number));
			} while (len < 0 && errno == EINTR);
			if (len < 0)
				return -errno;
			if (len != (ssize_t)sizeof(number))
				return -EIO;
			if (!vmgenid_maps_vmclock(v))
				break;
			if ((uint32_t)*generation == number)
				return 0;
		}
	}
	*generation = number;
	return 0;
}

static inline void vmgenid_close(struct vmgenid *v)
{
	if (v->page) {
		munmap((void *)(uintptr_t)v->page, VMGENID_SIZE);
		if (v->fd >= 0)
			close(v->fd);
	}
	memset(v, 0, sizeof(*v));
	v->fd = -1;
}

/*
 * Uses a file that the caller has opened for reading. Open VMGENID_SOURCE_VMGENID
 * without O_NONBLOCK. vmgenid_close() closes the file; if this fails the caller
 * has to close it.
 *
 * -EINVAL: the file is not the device, or a vmclock without a counter.
 * -ENODEV: the device was unbound.
 * And those of vmgenid_barrier().
 */
static inline int vmgenid_open_fd(struct vmgenid *v, enum vmgenid_source source, int fd)
{
	unsigned char bytes[5];
	struct stat st;
	uint64_t generation;
	size_t odd = source == VMGENID_SOURCE_VMGENID ? 5 : 3;
	ssize_t len;
	void *page;
	int err, vmclock = source == VMGENID_SOURCE_VMCLOCK;

	memset(v, 0, sizeof(*v));
	v->fd = -1;
	if (fstat(fd, &st))
		return -errno;
	/* They are misc devices. */
	if (!S_ISCHR(st.st_mode) || major(st.st_rdev) != 10)
		return -EINVAL;
	if (source != VMGENID_SOURCE_VMCLOCK) {
		/* Neither device accepts a read of another size. */
		do {
			len = read(fd, bytes, odd);
		} while (len < 0 && errno == EINTR);
		if (len >= 0 || errno != EINVAL)
			return len < 0 && errno == ENODEV ? -ENODEV : -EINVAL;
	}
	page = mmap(NULL, VMGENID_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED && errno == ENODEV && source == VMGENID_SOURCE_VMGENID) {
		/* The counter is VMClock's, and so is the page, which is the second one. */
		vmclock = 1;
		page = mmap(NULL, VMGENID_SIZE, PROT_READ, MAP_SHARED, fd,
			    (off_t)sysconf(_SC_PAGESIZE));
	}
	if (page == MAP_FAILED)
		return vmclock && errno == ENODEV && source != VMGENID_SOURCE_VMGENID ? -EINVAL : -errno;
	v->page = (const volatile unsigned char *)page;
	v->source = source;
	v->word = (const volatile uint64_t *)page;
	err = 0;
	if (vmclock) {
		v->word += 104 / sizeof(*v->word);
		/* "VCLK", its size, VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT. */
		if (vmgenid_u32(v, 0) != 0x4b4c4356 || vmgenid_u32(v, 4) < 112 ||
		    !(vmgenid_u32(v, 24) & (1u << 8)))
			err = -EINVAL;
	}
	if (!err) {
		v->fd = fd;
		err = vmgenid_barrier(v, &generation);
	}
	if (err) {
		v->fd = -1;
		vmgenid_close(v);
	}
	return err;
}

/*
 * Opens a device node. Stores in *opened whether open(2) has succeeded.
 */
static inline int vmgenid_open_node(struct vmgenid *v, enum vmgenid_source source,
				    const char *path, int *opened)
{
	int fd = -1, err, nonblock = 0;

	/* The barrier of /dev/vmgenid may have to wait. */
	if (source != VMGENID_SOURCE_VMGENID)
		nonblock = O_NONBLOCK;
	if (source == VMGENID_SOURCE_SYSGENID)
		fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		fd = open(path, O_RDONLY | O_CLOEXEC | nonblock);
	*opened = fd >= 0;
	if (fd < 0) {
		err = -errno;
		memset(v, 0, sizeof(*v));
		v->fd = -1;
		return err;
	}
	err = vmgenid_open_fd(v, source, fd);
	if (err)
		close(fd);
	return err;
}

/*
 * Opens a device node. The errors are those of open(2), and of vmgenid_open_fd().
 */
static inline int vmgenid_open_path(struct vmgenid *v, enum vmgenid_source source,
				    const char *path)
{
	int opened;

	return vmgenid_open_node(v, source, path, &opened);
}

/*
 * Opens the best source of this machine, and stores it in v->source.
 *
 * -ENOENT: there is none.
 * Any other: there is one, and it cannot be used. This does not try a source with
 * fewer guarantees then, except after a vmclock that the caller may not open.
 */
static inline int vmgenid_open(struct vmgenid *v)
{
	static const char *const paths[] = { "/dev/vmgenid", "/dev/vmclock0", "/dev/sysgenid" };
	static const enum vmgenid_source sources[] = {
		VMGENID_SOURCE_VMGENID, VMGENID_SOURCE_VMCLOCK, VMGENID_SOURCE_SYSGENID
	};
	size_t i;
	int err, opened, missing = -ENOENT;

	for (i = 0; i < sizeof(paths) / sizeof(*paths); i++) {
		err = vmgenid_open_node(v, sources[i], paths[i], &opened);
		if (!opened && (err == -ENOENT || err == -ENXIO || err == -ENODEV))
			continue;
		/* Most vmclocks have no counter. */
		if (err == -EINVAL && sources[i] == VMGENID_SOURCE_VMCLOCK)
			continue;
		/* Only root may open it. */
		if (!opened && sources[i] == VMGENID_SOURCE_VMCLOCK &&
		    (err == -EACCES || err == -EPERM)) {
			missing = err;
			continue;
		}
		return err;
	}
	return missing;
}

/*
 * Waits until the generation differs from since, at most for timeout milliseconds,
 * or for ever if that is negative. Returns 1 if it differs, and stores it, after
 * the barrier. Returns 0 if it is the same.
 *
 * Many threads can wait while other threads use v.
 *
 * -ENODEV: the device was unbound.
 * -ENOTSUP: this hypervisor's vmclock sends no notifications.
 * -ENOENT: this has to open the device anew, and /proc is not mounted.
 * And those of vmgenid_barrier().
 */
static inline int vmgenid_wait(const struct vmgenid *v, uint64_t since, int timeout,
			       uint64_t *generation)
{
	const int64_t end = vmgenid_now() + timeout;
	unsigned char bytes[8];
	struct pollfd own;
	char path[32];
	int64_t left;
	int err, hangup;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", v->fd);
	for (;;) {
		/*
		 * A file reports changes since it was opened, or last read. Other
		 * callers read v->fd, so this opens a file of its own.
		 */
		own.fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		own.events = POLLIN;
		own.revents = 0;
		if (own.fd < 0)
			return errno == ENXIO ? -ENODEV : -errno;
		/* A vmclock reports other changes, too, and those before its first read. */
		if (v->source == VMGENID_SOURCE_VMCLOCK &&
		    pread(own.fd, bytes, sizeof(bytes), 104) != (ssize_t)sizeof(bytes)) {
			close(own.fd);
			return -EIO;
		}
		if (vmgenid_get(v) != since) {
			close(own.fd);
			err = vmgenid_barrier(v, generation);
			return err ? err : 1;
		}
		left = timeout < 0 ? -1 : end - vmgenid_now();
		if (timeout >= 0 && left < 0)
			left = 0;
		err = poll(&own, 1, (int)left);
		if (err < 0)
			err = errno == EINTR ? 1 : -errno;
		hangup = own.revents & (POLLHUP | POLLERR);
		close(own.fd);
		if (err <= 0)
			return err;
		if (hangup)
			return v->source == VMGENID_SOURCE_VMCLOCK ? -ENOTSUP : -ENODEV;
	}
}

#ifdef __cplusplus
}
#endif

#endif /* VMGENID_H */
