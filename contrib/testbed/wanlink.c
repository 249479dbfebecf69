/*
 * wanlink: a link with delay and rate to a new network namespace, in user space: for kernels that
 * have no netem, and for tests that must leave nothing behind.
 *
 *   wanlink [-e] NEAR_IP FAR_IP ONE_WAY_MS RATE_MBIT QUEUE_MS        (as root)
 *
 *   wanlink 198.18.0.1 198.18.0.2 5 1000 60 &      1 Gbit/s, 10 ms round trip, at most 60 ms queued
 *   (wait for its "up")
 *   ping -c 3 198.18.0.2
 *   nsenter --net=/proc/$!/ns/net docker-registry serve config.yml
 *
 * It makes two TUN devices, the near one in the namespace it was started in (the first free wanN),
 * the far one (wan0) in a namespace of its own; gives both their addresses and brings them and the
 * far loopback up; and then prints "up NEAR_DEVICE" on a line. The far namespace has no name: it
 * is /proc/PID/ns/net, and ends with wanlink and with the last process in it, whatever way those
 * end. With -e, wanlink ends when its standard input does: hold a pipe's other end, and it cannot
 * outlive you.
 *
 * Each direction has a queue of its own. A packet leaves it after it has been serialised at
 * RATE_MBIT behind those before it, and is delivered ONE_WAY_MS later. One that would wait for
 * more than QUEUE_MS before being serialised is dropped (tail drop: TCP sees loss, as on a router).
 *
 * Segmentation is left to the receiver (packets up to 64 KiB cross the link whole), which keeps
 * the cost at 1 Gbit/s near 5% of a core.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 16384 /* packets under way in one direction */
#define VNET_HEADER 10
#define LARGEST_PACKET (VNET_HEADER + 65536)
#define BATCH 64 /* packets taken from one device before the other has its turn */
#define SECOND_NS 1000000000ll

struct packet {
	int64_t due_ns;
	ssize_t length;
	char *bytes;
};

struct queue {
	struct packet slot[SLOTS];
	unsigned head, tail;
	int64_t link_free_ns; /* when the last packet taken in will have been serialised */
};

static struct queue queues[2]; /* [i]: from device i to device 1 - i */
static int64_t delay_ns, longest_wait_ns;
static double ns_per_byte;

static void die(const char *what)
{
	fprintf(stderr, "wanlink: %s: %s\n", what, strerror(errno));
	exit(1);
}

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND_NS + t.tv_nsec;
}

static void set_address(int control, const char *device, unsigned long request, const char *ip)
{
	struct ifreq interface = { 0 };
	struct sockaddr_in *address = (struct sockaddr_in *)&interface.ifr_addr;

	snprintf(interface.ifr_name, IFNAMSIZ, "%s", device);
	address->sin_family = AF_INET;
	if (inet_pton(AF_INET, ip, &address->sin_addr) != 1) {
		fprintf(stderr, "wanlink: not an IPv4 address: %s\n", ip);
		exit(2);
	}
	if (ioctl(control, request, &interface))
		die(ip);
}

static void bring_up(int control, const char *device)
{
	struct ifreq interface = { 0 };

	snprintf(interface.ifr_name, IFNAMSIZ, "%s", device);
	if (ioctl(control, SIOCGIFFLAGS, &interface))
		die(device);
	interface.ifr_flags |= IFF_UP;
	if (ioctl(control, SIOCSIFFLAGS, &interface))
		die(device);
}

/* A TUN device in the current network namespace, up; its name is left in `device`. */
static int open_device(char device[IFNAMSIZ], const char *own_ip, const char *peer_ip)
{
	int header = VNET_HEADER;
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct ifreq request = { 0 };

	snprintf(request.ifr_name, IFNAMSIZ, "wan%%d");
	request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
	if (fd < 0 || ioctl(fd, TUNSETIFF, &request) || ioctl(fd, TUNSETVNETHDRSZ, &header))
		die("/dev/net/tun");
	if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4))
		die("TUNSETOFFLOAD");
	if (control < 0)
		die("socket");
	snprintf(device, IFNAMSIZ, "%s", request.ifr_name);
	set_address(control, device, SIOCSIFADDR, own_ip);
	set_address(control, device, SIOCSIFDSTADDR, peer_ip);
	bring_up(control, device);
	close(control);
	return fd;
}

static void loopback_up(void)
{
	int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (control < 0)
		die("socket");
	bring_up(control, "lo");
	close(control);
}

static void take_in(int fd, struct queue *queue)
{
	static char buffer[LARGEST_PACKET];

	for (int i = 0; i < BATCH; i++) {
		ssize_t length = read(fd, buffer, sizeof buffer);
		if (length < VNET_HEADER)
			return;
		int64_t now = now_ns();
		if (queue->link_free_ns < now)
			queue->link_free_ns = now;
		if (queue->link_free_ns - now > longest_wait_ns || queue->tail - queue->head == SLOTS)
			continue; /* the queue is full: dropped */
		queue->link_free_ns += (length - VNET_HEADER) * ns_per_byte;

		struct packet *packet = &queue->slot[queue->tail++ % SLOTS];
		packet->due_ns = queue->link_free_ns + delay_ns;
		packet->length = length;
		packet->bytes = malloc(length);
		if (!packet->bytes)
			die("malloc");
		memcpy(packet->bytes, buffer, length);
	}
}

/* Hand over what is due; return when the next packet will be, or `latest`. */
static int64_t deliver(struct queue *queue, int fd, int64_t latest)
{
	int64_t now = now_ns();

	while (queue->head != queue->tail) {
		struct packet *packet = &queue->slot[queue->head % SLOTS];
		if (packet->due_ns > now)
			return packet->due_ns < latest ? packet->due_ns : latest;
		if (write(fd, packet->bytes, packet->length) < 0 && errno != EIO) /* EIO: it is down */
			fprintf(stderr, "wanlink: write: %s\n", strerror(errno));
		free(packet->bytes);
		queue->head++;
	}
	return latest;
}

static int ended(int fd)
{
	char scrap[512];
	ssize_t length = read(fd, scrap, sizeof scrap);

	return length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR);
}

static double number(const char *text, const char *what)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value >= 0) || value > 1e9) {
		fprintf(stderr, "wanlink: %s: not a number from 0: %s\n", what, text);
		exit(2);
	}
	return value;
}

int main(int argc, char **argv)
{
	int until_eof = argc > 1 && !strcmp(argv[1], "-e");
	char near_device[IFNAMSIZ], far_device[IFNAMSIZ];
	int fd[2];

	argv += until_eof;
	if (argc - until_eof != 6) {
		fprintf(stderr, "usage: wanlink [-e] NEAR_IP FAR_IP ONE_WAY_MS RATE_MBIT QUEUE_MS\n");
		return 2;
	}
	delay_ns = number(argv[3], "ONE_WAY_MS") * 1e6;
	longest_wait_ns = number(argv[5], "QUEUE_MS") * 1e6;
	ns_per_byte = 8000.0 / number(argv[4], "RATE_MBIT");
	if (!(ns_per_byte < 1e9)) {
		fprintf(stderr, "wanlink: RATE_MBIT is too small\n");
		return 2;
	}

	fd[0] = open_device(near_device, argv[1], argv[2]);
	if (unshare(CLONE_NEWNET))
		die("unshare");
	loopback_up();
	fd[1] = open_device(far_device, argv[2], argv[1]);
	if (until_eof && fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK))
		die("standard input");
	prctl(PR_SET_TIMERSLACK, 1);
	printf("up %s\n", near_device);
	fflush(stdout);

	for (;;) {
		int64_t next = now_ns() + SECOND_NS;

		for (int i = 0; i < 2; i++)
			next = deliver(&queues[i], fd[1 - i], next);

		struct pollfd ready[3] = {
			{ .fd = fd[0], .events = POLLIN },
			{ .fd = fd[1], .events = POLLIN },
			{ .fd = until_eof ? 0 : -1, .events = POLLIN },
		};
		int64_t wait = next - now_ns();
		if (wait < 0)
			wait = 0;
		struct timespec timeout = { wait / SECOND_NS, wait % SECOND_NS };
		if (ppoll(ready, 3, &timeout, NULL) < 0 && errno != EINTR)
			die("poll");
		for (int i = 0; i < 2; i++)
			if (ready[i].revents & POLLIN)
				take_in(fd[i], &queues[i]);
		if (ready[2].revents && ended(0))
			return 0;
	}
}
