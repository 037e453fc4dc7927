"""What the native library of a wheel asks of others: python tests/wheels.py WHEEL_OR_LIBRARY ...

It may ask torch for the names of its stable ABI, the system for glibc and libstdc++, and nobody for anything else. That
all of torch's names were there in the oldest torch that is served, the build sees to (TORCH_TARGET_VERSION); those that
came later are weak, and asked for at run time.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ALLOWED = re.compile(
    r"lib(torch_cpu|stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so[.\d]*|ld-linux-[\w-]+\.so\.\d"
)  # the last for thread-local memory
FOREIGN = re.compile(r"_Z\w*?(2at|3c10|5torch|6caffe2)(\d|[A-Z])|_?Py[A-Z_]")


@dataclasses.dataclass
class Audit:
    machine: str
    needed: list[str]
    glibc: tuple[int, ...]  # the newest version of a symbol
    glibcxx: tuple[int, ...]
    torch: list[str]  # names that torch has to have
    weak: list[str]  # and those it may
    foreign: list[str]  # of torch's C++ or Python's C, which change from version to version

    def problems(self, glibc: tuple[int, ...] = (2, 34)) -> list[str]:
        found = [f"it needs {name}" for name in self.needed if not ALLOWED.fullmatch(name)]
        found += [f"it refers to {name}" for name in self.foreign]
        if self.glibc > glibc:
            found.append(f"it needs glibc {dotted(self.glibc)}; wanted: at most {dotted(glibc)}")
        return found if self.torch else [*found, "it refers to nothing of torch"]


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def audit(library: Path) -> Audit:
    """By readelf, which reads libraries of every processor."""

    def shown(*options: str) -> str:
        command = ["readelf", "-W", *options, str(library)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={"LC_ALL": "C"}).stdout

    def newest(name: str) -> tuple[int, ...]:
        return max((tuple(map(int, v.split("."))) for v in re.findall(rf"@{name}_([\d.]+)", symbols)), default=(0,))

    symbols = shown("--dyn-syms")
    # Number, value, size, type, binding, visibility, section, name.
    undefined = re.findall(r"(?m)^ *\d+: \w+ +\d+ \w+ +(\w+) +\w+ +UND (\S+)", symbols)
    names = [(binding, name.split("@")[0]) for binding, name in undefined]
    ours = [(binding, name) for binding, name in names if re.match("(aoti_)?torch_", name)]
    return Audit(
        machine=re.search(r"Machine: +(.*)", shown("-h"))[1],
        needed=re.findall(r"\(NEEDED\).*\[(.*)\]", shown("-d")),
        glibc=newest("GLIBC"),
        glibcxx=newest("GLIBCXX"),
        torch=[name for binding, name in ours if binding != "WEAK"],
        weak=[name for binding, name in ours if binding == "WEAK"],
        foreign=[name for _, name in names if FOREIGN.match(name)],
    )


def main(paths: list[str]) -> int:
    if shutil.which("readelf") is None:
        sys.exit("there is no readelf; install binutils")
    wrong = 0
    for path in map(Path, paths):
        print(path.name)
        with tempfile.TemporaryDirectory() as folder:
            libraries = [path]
            if path.suffix == ".whl":
                with zipfile.ZipFile(path) as wheel:
                    found = [name for name in wheel.namelist() if name.endswith(".so")]
                    libraries = [Path(wheel.extract(name, folder)) for name in found]
            for library in libraries:
                result = audit(library)
                print(f"  {library.name}: {result.machine}; needs {', '.join(result.needed)}")
                print(f"  glibc {dotted(result.glibc)}, libstdc++ {dotted(result.glibcxx)}")
                print(f"  {len(result.torch)} names of torch, {len(result.weak)} weak: {', '.join(result.weak)}")
                for problem in result.problems():
                    wrong += 1
                    print(f"  WRONG: {problem}")
            if not libraries and not path.name.endswith("-none-any.whl"):
                wrong += 1
            if not libraries:
                print("  no native library")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
