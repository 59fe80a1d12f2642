"""Make the patched llama.cpp source tree and print its path.

The tree is the ``vendor/llama.cpp`` of the pinned llama-cpp-python sdist, copied
pristine into a folder named by the hash of pin and patches and patched there, so
that an edited patch always meets a fresh tree.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def read_pin() -> dict[str, str]:
    """Fields of ``UPSTREAM`` (package, version, sha256, commit)."""
    lines = (HERE / "UPSTREAM").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def series() -> list[Path]:
    """The patches in the order of application."""
    return [HERE / name for name in (HERE / "series").read_text().split()]


def tree_name(*, stock: bool) -> str:
    """Folder name of the source tree: changes with the pin and with every patch."""
    if stock:
        return f"llama.cpp-stock-{read_pin()['sha256'][:12]}"
    digest = hashlib.sha256((HERE / "UPSTREAM").read_bytes())
    for patch in series():
        digest.update(patch.name.encode() + b"\0" + patch.read_bytes())
    return f"llama.cpp-{digest.hexdigest()[:12]}"


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
            cmd = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation",
                   "--no-binary", pin["package"], "--dest", str(out), f"{pin['package']}=={pin['version']}"]
            if subprocess.run(cmd, stdout=sys.stderr).returncode != 0 or not path.is_file():
                raise SystemExit(f"cannot download {pin['package']}=={pin['version']}; without a network pass "
                                 "-DPYHEADKV_LLAMA_CPP_SDIST=/path/to/sdist.tar.gz")
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


def make_tree(out: Path, *, sdist: str, stock: bool) -> Path:
    """Path of the complete source tree below ``out``, made on first use."""
    out.mkdir(parents=True, exist_ok=True)
    tree = out / tree_name(stock=stock)
    if tree.is_dir():
        return tree
    source = find_sdist(out, sdist)
    work = Path(tempfile.mkdtemp(prefix="llama.cpp-", dir=out))
    try:
        extract(source, work)
        if not stock:
            apply_patches(work)
        work.rename(tree)  # only a complete tree ever has the final name
    finally:
        shutil.rmtree(work, ignore_errors=True)
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
