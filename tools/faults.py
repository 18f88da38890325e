"""Faults at every system call of a conversion: `python tools/faults.py [--every N]`.

A preloaded shim kills the process, tears a write, or lets a call fail, at the Nth call that changes
a file, for every N: on the way to nothing, over another directory, over one that holds other files
too, and when taken up again. After each the destination must be what it was or what it is to be,
the other files included, and the same command must finish it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODES = {"kill": 1, "tear": 2, "enospc": 3, "eio": 4, "int": 5, "term": 6}
SCENES = ("fresh", "overwrite", "over others", "resume", "last part", "last part over others")
LAST, FIRST = "2/2", "1/2"

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static int at, mode;
static volatile int count;

void zoo_arm(int n, int how) { count = 0; at = n; mode = how; }
int zoo_count(void) { return count; }

/* 0: go on; 1: half of it and then the end; -1: fail */
static int hit(void) {
    if (mode == 0 || __sync_add_and_fetch(&count, 1) != at) return 0;
    switch (mode) {
    case 1: kill(getpid(), SIGKILL); pause(); return 0;
    case 2: return 1;
    case 3: errno = ENOSPC; return -1;
    case 4: errno = EIO; return -1;
    case 5: kill(getpid(), SIGINT); return 0;
    case 6: kill(getpid(), SIGTERM); pause(); return 0;
    default: return 0;
    }
}
static int regular(int fd) { struct stat s; return fstat(fd, &s) == 0 && S_ISREG(s.st_mode); }
static void end(void) { kill(getpid(), SIGKILL); pause(); }

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define PLAIN(name, params, args, ...) int name params { \
    REAL(int, #name, __VA_ARGS__); \
    int h = hit(); if (h < 0) return -1; if (h) end(); return real args; }

PLAIN(linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f),
      int, const char *, int, const char *, int)
PLAIN(rename, (const char *a, const char *b), (a, b), const char *, const char *)
PLAIN(renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f),
      int, const char *, int, const char *, unsigned)
PLAIN(unlink, (const char *a), (a), const char *)
PLAIN(unlinkat, (int d, const char *a, int f), (d, a, f), int, const char *, int)
PLAIN(rmdir, (const char *a), (a), const char *)
PLAIN(mkdir, (const char *a, mode_t m), (a, m), const char *, mode_t)
PLAIN(fsync, (int fd), (fd), int)
PLAIN(ftruncate64, (int fd, off64_t n), (fd, n), int, off64_t)

ssize_t pwrite64(int fd, const void *p, size_t n, off64_t o) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off64_t);
    int h = hit();
    if (h < 0) return -1;
    if (h) { real(fd, p, n / 2, o); end(); }
    return real(fd, p, n, o);
}
ssize_t write(int fd, const void *p, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!regular(fd)) return real(fd, p, n);
    int h = hit();
    if (h < 0) return -1;
    if (h) { real(fd, p, n / 2); end(); }
    return real(fd, p, n);
}
ssize_t sendfile64(int out, int in, off64_t *o, size_t n) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    int h = hit();
    if (h < 0) return -1;
    if (h) { real(out, in, o, n / 2); end(); }
    return real(out, in, o, n);
}
int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    va_list list;
    va_start(list, flags);
    mode_t mode_ = flags & O_CREAT ? va_arg(list, mode_t) : 0;
    va_end(list);
    if (flags & (O_CREAT | O_TRUNC)) { int h = hit(); if (h < 0) return -1; if (h) end(); }
    return real(path, flags, mode_);
}
"""


def build(directory: Path) -> Path:
    """Compile the shim with the installed C compiler."""
    source, shim = directory / "shim.c", directory / "shim.so"
    source.write_text(SHIM, encoding="utf-8")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("faults: a C compiler is needed, and there is none")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    return shim


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


class Hunt:
    """A process with all imports done; each conversion is a fork of it."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self.source, self.scratch = source, scratch
        self.shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        head = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        weights = len(head).to_bytes(8, "little") + head + bytes(4)
        self.old = {"zoo.json": b"old", "model.safetensors": weights}
        self.others = {"train.py": b"mine", "notes/a.md": b"mine", "notes/deep/b.md": b"mine"}
        self.verdicts: Counter[str] = Counter()

    def convert(
        self, out: Path, at: int = 0, mode: int = 0, part: str | None = None
    ) -> tuple[int, int]:
        """(exit status, calls counted)"""
        import zoo

        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 4
            try:
                self.shim.zoo_arm(at, mode or 9)
                zoo.convert(
                    self.source,
                    out,
                    to="native",
                    max_shard_size=90_000,
                    memory=400_000,
                    threads=2,
                    force=True,
                    part=part,
                )
                code = 0
            except zoo.ZooError:
                code = 3
            except KeyboardInterrupt:
                code = 5
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}\n".encode())
            finally:
                count = self.shim.zoo_count()
                self.shim.zoo_arm(0, 0)
                os.write(writing, str(count).encode())
                os._exit(code)
        os.close(writing)
        status = os.waitpid(child, 0)[1]
        with os.fdopen(reading) as pipe:
            text = pipe.read()
        return status, int(text or 0)

    def before(self, scene: str) -> dict[str, bytes]:
        """What the destination holds at first."""
        if "over" not in scene:
            return {}
        return self.old | (self.others if "others" in scene else {})

    def prepare(self, scene: str, out: Path) -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        for name, data in self.before(scene).items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
        if scene == "resume":
            self.convert(out, 25, MODES["kill"])
        if "part" in scene:
            self.convert(out, part=FIRST)

    def point(self, scene: str, mode: str, at: int, truth: dict[str, bytes]) -> str:
        """Return the problem after a fault at one call, or an empty string."""
        out = self.scratch / "place" / "out"
        self.prepare(scene, out)
        parts = "part" in scene
        status, _ = self.convert(out, at, MODES[mode], LAST if parts else None)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 4:
            return "an exception of another library"
        now = contents(out) if out.exists() else {}
        before = self.before(scene)
        if now != truth and now != before:
            return "neither old nor new" if now.keys() != truth.keys() else "corrupt"
        left = [path.name for path in out.parent.iterdir() if path.name != "out"]
        if status == 0 and left and mode not in ("enospc", "eio"):
            return f"litter after success: {left}"
        status, _ = self.convert(out, part=LAST if parts else None)
        if parts and status == 0:  # a batch system runs all of what failed again
            status, _ = self.convert(out, part=FIRST)
        if status != 0 or contents(out) != truth:
            return f"does not go on: status {status}"
        left = [path.name for path in out.parent.iterdir() if path.name != "out"]
        return f"litter: {left}" if left else ""

    def run(self, every: int, scenes: tuple[str, ...] = SCENES) -> list[str]:
        out = self.scratch / "place" / "out"
        faults = []
        for scene in scenes:
            self.prepare(scene, out)
            status, calls = self.convert(out, part=LAST if "part" in scene else None)
            if status != 0:
                raise SystemExit(f"faults: the conversion itself fails: status {status}")
            truth = contents(out)
            if "others" in scene and not self.others.items() <= truth.items():
                raise SystemExit("faults: the conversion itself loses files of others")
            for mode in MODES:
                for at in range(1, calls + 1, every):
                    wrong = self.point(scene, mode, at, truth)
                    self.verdicts[f"{scene} {mode}"] += 1
                    if wrong:
                        faults.append(f"{scene}, {mode} at call {at} of {calls}: {wrong}")
        return faults


def made(scratch: Path) -> Path:
    """A checkpoint to convert, by a process of its own: forks need one that ran no kernels."""
    script = (
        "import sys; from pathlib import Path; from zoo import registry;"
        "from zoo.parity.fixtures import hot_checkpoint;"
        "hot_checkpoint(registry.architectures()['gpt2'], 'base', Path(sys.argv[1]))"
    )
    source = scratch / "source"
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run([sys.executable, "-c", script, source], check=True, cwd=ROOT, env=clean)
    (source / "tokenizer.json").write_text("{}")
    return source


def lines(hunt: Hunt, faults: list[str]) -> Iterator[str]:
    for scene in SCENES:
        counts = [f"{mode} {hunt.verdicts[f'{scene} {mode}']}" for mode in MODES]
        yield f"{scene:22} {'  '.join(counts)}"
    yield from faults
    yield f"{sum(hunt.verdicts.values())} faults, {len(faults)} of them not survived"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--every", type=int, default=1, help="test only every Nth call (default: 1)"
    )
    options = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="zoo-faults-") as scratch:
            env = {**os.environ, "LD_PRELOAD": str(build(Path(scratch))), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, __file__, *sys.argv[1:]]
            return subprocess.run(command, env=env, cwd=ROOT).returncode
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    import zoo.saving.convert  # noqa: F401  what every fork needs is here before the first

    with tempfile.TemporaryDirectory(prefix="zoo-faults-") as name:
        place = Path(name)
        hunt = Hunt(made(place), place)
        faults = hunt.run(options.every)
        print("\n".join(lines(hunt, faults)))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
