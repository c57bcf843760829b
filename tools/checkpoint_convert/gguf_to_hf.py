"""Converts a GGUF file (llama architecture) to a Hugging Face folder.

python tools/checkpoint_convert/gguf_to_hf.py --gguf model.Q4_1.gguf --out models/teacher
"""

from __future__ import annotations

import argparse
import sys

from opd_megatron.errors import OPDError
from opd_megatron.weights.gguf import DTYPES, convert_gguf


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True, metavar="FILE", help="the GGUF file")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder; refused when it holds anything")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="type of the written weights")
    args = parser.parse_args(argv)
    try:
        out = convert_gguf(args.gguf, args.out, dtype=args.dtype, progress=sys.stderr.isatty())
    except OPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
