// SPDX-License-Identifier: GPL-2.0
/*
 * The calls of /dev/vmgenid, as Documentation/ABI/testing/dev-vmgenid has them,
 * in a machine whose hypervisor changes nothing meanwhile.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kselftest_harness.h"

FIXTURE(vmgenid) {
	int fd;
	size_t page;
};

FIXTURE_SETUP(vmgenid)
{
	self->page = sysconf(_SC_PAGESIZE);
	self->fd = open("/dev/vmgenid", O_RDONLY);
	if (self->fd < 0 && errno == ENOENT)
		SKIP(return, "this machine has no generation counter");
	ASSERT_LE(0, self->fd);
}

FIXTURE_TEARDOWN(vmgenid)
{
	if (self->fd >= 0)
		close(self->fd);
}

TEST_F(vmgenid, everybody_may_read)
{
	struct stat st;

	ASSERT_EQ(0, fstat(self->fd, &st));
	EXPECT_TRUE(S_ISCHR(st.st_mode));
	EXPECT_EQ(0444, st.st_mode & 07777);
}

TEST_F(vmgenid, read_is_four_bytes)
{
	uint32_t value, again;
	void *nowhere;
	char buf[8];

	ASSERT_EQ(sizeof(value), read(self->fd, &value, sizeof(value)));
	/* There is no position. */
	ASSERT_EQ(sizeof(again), read(self->fd, &again, sizeof(again)));
	EXPECT_EQ(value, again);
	EXPECT_EQ(0, lseek(self->fd, 0, SEEK_CUR));

	EXPECT_EQ(0, read(self->fd, buf, 0));
	for (size_t len = 1; len <= sizeof(buf); len++) {
		if (len == sizeof(value))
			continue;
		EXPECT_EQ(-1, read(self->fd, buf, len));
		EXPECT_EQ(EINVAL, errno);
	}
	EXPECT_EQ(-1, pread(self->fd, &value, sizeof(value), 4));
	EXPECT_EQ(EINVAL, errno);

	nowhere = mmap(NULL, self->page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, nowhere);
	EXPECT_EQ(-1, read(self->fd, nowhere, sizeof(value)));
	EXPECT_EQ(EFAULT, errno);
}

TEST_F(vmgenid, the_page_has_the_counter)
{
	uint32_t value, *word;

	ASSERT_EQ(sizeof(value), read(self->fd, &value, sizeof(value)));
	word = mmap(NULL, self->page, PROT_READ, MAP_SHARED, self->fd, 0);
	if (word == MAP_FAILED && errno == ENODEV)
		SKIP(return, "the counter is in VMClock's page");
	ASSERT_NE(MAP_FAILED, word);
	EXPECT_EQ(value, le32toh(*word));
	for (size_t i = 1; i < self->page / sizeof(*word); i++)
		ASSERT_EQ(0, word[i]);

	EXPECT_EQ(-1, mprotect(word, self->page, PROT_READ | PROT_WRITE));
	EXPECT_EQ(EACCES, errno);
	EXPECT_EQ(-1, mprotect(word, self->page, PROT_READ | PROT_EXEC));
	EXPECT_EQ(EACCES, errno);
	EXPECT_EQ(MAP_FAILED, mremap(word, self->page, 2 * self->page, MREMAP_MAYMOVE));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(0, munmap(word, self->page));
}

TEST_F(vmgenid, other_mappings_are_refused)
{
	EXPECT_EQ(MAP_FAILED, mmap(NULL, 2 * self->page, PROT_READ, MAP_SHARED, self->fd, 0));
	EXPECT_EQ(EINVAL, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, self->page, PROT_READ | PROT_WRITE, MAP_PRIVATE,
				   self->fd, 0));
	EXPECT_EQ(EPERM, errno);
	EXPECT_EQ(MAP_FAILED, mmap(NULL, self->page, PROT_READ | PROT_EXEC, MAP_SHARED,
				   self->fd, 0));
	EXPECT_EQ(EPERM, errno);
}

TEST_F(vmgenid, nothing_to_read_while_nothing_changes)
{
	struct pollfd pollfd = { .fd = self->fd, .events = POLLIN };

	EXPECT_EQ(0, poll(&pollfd, 1, 100));
}

TEST_F(vmgenid, nothing_else_is_there)
{
	EXPECT_EQ(-1, write(self->fd, "x", 1));
	EXPECT_EQ(EBADF, errno);
	EXPECT_EQ(-1, ioctl(self->fd, 0));
	EXPECT_EQ(ENOTTY, errno);
}

TEST_HARNESS_MAIN
