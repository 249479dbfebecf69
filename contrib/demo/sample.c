/*
 * The process in the sample checkpoint: small, and yet a tree. A parent with a second thread and
 * one child; each holds 64 KiB of text, so its memory is worth a look (`lazyfs cat`).
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define SIZE 65536

static void fill(const char *who)
{
	char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (int at = 0, line = 1; at < SIZE - 64; line++)
		at += sprintf(memory + at, "%s remembers line %d.\n", who, line);
}

static void *wait_here(void *name)
{
	prctl(PR_SET_NAME, name);
	for (;;)
		pause();
	return NULL;
}

int main(void)
{
	pthread_t thread;

	setsid();
	if (fork() == 0) {
		fill("The child");
		wait_here("sample-child");
	}
	fill("The parent");
	pthread_create(&thread, NULL, wait_here, "sample-thread");
	wait_here("sample");
}
