"""Make the patched llama.cpp source tree and print its path.

The tree is the ``vendor/llama.cpp`` of the pinned llama-cpp-python sdist. Patches are
applied to a pristine copy only. The folder keeps its name and the files that did not
change keep their times, so that an edited patch rebuilds what includes the files it
touches, and compiler caches of several checkouts share their entries.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no two builds at once there
    fcntl = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent


def read_pin() -> dict[str, str]:
    """Fields of ``UPSTREAM`` (package, version, sha256, commit)."""
    lines = (HERE / "UPSTREAM").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def series() -> list[Path]:
    """The patches in the order of application."""
    return [HERE / name for name in (HERE / "series").read_text().split()]


def tree_hash(*, stock: bool) -> str:
    """What a source tree is made of: the pin and, unless ``stock``, every patch."""
    digest = hashlib.sha256((HERE / "UPSTREAM").read_bytes())
    for patch in [] if stock else series():
        digest.update(patch.name.encode() + b"\0" + patch.read_bytes())
    return digest.hexdigest()


def find_sdist(out: Path, given: str) -> Path:
    """Path of the verified sdist: the given one, or downloaded once with pip into ``out``."""
    pin = read_pin()
    if given:
        path = Path(given)
        if not path.is_file():
            raise SystemExit(f"PYHEADKV_LLAMA_CPP_SDIST={given}: no such file")
    else:
        path = out / f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
        if not path.is_file():
            cmd = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-build-isolation",
                "--no-binary",
                pin["package"],
                "--dest",
                str(out),
                f"{pin['package']}=={pin['version']}",
            ]
            if subprocess.run(cmd, stdout=sys.stderr).returncode != 0 or not path.is_file():
                raise SystemExit(
                    f"cannot download {pin['package']}=={pin['version']}; without a network pass "
                    "-DPYHEADKV_LLAMA_CPP_SDIST=/path/to/sdist.tar.gz"
                )
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 != pin["sha256"]:
        raise SystemExit(f"{path.name}: sha256 is {sha256}, patches/UPSTREAM pins {pin['sha256']}")
    return path


def extract(sdist: Path, dst: Path) -> None:
    """Unpack ``vendor/llama.cpp`` of the sdist as ``dst``."""
    with tarfile.open(sdist) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if parts[1:3] != ("vendor", "llama.cpp") or len(parts) < 4 or parts[3] == ".git":
                continue
            member.name = str(Path(*parts[3:]))
            if hasattr(tarfile, "data_filter"):
                tar.extract(member, dst, filter="data")
            else:
                tar.extract(member, dst)


def apply_patches(tree: Path) -> None:
    """Apply the series in ``tree``; offsets are allowed, fuzz is not."""
    import patch_ng  # a build requirement, see pyproject.toml; strips the a/ and b/ of git itself

    for patch in series():
        patch_set = patch_ng.fromfile(str(patch))
        if not patch_set or not patch_set.apply(root=str(tree), fuzz=False):
            raise SystemExit(f"{patch.name} does not apply to the pinned llama.cpp")


def sync(source: Path, tree: Path) -> None:
    """Make ``tree`` equal ``source``; files that are equal already are not touched."""
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in [path for path in tree.rglob("*") if path.is_file() and path.relative_to(tree) not in files]:
        path.unlink()
    for name in files:
        target = tree / name
        if not target.is_file() or not filecmp.cmp(source / name, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
            shutil.copymode(source / name, target)


def make_tree(out: Path, *, sdist: str, stock: bool) -> Path:
    """Path of the complete source tree below ``out``, made on first use."""
    out.mkdir(parents=True, exist_ok=True)
    tree = out / ("llama.cpp-stock" if stock else "llama.cpp")
    stamp = out / f"{tree.name}.sha256"  # there only while the tree is complete
    digest = tree_hash(stock=stock)
    with open(out / f"{tree.name}.lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == digest:
            return tree
        with tempfile.TemporaryDirectory(prefix="llama.cpp-", dir=out) as work:
            extract(find_sdist(out, sdist), Path(work))
            if not stock:
                apply_patches(Path(work))
            stamp.unlink(missing_ok=True)
            sync(Path(work), tree)
        stamp.write_text(digest)
    return tree


def main() -> None:
    """Command line, called by CMakeLists.txt and the Makefile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the download and the tree")
    parser.add_argument("--sdist", default="", help="sdist to use instead of downloading it")
    parser.add_argument("--stock", action="store_true", help="leave the tree unpatched")
    parser.add_argument("--sdist-only", action="store_true", help="print the path of the sdist, make no tree")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.sdist_only:
        print(find_sdist(args.out, args.sdist))
    else:
        print(make_tree(args.out, sdist=args.sdist, stock=args.stock))


if __name__ == "__main__":
    main()
