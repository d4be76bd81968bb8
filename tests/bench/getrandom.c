// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * Measures getrandom() of 16 bytes: through the vDSO, and as a system call. This is a program of
 * its own because it has to be linked dynamically: a static C library does not use the vDSO.
 *
 * It checks its own measurement. The vDSO's loop runs in a traced child, where each system call is
 * counted. A measurement with a system call in it does not count: after a reseed of the kernel, the
 * vDSO fetches a new key by one.
 */

#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CALLS 20000

static char bytes[16];

/* How many times the child was stopped: twice for each system call. */
static volatile long *stops;

static long nothing(void)
{
	return sizeof(bytes);
}

static long by_vdso(void)
{
	return getrandom(bytes, sizeof(bytes), 0);
}

static long by_system_call(void)
{
	return syscall(SYS_getrandom, bytes, sizeof(bytes), 0);
}

static double now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return 1e9 * now.tv_sec + now.tv_nsec;
}

static void check(int ok, const char *what)
{
	if (ok)
		return;
	printf("%s\n", what);
	exit(1);
}

/* Returns the shortest of five measurements of one call, in nanoseconds. Inlined with the call. */
__attribute__((always_inline))
static inline double measure(long (*call)(void))
{
	double least = 1e9;

	for (int round = 0; round < 5; round++) {
		double time = now();
		long before = *stops, after;

		for (int i = 0; i < CALLS; i++) {
			__asm__ volatile("" : : "r"(i));
			check(call() == sizeof(bytes), "getrandom failed");
		}
		after = *stops;
		time = (now() - time) / CALLS;
		if (after == before && time < least)
			least = time;
	}
	check(least < 1e9, "a system call in each measurement");
	return least;
}

static void traced(void)
{
	long before;

	check(!ptrace(PTRACE_TRACEME, 0, NULL, NULL), "cannot be traced");
	raise(SIGSTOP);
	/* The first call allocates the vDSO's state. */
	by_vdso();
	printf("getrandom of 16 bytes, vDSO: %.1f\n", measure(by_vdso) - measure(nothing));

	before = *stops;
	for (int i = 0; i < 100; i++)
		by_system_call();
	check(*stops - before == 200, "not one system call in each call");
}

int main(void)
{
	int status;
	pid_t child;

	stops = mmap(NULL, sizeof(*stops), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(stops != MAP_FAILED, "no memory");
	child = fork();
	if (!child) {
		traced();
		return 0;
	}
	while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
		++*stops;
		ptrace(PTRACE_SYSCALL, child, NULL, NULL);
	}
	check(WIFEXITED(status) && !WEXITSTATUS(status), "the child failed");

	/* The parent is not traced: tracing takes time. */
	printf("getrandom of 16 bytes, system call: %.1f\n",
	       measure(by_system_call) - measure(nothing));
	return 0;
}
