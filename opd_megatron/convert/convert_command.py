"""`opd-megatron convert WHAT ...`, and the same conversions as scripts of their own in tools/checkpoint_convert/."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from opd_megatron.command import launcher
from opd_megatron.command.cli_args import Parser
from opd_megatron.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from opd_megatron.convert.hf_megatron import ParallelSizes

DTYPE_NAMES = ("bf16", "fp16", "fp32")
_RANKS = """
One process does it unless --tensor, --pipeline or --expert is above 1: then that many ranks are started on this
machine, or run it under torchrun with as many (`torchrun --nproc-per-node 4 SCRIPT --tensor 2 --pipeline 2 ...`). Each
rank needs the memory of its shard and up to 1 GiB more."""
_OUT = "new folder; refused when it holds anything, and there only when it is whole"


def main(what: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs one conversion as a command of its own. Returns the exit code: 0, 1 for a difference, 2 for a user's
    error."""
    words = sys.argv[1:] if argv is None else list(argv)
    return launcher.run_command(lambda: _run(what, words, prog or f"{what.replace('-', '_')}.py"))


def dispatch(words: Sequence[str]) -> int:
    """Runs `opd-megatron convert WHAT ...`."""
    prog = "opd-megatron convert"
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {prog} WHAT ...\n\nConvert a model's weights.\n\nWHAT is one of:")
        print("\n".join(f"  {name:<17} {text}" for name, (_, text) in COMMANDS.items()))
        print(f"\n`{prog} WHAT --help` explains one. Example:\n  {prog} hf-to-megatron --hf model --out model-megatron")
        return 0
    if words[0] not in COMMANDS:
        raise ConfigError(f"unknown conversion {words[0]!r}: use one of {', '.join(COMMANDS)}")
    return _run(words[0], words[1:], f"{prog} {words[0]}")


def _run(what: str, words: Sequence[str], prog: str) -> int:
    # Ranks of a conversion are as many as a layout has, not as this machine has GPUs, and it only moves bytes: the
    # GPUs are left to whoever trains on them.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return COMMANDS[what][0](list(words), prog)


def hf_to_megatron(argv: list[str], prog: str) -> int:
    parser = _parser(prog, "Hugging Face folder to Megatron checkpoint (torch_dist), readable in any layout." + _RANKS)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder with safetensors, or a hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help=_OUT)
    _add_layout(parser)
    args = parser.parse_args(argv)
    if _needs_ranks(args):
        return _on_ranks("hf-to-megatron", argv, args)
    from opd_megatron.convert.hf_megatron import hf_to_megatron as convert

    launcher.leave_cleanly_on_sigterm()
    convert(args.hf, args.out, _layout(args), dtype=args.dtype, progress=_shows_progress(args))
    return _wrote(args)


def megatron_to_hf(argv: list[str], prog: str) -> int:
    description = """Megatron checkpoint (torch_dist) to Hugging Face folder. Takes what hf_to_megatron wrote, in any
layout, or a run's checkpoint (RUN/checkpoints/step_...)."""
    parser = _parser(prog, description + _RANKS)
    parser.add_argument("--megatron", required=True, metavar="DIR", help="folder with the .metadata of the checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help=_OUT)
    parser.add_argument(
        "--hf-config", metavar="DIR",
        help="Hugging Face folder to take config.json and tokenizer from; needed only where neither the checkpoint "
        "nor the run it lies in has them",
    )  # fmt: skip
    parser.add_argument("--max-shard-gib", type=float, default=4.0, metavar="X", help="largest file written (4)")
    _add_layout(parser)
    args = parser.parse_args(argv)
    if args.max_shard_gib <= 0:
        raise ConfigError(f"--max-shard-gib {args.max_shard_gib} must be positive: the default is 4")
    if _needs_ranks(args):
        return _on_ranks("megatron-to-hf", argv, args)
    from opd_megatron.convert.hf_megatron import megatron_to_hf as convert

    launcher.leave_cleanly_on_sigterm()
    convert(
        args.megatron, args.out, _layout(args), hf_config=args.hf_config,
        dtype=args.dtype, max_shard_bytes=int(args.max_shard_gib * 2**30), progress=_shows_progress(args),
    )  # fmt: skip
    return _wrote(args)


def gguf_to_hf(argv: list[str], prog: str) -> int:
    from opd_megatron.convert.gguf import convert_gguf

    parser = _parser(prog, "GGUF file (llama architecture) to Hugging Face folder.")
    parser.add_argument("--gguf", required=True, metavar="FILE", help="the GGUF file")
    parser.add_argument("--out", required=True, metavar="DIR", help=_OUT)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the written weights")
    _add_quiet(parser)
    args = parser.parse_args(argv)
    convert_gguf(args.gguf, args.out, dtype=args.dtype, progress=_shows_progress(args))
    return _wrote(args)


def verify_roundtrip(argv: list[str], prog: str) -> int:
    description = """Converts a Hugging Face folder to Megatron and back and compares every tensor bit by bit: each
layout with itself and with the next one. Exit code 1 when a tensor differs."""
    parser = _parser(prog, description)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder with safetensors, or a hub id")
    parser.add_argument("--tensor", type=_sizes, default=[1], metavar="N[,N]", help="tensor parallel sizes (1)")
    parser.add_argument("--pipeline", type=_sizes, default=[1], metavar="N[,N]", help="pipeline sizes (1)")
    parser.add_argument("--expert", type=_sizes, default=[1], metavar="N[,N]", help="expert parallel sizes (1)")
    parser.add_argument("--work", metavar="DIR", help="where the copies go, twice the model's size (system's temp)")
    args = parser.parse_args(argv)
    from opd_megatron.convert.hf_megatron import ParallelSizes
    from opd_megatron.convert.verify import round_trips
    from opd_megatron.weights.hf_reader import resolve_model

    layouts = [ParallelSizes(*sizes) for sizes in itertools.product(args.tensor, args.pipeline, args.expert)]
    if launcher.is_rank() and len(layouts) > 1:
        raise ConfigError(f"{len(layouts)} layouts under torchrun: give one, or start it plainly to verify them all")
    with _work_folder(args.work) as work:
        results = round_trips(
            resolve_model(args.hf), work, layouts,
            lambda source, out, at: _convert("hf-to-megatron", ["--hf", str(source), "--out", str(out)], at),
            lambda megatron, out, at: _convert("megatron-to-hf", ["--megatron", str(megatron), "--out", str(out)], at),
            _remove,
        )  # fmt: skip
    if launcher.is_first_rank():
        for trip in results:
            verdict = "identical" if not trip.different else f"{len(trip.different)} DIFFER, first {trip.different[0]}"
            print(f"saved at {trip.saved_at}, exported at {trip.exported_at}: {trip.tensors} tensors, {verdict}")
    return int(any(trip.different for trip in results))


COMMANDS: dict[str, tuple[Callable[[list[str], str], int], str]] = {
    "hf-to-megatron": (hf_to_megatron, "Hugging Face folder -> Megatron checkpoint"),
    "megatron-to-hf": (megatron_to_hf, "Megatron checkpoint, or a run's, -> Hugging Face folder"),
    "gguf-to-hf": (gguf_to_hf, "GGUF file -> Hugging Face folder"),
    "verify-roundtrip": (verify_roundtrip, "Hugging Face -> Megatron -> Hugging Face, compared bit by bit"),
}


def _parser(prog: str, description: str) -> Parser:
    return Parser(prog=prog, description=description)


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensor", type=_size, default=1, metavar="N", help="tensor parallel size to work in (1)")
    parser.add_argument("--pipeline", type=_size, default=1, metavar="N", help="pipeline size to work in (1)")
    parser.add_argument("--expert", type=_size, default=1, metavar="N", help="expert parallel size to work in (1)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="type of the written weights (that of the read ones)")
    _add_quiet(parser)


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def _layout(args: argparse.Namespace) -> ParallelSizes:
    from opd_megatron.convert.hf_megatron import ParallelSizes

    return ParallelSizes(args.tensor, args.pipeline, args.expert)


def _needs_ranks(args: argparse.Namespace) -> bool:
    return args.tensor * args.pipeline * args.expert > 1 and not launcher.is_rank()


def _on_ranks(what: str, argv: list[str], args: argparse.Namespace) -> int:
    _refuse_early(args)
    return launcher.launch("opd_megatron.cli", ["convert", what, *argv], _layout(args).ranks)


def _refuse_early(args: argparse.Namespace) -> None:
    """Refuses what can be refused before ranks are started, which takes seconds."""
    out = Path(args.out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise WeightsError(f"output {str(out)!r} exists and is not an empty folder: give a new path or remove it")


def _shows_progress(args: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and launcher.is_first_rank() and not args.quiet


def _wrote(args: argparse.Namespace) -> int:
    if launcher.is_first_rank() and not args.quiet:
        print(f"wrote {args.out}")
    return 0


@contextmanager
def _work_folder(base: str | None) -> Iterator[Path]:
    """A temporary folder, under torchrun the same one on all ranks."""
    if base is not None and not Path(base).is_dir():
        raise ConfigError(f"--work {base!r} must be a folder: make it first")
    path = [tempfile.mkdtemp(prefix="verify-roundtrip-", dir=base) if launcher.is_first_rank() else ""]
    try:
        if launcher.is_rank():
            import torch.distributed as dist

            from opd_megatron.mcore.cpu.platform import init_distributed

            init_distributed()
            dist.broadcast_object_list(path)
        yield Path(path[0])
    finally:
        if launcher.is_first_rank():
            shutil.rmtree(path[0], ignore_errors=True)


def _remove(folder: Path) -> None:
    """Removes a folder once no rank reads it any more."""
    if launcher.is_rank():
        import torch.distributed as dist

        dist.barrier()
    if launcher.is_first_rank():
        shutil.rmtree(folder)


def _convert(what: str, argv: list[str], at: ParallelSizes) -> None:
    """Runs a conversion in this process where it is one of torchrun's ranks or one is enough, else on new ranks."""
    words = [*argv, "--tensor", str(at.tensor), "--pipeline", str(at.pipeline), "--expert", str(at.expert), "--quiet"]
    if launcher.is_rank() or at.ranks == 1:
        COMMANDS[what][0](words, what)
        return
    code = launcher.launch("opd_megatron.cli", ["convert", what, *words], at.ranks)
    if code != 0:
        sys.exit(code)  # the launcher has said why
