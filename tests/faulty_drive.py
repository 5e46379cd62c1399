"""A file system that fails when it is told to: shows a folder in another place, by FUSE, in a process of its own.

python faulty_drive.py FOLDER PLACE CONTROL. What fails is in the file CONTROL: nothing, or a kind and an errno, as in
"writes 28", "all 5", "hang 0" (writes wait until CONTROL says otherwise) or "garble 0" (one read gives other bytes).
"""

import os
import sys
import time
from pathlib import Path

import mfusepy


class FaultyDrive(mfusepy.Operations):
    use_ns = True

    def __init__(self, folder: str, control: str):
        self.folder, self.control = folder, Path(control)

    def _place(self, path: str, *kinds: str) -> str:
        """Where it really is, unless one of these kinds of failure is due."""
        kind, number = (self.control.read_text().split() or ["", "0"])[:2]
        if kind == "all" or kind in kinds:
            raise mfusepy.FuseOSError(int(number))
        return self.folder + path

    def getattr(self, path, fh=None):
        about = os.lstat(self._place(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino")
        times = {f"st_{name}": getattr(about, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
        return {name: getattr(about, name) for name in names} | times

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._place(path))]

    def open(self, path, flags):
        return os.open(self._place(path), flags)

    def create(self, path, mode, fi=None):
        return os.open(self._place(path, "writes"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path, size, offset, fh):
        data = os.pread(fh, size, offset) if self._place(path) else b""
        if data and self.control.read_text().startswith("garble"):
            self.control.write_text("")
            data = bytes([data[0] ^ 1]) + data[1:]
        return data

    def write(self, path, data, offset, fh):
        while self.control.read_text().startswith("hang"):
            time.sleep(0.01)
        return os.pwrite(fh, data, offset) if self._place(path, "writes") else 0

    def truncate(self, path, length, fh=None):
        os.truncate(self._place(path, "writes"), length)

    def fsync(self, path, datasync, fh):
        self._place(path, "writes")

    def release(self, path, fh):
        os.close(fh)

    def mkdir(self, path, mode):
        os.mkdir(self._place(path, "writes"), mode)

    def rmdir(self, path):
        os.rmdir(self._place(path, "writes"))

    def unlink(self, path):
        os.unlink(self._place(path, "writes"))

    def rename(self, old, new):
        os.replace(self._place(old, "writes"), self._place(new, "writes"))

    def utimens(self, path, times=None):
        os.utime(self._place(path, "writes"), ns=times)

    def statfs(self, path):
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 2**20, "f_bfree": 2**20, "f_bavail": 2**20}


if __name__ == "__main__":
    folder, place, control = sys.argv[1:]
    # Nothing is remembered by the kernel: a failure is felt at once.
    at_once = {"attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0}
    mfusepy.FUSE(FaultyDrive(folder, control), place, foreground=True, **at_once)
