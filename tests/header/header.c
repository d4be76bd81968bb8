// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * The promises of userspace/include/vmgenid.h, in a guest: one test for each
 * argument. The host changes the counter on request, which is a line on standard output.
 */
#include "vmgenid.h"

#include <stdlib.h>
#include <sys/random.h>

#if VMGENID_VERSION < VMGENID_MAKE_VERSION(0, 1, 0) || VMGENID_VERSION >= VMGENID_MAKE_VERSION(1, 0, 0)
#error "the macros are not those of version 0"
#endif

#define same(got, expected) same_at(__LINE__, #got, (long long)(got), (long long)(expected))

static void same_at(int line, const char *what, long long got, long long expected)
{
	if (got == expected)
		return;
	printf("header.c:%d: %s: expected %lld, got %lld\n", line, what, expected, got);
	exit(1);
}

static struct vmgenid open_best(void)
{
	struct vmgenid v;

	same(vmgenid_open(&v), 0);
	same(v.source, VMGENID_SOURCE_VMGENID);
	return v;
}

static uint64_t barrier(const struct vmgenid *v)
{
	uint64_t generation = 0;

	same(vmgenid_barrier(v, &generation), 0);
	return generation;
}

static uint64_t change(void)
{
	char line[32];

	puts("change");
	fflush(stdout);
	same(!fgets(line, sizeof(line), stdin), 0);
	return strtoull(line, NULL, 10);
}

static void it_is_opened(void)
{
	struct vmgenid v = open_best(), elsewhere;
	uint64_t since = barrier(&v), generation;

	same(vmgenid_get(&v), since);
	same(vmgenid_wait(&v, since, 0, &generation), 0);
	same(vmgenid_wait(&v, since, 50, &generation), 0);
	same(vmgenid_wait(&v, since + 1, -1, &generation), 1);
	same(generation, since);
	same(vmgenid_open_path(&elsewhere, VMGENID_SOURCE_VMGENID, "/dev/vmgenid"), 0);
	same(vmgenid_get(&elsewhere), since);
	vmgenid_close(&elsewhere);
	vmgenid_close(&v);
	same(v.fd, -1);
}

static void what_it_is_not_is_refused(void)
{
	static const char *const paths[] = { "/dev/null", "/dev/zero", "/dev/vda", "/proc/version", "/" };
	static struct vmgenid v;
	size_t i;
	int source;

	for (i = 0; i < sizeof(paths) / sizeof(*paths); i++)
		for (source = VMGENID_SOURCE_VMGENID; source <= VMGENID_SOURCE_SYSGENID; source++) {
			same(vmgenid_open_path(&v, (enum vmgenid_source)source, paths[i]), -EINVAL);
			same(v.fd, -1);
		}
	same(vmgenid_open_path(&v, VMGENID_SOURCE_VMCLOCK, "/dev/vmgenid"), -EINVAL);
	same(vmgenid_open_path(&v, VMGENID_SOURCE_VMGENID, "/nonexistent"), -ENOENT);
	same(vmgenid_open_path(&v, VMGENID_SOURCE_SYSGENID, "/nonexistent"), -ENOENT);
}

static void a_change_is_seen_and_waited_for(void)
{
	struct vmgenid v = open_best();
	uint64_t since = barrier(&v), value = change(), generation;

	same(vmgenid_get(&v), value);
	same(vmgenid_wait(&v, since, -1, &generation), 1);
	same(generation, value);
	same(barrier(&v), value);
	same(vmgenid_wait(&v, value, 10, &generation), 0);
	vmgenid_close(&v);
}

/* The files of sysfs, and the device's name, are in the environment. */
static void write_to(const char *file)
{
	FILE *f = fopen(getenv(file), "w");

	same(!f, 0);
	same(fputs(getenv("DEVICE"), f) < 0, 0);
	same(fclose(f), 0);
}

static void an_unbound_device_is_gone(void)
{
	struct vmgenid v = open_best(), other;
	uint64_t since = barrier(&v), generation, value;

	write_to("UNBIND");
	same(vmgenid_barrier(&v, &generation), -ENODEV);
	same(vmgenid_wait(&v, since, -1, &generation), -ENODEV);
	same(vmgenid_open(&other), -ENOENT);
	value = change();
	same(vmgenid_get(&v), value);
	write_to("BIND");
	vmgenid_close(&v);
	v = open_best();
	same(barrier(&v), value);
	vmgenid_close(&v);
}

/* The page is laid out by hand: these guests have no /dev/vmclock0. */
static void a_vmclock_is_read_under_its_sequence_count(void)
{
	static union {
		unsigned char bytes[VMGENID_SIZE];
		uint32_t words[VMGENID_SIZE / 4];
		uint64_t longs[VMGENID_SIZE / 8];
	} page;
	struct vmgenid v;
	uint64_t generation;

	v.page = page.bytes;
	v.word = &page.longs[104 / 8];
	v.fd = -1;
	v.source = VMGENID_SOURCE_VMCLOCK;
	page.longs[104 / 8] = 0x0123456789abcdefull;
	same(vmgenid_get(&v), 0x0123456789abcdefll);
	same(barrier(&v), 0x0123456789abcdefll);
	page.words[12 / 4] = 1;
	same(vmgenid_barrier(&v, &generation), -EBUSY);
	page.words[12 / 4] = 2;
	page.words[108 / 4] = 0;
	same(barrier(&v), 0x89abcdefll);
}

/* Not a test: calls the barrier as soon as the page has another counter. */
static void barrier_at_the_next_change(void)
{
	struct vmgenid v = open_best();
	uint64_t since = barrier(&v), generation = 0;
	const struct timespec pause = { 0, 1000000 };
	int err;

	printf("waiting at %llu\n", (unsigned long long)since);
	fflush(stdout);
	while (vmgenid_get(&v) == since)
		nanosleep(&pause, NULL);
	err = vmgenid_barrier(&v, &generation);
	printf("barrier: %d, %llu\n", err, (unsigned long long)generation);
	vmgenid_close(&v);
}

/* Not a test: draws, and reads the time by the vDSO, which has to advance. */
static void draw_for_two_seconds(void)
{
	struct timespec before, now;
	unsigned char bytes[2][16];
	time_t end = 0;

	do {
		same(clock_gettime(CLOCK_MONOTONIC, &before), 0);
		same(getrandom(bytes[0], 16, 0), 16);
		same(getrandom(bytes[1], 16, 0), 16);
		same(!memcmp(bytes[0], bytes[1], 16), 0);
		same(clock_gettime(CLOCK_MONOTONIC, &now), 0);
		same(now.tv_sec > before.tv_sec || now.tv_nsec > before.tv_nsec, 1);
		end = end ? end : now.tv_sec + 2;
	} while (now.tv_sec < end);
	printf("%zu bits\n", 8 * sizeof(void *));
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} tests[] = {
#define TEST(name) { #name, name }
		TEST(it_is_opened),
		TEST(what_it_is_not_is_refused),
		TEST(a_change_is_seen_and_waited_for),
		TEST(an_unbound_device_is_gone),
		TEST(a_vmclock_is_read_under_its_sequence_count),
	};
	size_t i;

	if (argc == 2 && !strcmp(argv[1], "--barrier")) {
		barrier_at_the_next_change();
		return 0;
	}
	if (argc == 2 && !strcmp(argv[1], "--draw")) {
		draw_for_two_seconds();
		return 0;
	}
	for (i = 0; i < sizeof(tests) / sizeof(*tests); i++) {
		if (argc == 1)
			puts(tests[i].name);
		if (argc != 2 || strcmp(argv[1], tests[i].name))
			continue;
		tests[i].run();
		return 0;
	}
	return argc != 1;
}
