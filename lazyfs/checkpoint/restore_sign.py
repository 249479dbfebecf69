"""By what a restore is told from somebody who looks around: the order in which files are opened.

CRIU opens the inventory before any other image, then the tree of tasks, then what belongs to tasks,
all from one process. Who walks a directory opens files by name or as they lie there, tasks' files
(`core-`) before the inventory; `crit` and `checkpointctl` need no inventory for what they show of
tasks; who looks at single files has a process for each.

It is a hint that costs bytes at most: who imitates CRIU has fetched what a trace names.

Source: CRIU, criu/cr-restore.c: cr_restore_tasks (check_img_inventory, prepare_pstree, then the
tasks'); of others: criu, crit/crit/__main__.py (explorers), checkpointctl, internal/.
"""

from collections import OrderedDict

from lazyfs.checkpoint.criu import INVENTORY, PSTREE, is_pages, task_of

_OPENERS_MOST = 64
_STEPS = (INVENTORY, PSTREE)
_TASKS_MOST = 4096


class RestoreSign:
    """Watches who opens what in an images directory."""

    def __init__(self) -> None:
        self._steps: OrderedDict[int, int] = OrderedDict()
        """By process: how many of CRIU's first steps it has taken; -1: it has gone another way."""

    def opened(self, name: str, pid: int) -> bool:
        """Take note of a file that process `pid` has opened; say if a restore has just begun.

        `pid`: 0 for processes that cannot be told apart.
        """
        step = self._steps.pop(pid, 0)
        has_begun = False
        if name == INVENTORY:
            step = 1 if step >= 0 else step
        elif step == 0:
            step = -1
        elif 0 < step < len(_STEPS):
            step = step + 1 if name == _STEPS[step] else step
        elif step == len(_STEPS) and task_of(name) is not None:
            has_begun = True
            step = -1
        self._steps[pid] = step
        while len(self._steps) > _OPENERS_MOST:
            self._steps.popitem(last=False)
        return has_begun


class MemoryReads:
    """Tells, of a restore, the open of a pages file for most of its memory from the one before.

    A task opens its pages file twice. By the first one it reads pages one at a time where it may
    share them with its parent, and plans the rest; by the second one, which its restorer has, it
    reads the rest by `preadv` of all that lies together, once.

    Who is none and does the same reads the same bytes, past the page cache, too; but may not map
    them with MAP_SHARED (ENODEV; Linux, fs/fuse/file.c: fuse_file_mmap).

    Source: CRIU, criu/mem.c: restore_priv_vma_content, prepare_vma_ios; criu/pie/restorer.c.
    """

    def __init__(self) -> None:
        self._opened: OrderedDict[tuple[str, int], None] = OrderedDict()

    def opened(self, name: str, pid: int) -> bool:
        """Take note of a file that process `pid` has opened; say if this is the second open.

        The next one is a first one again: another restore's, of a process of the same number.

        `pid`: 0 for processes that cannot be told apart.
        """
        if not pid or not is_pages(name):
            return False
        if (name, pid) in self._opened:
            del self._opened[name, pid]
            return True
        self._opened[name, pid] = None
        while len(self._opened) > _TASKS_MOST:
            self._opened.popitem(last=False)
        return False
