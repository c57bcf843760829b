"""Converts a Hugging Face folder to a Megatron checkpoint.

python tools/checkpoint_convert/hf_to_megatron.py --hf model --out model-megatron --tensor 2
"""

from __future__ import annotations

import sys

from opd_megatron.convert import convert_command as command


def main(argv: list[str] | None = None) -> int:
    return command.main("hf-to-megatron", argv)


if __name__ == "__main__":
    sys.exit(main())
