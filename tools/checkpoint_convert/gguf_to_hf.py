"""Converts a GGUF file (llama architecture) to a Hugging Face folder.

python tools/checkpoint_convert/gguf_to_hf.py --gguf model.Q4_1.gguf --out models/teacher
"""

from __future__ import annotations

import sys

from opd_megatron.convert import convert_command as command


def main(argv: list[str] | None = None) -> int:
    return command.main("gguf-to-hf", argv)


if __name__ == "__main__":
    sys.exit(main())
