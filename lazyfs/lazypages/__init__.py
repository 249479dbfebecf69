"""The memory of tasks that CRIU restores with --lazy-pages, served in place of `criu lazy-pages`.

How it is used, by a mount and by whoever restores without one:

    guard = Guard.start()                  # before there are threads, and before trio.run
    pages = LazyPages(checkpoint, guard)   # of `open_checkpoint`
    with pages.listen(work_dir) as socket: # now `criu restore --lazy-pages -W work_dir` may begin
        nursery.start_soon(pages.run, socket)
        await pages.wait_home()            # all memory is there; LazyfsError: tasks were killed
    guard.stop()                           # unless `pages.is_held`

`run` may be cancelled at any time: who still misses memory is killed before it comes back. Until
then the mount of the images may go, but the checkpoint has to stay open.

From the top: `server` (the socket), `session` (one restore), `task` (one process; nobody else fills
memory), `ahead` (what a trace foretells), `pages` (the checkpoint's bytes), `filling` (what is
filled in at once); `memory`, `missing`, `changes`, `walks`, `order` and `protocol`, which are
sans-I/O; `uffd`, `ending` and `guard`, which are about the kernel.
"""
