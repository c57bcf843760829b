"""Makes a student by depth pruning: evenly kept layers of a Hugging Face model, first and last among them.

python tools/checkpoint_convert/prune_depth.py --hf models/teacher --layers 24 --out models/student
"""

from __future__ import annotations

import argparse
import sys

from opd_megatron.convert.prune import prune_depth
from opd_megatron.errors import OPDError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder with safetensors")
    parser.add_argument("--layers", required=True, type=int, metavar="N", help="layers to keep")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder; refused when it holds anything")
    args = parser.parse_args(argv)
    try:
        out = prune_depth(args.hf, args.layers, args.out, progress=sys.stderr.isatty())
    except OPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
