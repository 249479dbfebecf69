/*
 * workload: a process worth checkpointing. It fills memory with known contents and reads a part
 * of it over and over, and says in a status file how far it is and what it saw.
 *
 *   workload --size 256 --status FILE [--percent 5] [--pattern regions|scattered]
 *            [--shared MIB] [--children N] [--cow] [--interval 50] [--seed 1]
 *
 *   --size MIB       private anonymous memory of each process: of ten 64 KiB blocks six are text,
 *                    three random and one zero (written, so its pages count)
 *   --percent P      how much of it each loop reads, and
 *   --pattern        regions: eight contiguous regions, spread over the memory; scattered: half of
 *                    it as 64 KiB clusters, half as single pages, in a random order that is the
 *                    same each loop
 *   --shared MIB     shared anonymous memory as well, one mapping for all processes, of the same
 *                    mixture; all of it is read each loop
 *   --children N     N child processes, each with as much private memory of its own
 *   --cow            the children inherit their parent's memory and write to every fourth 64 KiB
 *                    block only, so the rest is shared copy-on-write
 *   --interval MS    the pause between loops
 *
 * The status file gets a line for each event, MEMBER being 0 for the parent and 1 to N for the
 * children, and SECONDS of CLOCK_REALTIME (CRIU restores into a time namespace where
 * CLOCK_MONOTONIC goes on from the dump, so that one cannot be compared with the host's):
 *
 *   loop MEMBER SECONDS PID NUMBER CHECKSUM     one round through the working set; the checksum is
 *                                               the same each time, memory not having changed
 *   hash MEMBER SECONDS PID NUMBER HASH         a hash of all memory, for each SIGUSR1; the parent
 *                                               passes the signal on to its children
 *
 * It suits CRIU: no terminal, no sockets, no threads; the status file is opened for each line and
 * not in between (CRIU checks the size of open files). Start it with setsid and its standard
 * streams on /dev/null. SIGTERM and SIGKILL end it; children end with their parent.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define BLOCK 65536ul
#define REGIONS 8
#define MOST_CHILDREN 64
#define VOCABULARY 1024

static size_t size = 64ul << 20, shared_size;
static double percent = 5;
static int scattered, children, cow;
static long interval_ms = 50;
static uint64_t seed = 1;
static const char *status_path;

static char *private_memory, *shared_memory;
static int member;
static pid_t child_pids[MOST_CHILDREN];

static void die(const char *what)
{
	fprintf(stderr, "workload: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t x) /* splitmix64 */
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
	return x ^ (x >> 31);
}

/* ---- contents ---- */

static void fill_text(char *to, uint64_t key)
{
	static char words[VOCABULARY][8];
	static const char *syllables[] = { "ba", "re", "to", "lin", "ma", "ser", "co", "di",
					   "un", "per", "ta", "ex", "ni", "or", "al", "en" };

	if (!words[0][0])
		for (int i = 0; i < VOCABULARY; i++)
			snprintf(words[i], sizeof words[i], "%s%s ", syllables[mix(i) % 16],
				 mix(i) & 256 ? syllables[(mix(i) >> 12) % 16] : "");
	for (size_t at = 0; at < BLOCK;) {
		key = key * 6364136223846793005ull + 1442695040888963407ull;
		const char *word = words[(key >> 33) % VOCABULARY & (key >> 50)];
		size_t length = strlen(word), room = BLOCK - at;
		memcpy(to + at, word, length < room ? length : room);
		at += length;
	}
}

static void fill_random(char *to, uint64_t key)
{
	uint64_t *word = (uint64_t *)to;

	for (size_t i = 0; i < BLOCK / 8; i++)
		word[i] = mix(key + i * 0x9e3779b97f4a7c15ull);
}

/* Each block's contents follow from `key` and its number; every `step`th block is filled. */
static void fill(char *memory, size_t length, uint64_t key, size_t step)
{
	for (size_t block = 0; block < length / BLOCK; block += step) {
		char *to = memory + block * BLOCK;
		uint64_t block_key = mix(key * 0x100000001b3ull + block);
		switch (block % 10) {
		case 1: case 4: case 8:
			fill_random(to, block_key);
			break;
		case 6:
			memset(to, 0, BLOCK);
			break;
		default:
			fill_text(to, block_key);
		}
	}
}

static char *map(size_t length, int sharing)
{
	void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	return memory;
}

/* ---- reading it ---- */

/* Four lanes of multiply and rotate over 8-byte words. `length`: a multiple of 32. */
static uint64_t hash(uint64_t state, const char *memory, size_t length)
{
	const uint64_t *word = (const uint64_t *)memory;
	uint64_t lane[4] = { state + 1, state ^ 0x9e3779b97f4a7c15ull, state + 3, ~state };

	for (size_t i = 0; i < length / 8; i += 4)
		for (int k = 0; k < 4; k++) {
			lane[k] += word[i + k] * 0xc2b2ae3d27d4eb4full;
			lane[k] = (lane[k] << 31 | lane[k] >> 33) * 0x9e3779b185ebca87ull;
		}
	for (int k = 0; k < 4; k++)
		state = mix(state ^ lane[k]);
	return state;
}

static uint64_t hash_all(void)
{
	return hash(hash(seed, private_memory, size), shared_memory, shared_size);
}

static uint64_t read_working_set(void)
{
	size_t wanted = size / 100.0 * percent;
	uint64_t sum = hash(seed, shared_memory, shared_size);

	if (!scattered) {
		size_t length = wanted / REGIONS / PAGE * PAGE, stride = size / REGIONS / PAGE * PAGE;
		for (size_t i = 0; i < REGIONS; i++) {
			size_t slack = (stride - length) / PAGE + 1;
			size_t at = i * stride + mix(seed + i) % slack * PAGE;
			sum = hash(sum, private_memory + at, length);
		}
		return sum;
	}
	for (size_t i = 0; i < wanted / 2 / BLOCK; i++)
		sum = hash(sum, private_memory + mix(seed + i) % (size / BLOCK) * BLOCK, BLOCK);
	for (size_t i = 0; i < wanted / 2 / PAGE; i++)
		sum = hash(sum, private_memory + mix(~seed - i) % (size / PAGE) * PAGE, PAGE);
	return sum;
}

/* ---- saying so ---- */

static void report(const char *event, unsigned long number, uint64_t value)
{
	struct timespec now;
	char line[128];
	int fd = open(status_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);

	if (fd < 0)
		die(status_path);
	clock_gettime(CLOCK_REALTIME, &now);
	int length = snprintf(line, sizeof line, "%s %d %lld.%09ld %d %lu %016llx\n", event, member,
			      (long long)now.tv_sec, now.tv_nsec, (int)getpid(), number,
			      (unsigned long long)value);
	if (write(fd, line, length) != length) /* one write: lines of several processes stay whole */
		die(status_path);
	close(fd);
}

/* Wait for the pause to end or for SIGUSR1; whether it was the signal. */
static int asked_for_hash(void)
{
	struct timespec pause = { interval_ms / 1000, interval_ms % 1000 * 1000000 };
	sigset_t signals;

	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	return sigtimedwait(&signals, NULL, &pause) == SIGUSR1;
}

static void run(void)
{
	unsigned long hashes = 0;

	for (unsigned long number = 1;; number++) {
		report("loop", number, read_working_set());
		if (!asked_for_hash())
			continue;
		for (int i = 0; i < MOST_CHILDREN && child_pids[i]; i++)
			kill(child_pids[i], SIGUSR1);
		report("hash", ++hashes, hash_all());
	}
}

/* Become child `number`, with memory of its own; the caller goes on in the parent. */
static void start_child(int number)
{
	pid_t parent = getpid(), pid = fork();

	if (pid < 0)
		die("fork");
	if (pid) {
		child_pids[number - 1] = pid;
		return;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		exit(1);
	memset(child_pids, 0, sizeof child_pids);
	member = number;
	seed += number;
	if (!cow)
		private_memory = map(size, MAP_PRIVATE);
	fill(private_memory, size, seed, cow ? 4 : 1);
	run();
}

static double number_from(const char *text, double least, double most)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value >= least && value <= most)) {
		fprintf(stderr, "workload: want a number from %g to %g, not %s\n", least, most, text);
		exit(2);
	}
	return value;
}

static void read_options(int argc, char **argv)
{
	enum { SIZE, SHARED, CHILDREN, COW, PERCENT, PATTERN, INTERVAL, SEED, STATUS };
	static const struct option options[] = {
		{ "size", 1, NULL, SIZE },	   { "shared", 1, NULL, SHARED },
		{ "children", 1, NULL, CHILDREN }, { "cow", 0, NULL, COW },
		{ "percent", 1, NULL, PERCENT },   { "pattern", 1, NULL, PATTERN },
		{ "interval", 1, NULL, INTERVAL }, { "seed", 1, NULL, SEED },
		{ "status", 1, NULL, STATUS },	   { NULL, 0, NULL, 0 },
	};
	int option;

	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (option) {
		case SIZE: size = (size_t)number_from(optarg, 1, 1 << 20) << 20; break;
		case SHARED: shared_size = (size_t)number_from(optarg, 0, 1 << 20) << 20; break;
		case CHILDREN: children = number_from(optarg, 0, MOST_CHILDREN); break;
		case COW: cow = 1; break;
		case PERCENT: percent = number_from(optarg, 0, 100); break;
		case PATTERN: scattered = !strcmp(optarg, "scattered"); break;
		case INTERVAL: interval_ms = number_from(optarg, 0, 1e6); break;
		case SEED: seed = number_from(optarg, 0, 1e15); break;
		case STATUS: status_path = optarg; break;
		default: exit(2);
		}
		if (option == PATTERN && !scattered && strcmp(optarg, "regions")) {
			fprintf(stderr, "workload: no such pattern: %s\n", optarg);
			exit(2);
		}
	}
	if (!status_path || optind != argc) {
		fprintf(stderr, "usage: workload --size MIB --status FILE [OPTION...]\n");
		exit(2);
	}
}

int main(int argc, char **argv)
{
	sigset_t signals;

	read_options(argc, argv);
	sigemptyset(&signals);
	sigaddset(&signals, SIGUSR1);
	sigprocmask(SIG_BLOCK, &signals, NULL);

	if (shared_size) {
		shared_memory = map(shared_size, MAP_SHARED);
		fill(shared_memory, shared_size, ~seed, 1);
	}
	if (!cow)
		for (int i = 1; i <= children; i++)
			start_child(i);
	private_memory = map(size, MAP_PRIVATE);
	fill(private_memory, size, seed, 1);
	if (cow)
		for (int i = 1; i <= children; i++)
			start_child(i);
	run();
}
