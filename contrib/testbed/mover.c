/*
 * mover: a process that does with its memory all that can be done with it, and knows at any time
 * what must be in it.
 *
 *   mover --status FILE [--size MIB] [--steps N] [--seed N] [--zombie] [--exit]
 *
 * It fills memory, some of it never touched, and waits to be checkpointed. On SIGUSR1 it goes to
 * work, at random, as the seed will have it: reads and writes, moves, grows, shrinks, unmaps, drops
 * (MADV_DONTNEED, MADV_FREE) and protects parts of its memory, maps anew where it was, forks children
 * that check what they have inherited, and go on to fork or to exec; while threads read memory that
 * is not changed. Whatever it reads it compares. With --exit it exits instead, at once. With
 * --zombie there is a child that has exited and is not waited for.
 *
 * The status file has the lines of workload.c:
 *
 *   loop 0 SECONDS PID NUMBER 0        every 50 ms while it waits
 *   done 0 SECONDS PID STEPS RESULT    0, or the line of this file where something was wrong
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define REGIONS 512
#define MOST_PAGES 4096
#define THREADS 2
#define MAYBE 0x80000000u /* or zeros: MADV_FREE */

struct region {
	uint64_t *at;
	unsigned pages;
	int read_only;
	uint32_t *holds; /* of each page what it was filled with; 0 is zeros */
};

static struct region regions[REGIONS];
static unsigned region_count;
static struct region still; /* read by the threads */
static const char *status_path, *own_path;
static size_t size = 64ul << 20;
static unsigned long steps = 2000;
static uint64_t state = 1;
static uint32_t last_fill;
static atomic_int stopping, wrong_at;
static pid_t children[4];

#define WRONG()                                             \
	do {                                                \
		int none = 0;                               \
		atomic_compare_exchange_strong(&wrong_at, &none, __LINE__); \
	} while (0)

static void die(const char *what)
{
	fprintf(stderr, "mover: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t x) /* splitmix64 */
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

static uint64_t random_below(uint64_t most)
{
	return mix(state++) % most;
}

static void report(const char *event, unsigned long number, int value)
{
	struct timespec now;
	char line[128];
	int fd = open(status_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);

	if (fd < 0)
		die(status_path);
	clock_gettime(CLOCK_REALTIME, &now);
	int length = snprintf(line, sizeof line, "%s 0 %lld.%09ld %d %lu %d\n", event,
			      (long long)now.tv_sec, now.tv_nsec, (int)getpid(), number, value);
	if (write(fd, line, length) != length)
		die(status_path);
	close(fd);
}

/* ---- pages ---- */

static void fill_page(uint64_t *page, uint32_t with)
{
	for (unsigned i = 0; i < WORDS; i++)
		page[i] = with ? mix(with) + i : 0;
}

static int page_is(const uint64_t *page, uint32_t with)
{
	uint64_t first = with ? mix(with) : 0;

	for (unsigned i = 0; i < WORDS; i++)
		if (page[i] != (with ? first + i : 0))
			return 0;
	return 1;
}

static int page_is_right(const struct region *region, unsigned page)
{
	const uint64_t *at = region->at + page * WORDS;
	uint32_t holds = region->holds[page];

	if (holds & MAYBE)
		return page_is(at, holds & ~MAYBE) || page_is(at, 0);
	return page_is(at, holds);
}

static void check(const struct region *region, unsigned from, unsigned count)
{
	for (unsigned page = from; page < from + count && page < region->pages; page++)
		if (!page_is_right(region, page))
			WRONG();
}

static void *map(size_t length)
{
	void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static struct region *add(void *at, unsigned pages)
{
	struct region *region = &regions[region_count++];

	*region = (struct region){ at, pages, 0, calloc(pages + 1, sizeof(uint32_t)) };
	if (!region->holds)
		die("calloc");
	return region;
}

static void fill(struct region *region)
{
	for (unsigned page = 0; page < region->pages; page++)
		if (page / 16 % 8 != 5) { /* some are never touched */
			region->holds[page] = ++last_fill;
			fill_page(region->at + page * WORDS, last_fill);
		}
}

/* Make two regions of one, the second from `page` on; returns that, or NULL. */
static struct region *split(struct region *region, unsigned page)
{
	if (region_count == REGIONS || page == 0 || page >= region->pages)
		return NULL;
	struct region *tail = add(region->at + page * WORDS, region->pages - page);

	memcpy(tail->holds, region->holds + page, tail->pages * sizeof(uint32_t));
	tail->read_only = region->read_only;
	region->pages = page;
	return tail;
}

static void forget(struct region *region)
{
	free(region->holds);
	*region = regions[--region_count];
}

/* ---- what is done ---- */

static void overwrite(struct region *region, unsigned page, unsigned count)
{
	for (; count-- && page < region->pages && !region->read_only; page++) {
		region->holds[page] = ++last_fill;
		fill_page(region->at + page * WORDS, last_fill);
	}
}

static void move(struct region *region)
{
	size_t length = region->pages * PAGE;
	void *to = map(length), *old = region->at;

	region->at = mremap(region->at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (region->at == MAP_FAILED)
		die("mremap");
	if (random_below(2) && region_count < REGIONS) { /* others are where it was */
		void *anew = mmap(old, length, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
		if (anew == old)
			add(anew, length / PAGE);
	}
}

static void swap(struct region *one, struct region *other)
{
	size_t length = one->pages * PAGE;
	void *aside = map(length), *place = one->at;

	if (one->pages != other->pages || one == other) {
		munmap(aside, length);
		return;
	}
	if (mremap(one->at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, aside) == MAP_FAILED ||
	    mremap(other->at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place) == MAP_FAILED)
		die("mremap");
	one->at = aside;
	other->at = place;
}

static void grow(struct region *region, unsigned by)
{
	unsigned pages = region->pages + by;
	void *at = mremap(region->at, region->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);

	if (at == MAP_FAILED)
		return; /* it has been split: EFAULT */
	region->holds = realloc(region->holds, (pages + 1) * sizeof(uint32_t));
	if (!region->holds)
		die("realloc");
	memset(region->holds + region->pages, 0, by * sizeof(uint32_t));
	region->at = at;
	region->pages = pages;
}

static void shrink(struct region *region, unsigned to)
{
	if (to == 0 || to >= region->pages)
		return;
	if (mremap(region->at, region->pages * PAGE, to * PAGE, 0) == MAP_FAILED)
		die("mremap");
	region->pages = to;
}

static void unmap(struct region *region)
{
	if (region_count < 8)
		return;
	if (munmap(region->at, region->pages * PAGE))
		die("munmap");
	forget(region);
}

static void drop(struct region *region, unsigned page, unsigned count, int advice)
{
	if (page + count > region->pages)
		count = region->pages - page;
	if (madvise(region->at + page * WORDS, count * PAGE, advice))
		die("madvise");
	for (unsigned i = page; i < page + count; i++)
		if (advice == MADV_DONTNEED)
			region->holds[i] = 0;
		else if (region->holds[i])
			region->holds[i] |= MAYBE;
}

static void protect(struct region *region)
{
	region->read_only = !region->read_only;
	if (mprotect(region->at, region->pages * PAGE,
		     PROT_READ | (region->read_only ? 0 : PROT_WRITE)))
		die("mprotect");
}

static struct region *any(void)
{
	return &regions[random_below(region_count)];
}

static void check_some(unsigned count)
{
	while (count--) {
		struct region *region = any();
		check(region, random_below(region->pages), 1 + random_below(8));
	}
}

static void wait_for(pid_t *child)
{
	int status;

	if (*child && waitpid(*child, &status, 0) == *child && status)
		WRONG();
	*child = 0;
}

/* Of a child: look around, write, maybe fork on, and end. */
static void live_briefly(void)
{
	pid_t child = 0;

	for (int depth = 0; depth < 3 && child == 0; depth++) {
		state = mix(state ^ getpid());
		check_some(20);
		overwrite(any(), 0, 2);
		drop(any(), 0, 3, MADV_DONTNEED);
		if (random_below(4) == 0) {
			execl(own_path, own_path, "--nothing", NULL);
			die("exec");
		}
		if (random_below(2))
			break;
		child = fork();
		if (child < 0)
			die("fork");
	}
	move(any());
	check_some(20);
	wait_for(&child);
	_exit(atomic_load(&wrong_at) != 0);
}

static void start_child(void)
{
	pid_t *child = &children[random_below(4)];

	wait_for(child);
	*child = fork();
	if (*child < 0)
		die("fork");
	if (*child == 0)
		live_briefly();
}

static void step(void)
{
	struct region *region = any();
	unsigned page = random_below(region->pages), count = 1 + random_below(64);

	switch (random_below(16)) {
	case 0: move(region); break;
	case 1: if (split(region, page)) move(region); break;
	case 2: grow(region, count); break;
	case 3: shrink(region, page); break;
	case 4: if (random_below(4) == 0) unmap(region); break;
	case 5: drop(region, page, count, MADV_DONTNEED); break;
	case 6: drop(region, page, count, MADV_FREE); break;
	case 7: if (split(region, page)) protect(region); break;
	case 8: if (random_below(8) == 0) start_child(); break;
	case 9: overwrite(region, page, count / 8); break;
	case 10: swap(region, any()); break;
	case 11: if (random_below(8) == 0 && region_count < REGIONS) add(map(count * PAGE), count); break;
	default: check(region, page, count / 4);
	}
}

static void *read_still(void *seed)
{
	uint64_t own = (uintptr_t)seed;

	while (!atomic_load(&stopping) && !atomic_load(&wrong_at))
		check(&still, mix(own += 7) % still.pages, 4);
	return NULL;
}

static void work(void)
{
	pthread_t threads[THREADS];

	for (uintptr_t i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, read_still, (void *)(i << 32)))
			die("pthread_create");
	unsigned long number = 0;
	while (number < steps && !atomic_load(&wrong_at)) {
		step();
		number++;
	}
	for (int i = 0; i < 4; i++)
		wait_for(&children[i]);
	atomic_store(&stopping, 1);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (unsigned i = 0; i < region_count; i++)
		check(&regions[i], 0, regions[i].pages);
	check(&still, 0, still.pages);
	report("done", number, atomic_load(&wrong_at));
}

int main(int argc, char **argv)
{
	enum { STATUS, SIZE, STEPS, SEED, ZOMBIE, EXIT, NOTHING };
	static const struct option options[] = {
		{ "status", 1, NULL, STATUS }, { "size", 1, NULL, SIZE },
		{ "steps", 1, NULL, STEPS },   { "seed", 1, NULL, SEED },
		{ "zombie", 0, NULL, ZOMBIE }, { "exit", 0, NULL, EXIT },
		{ "nothing", 0, NULL, NOTHING }, { NULL, 0, NULL, 0 },
	};
	struct timespec pause = { 0, 50000000 };
	int option, zombie = 0, exits = 0;
	sigset_t signals;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1)
		switch (option) {
		case STATUS: status_path = optarg; break;
		case SIZE: size = strtoul(optarg, NULL, 10) << 20; break;
		case STEPS: steps = strtoul(optarg, NULL, 10); break;
		case SEED: state = mix(strtoul(optarg, NULL, 10)); break;
		case ZOMBIE: zombie = 1; break;
		case EXIT: exits = 1; break;
		case NOTHING: return 0;
		default: return 2;
		}
	if (!status_path || optind != argc || size < (4ul << 20)) {
		fprintf(stderr, "usage: mover --status FILE [OPTION...]\n");
		return 2;
	}
	own_path = argv[0];
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	sigprocmask(SIG_BLOCK, &signals, NULL);

	for (unsigned long pages = size / PAGE * 3 / 4; pages;) {
		unsigned long part = pages < MOST_PAGES / 2 ? pages : 1 + random_below(MOST_PAGES / 2);
		fill(add(map(part * PAGE), part));
		pages -= part;
	}
	still = *add(map(size / 4), size / 4 / PAGE);
	fill(&still);
	region_count--;
	pid_t child = zombie ? fork() : 1;
	if (child == 0)
		_exit(0);
	if (zombie) {
		siginfo_t info;
		waitid(P_PID, child, &info, WEXITED | WNOWAIT);
	}
	for (unsigned long number = 1;; number++) {
		report("loop", number, 0);
		if (sigtimedwait(&signals, NULL, &pause) != SIGUSR1)
			continue;
		if (exits)
			return 0;
		work();
	}
}
