"""Converts a Hugging Face folder to Megatron and back at several layouts and compares bit by bit.

python tools/checkpoint_convert/verify_roundtrip.py --hf model --tensor 1,2 --pipeline 1,2
"""

from __future__ import annotations

import sys

from opd_megatron.convert import convert_command as command


def main(argv: list[str] | None = None) -> int:
    return command.main("verify-roundtrip", argv)


if __name__ == "__main__":
    sys.exit(main())
