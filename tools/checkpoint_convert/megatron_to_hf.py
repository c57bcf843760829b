"""Converts a Megatron checkpoint to a Hugging Face folder.

python tools/checkpoint_convert/megatron_to_hf.py --megatron model-megatron --out model-hf
"""

from __future__ import annotations

import sys

from opd_megatron.convert import convert_command as command


def main(argv: list[str] | None = None) -> int:
    return command.main("megatron-to-hf", argv)


if __name__ == "__main__":
    sys.exit(main())
