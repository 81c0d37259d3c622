"""Pages of mapped files: read and written by calls that return an error, where a plain access would end the process.

A page that cannot be read, or a hole for which the disk has no room, kills a process by SIGBUS when it is touched. So
room is reserved before, and pages are read in before, by system calls; these also wait in a thread without holding the
interpreter.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
MOST_PARTS = 1024  # IOV_MAX of Linux
MOST_CHECKED = 256 << 20  # bytes whose addresses are held at a time
START_WRITING, WAIT_FOR_WRITES = 2, 4  # SYNC_FILE_RANGE_WRITE, SYNC_FILE_RANGE_WAIT_AFTER


@lru_cache
def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


@lru_cache
def reads_itself() -> bool:
    """Return whether this process may read its own memory by a system call; a sandbox may forbid it."""
    there = torch.zeros(1, dtype=torch.uint8, device="cpu")
    try:
        read_in(torch.tensor([there.data_ptr()], device="cpu"))
    except (OSError, AttributeError):
        return False
    return True


def read_in(addresses: Tensor) -> None:
    """Read one byte at each of the addresses `[n]` of this process, and so the pages around them.

    Raises OSError where a page cannot be read.
    """
    for part in addresses.split(MOST_PARTS):
        ones = torch.ones_like(part)
        remote = torch.stack((part, ones), 1)
        room = torch.empty(len(part), dtype=torch.uint8, device="cpu")
        local = torch.tensor([room.data_ptr(), len(part)], device="cpu")
        call = _library().process_vm_readv
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (local, remote)]
        found = call(os.getpid(), pointers[0], 1, pointers[1], len(part), 0)
        if found != len(part):  # it stops at the first page that cannot be read
            number = ctypes.get_errno() if found < 0 and ctypes.get_errno() != errno.EFAULT else errno.EIO
            raise OSError(number, os.strerror(number))


def check(address: int, length: int) -> None:
    """Read the pages of a mapped range; OSError where one cannot be read. Where this process may not read its own
    memory by a system call, nothing is checked."""
    if not length or not reads_itself():
        return
    first = address // PAGE * PAGE
    for start in range(first, address + length, MOST_CHECKED):
        read_in(torch.arange(start, min(start + MOST_CHECKED, address + length), PAGE, device="cpu"))


def first_of_pages(places: Tensor, length: int) -> Tensor:
    """Return places so that each page of the ranges `[n]` of so many bytes, from multiples of that on, has one."""
    inside = torch.arange(0, length, PAGE, device="cpu")
    if PAGE % length:  # a range may end in another page
        inside = torch.cat((inside, torch.tensor([length - 1], device="cpu")))
    return (places[:, None] + inside).flatten()


def resident(address: int, length: int) -> Tensor:
    """Return for each page of a mapped file, of which one begins at the address, whether memory has it."""
    found = torch.zeros(-(-length // PAGE), dtype=torch.uint8, device="cpu")
    call = _library().mincore
    if call(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(found.data_ptr())) != 0:
        found.zero_()
    return found.bitwise_and_(1) != 0


def reserve(file: int, start: int, length: int) -> None:
    """Take room on the disk for a part of a file; OSError if there is none."""
    os.posix_fallocate(file, start, length)


def write_out(file: int, start: int, length: int, what: int) -> None:
    """Start to write dirty pages of a part of a file, or wait until they are written; OSError if they cannot be."""
    call = _library().sync_file_range
    result = call(file, ctypes.c_int64(start), ctypes.c_int64(length), ctypes.c_uint(what))
    if result != 0 and ctypes.get_errno() not in (errno.ENOSYS, errno.ESPIPE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
