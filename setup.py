"""Packaging of swiftv2; pinned versions for CI and the README's commands are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
presets: dict[str, list[str]] = {}
launchers = [*(root / "slurm").glob("*.sh"), *(root / "slurm").glob("sites/*.env")]
for path in sorted([*(root / "configs").rglob("*.yaml"), *(root / "scaling").rglob("*.yaml"), *launchers]):
    folder = f"share/swiftv2/{path.parent.relative_to(root).as_posix()}"
    presets.setdefault(folder, []).append(path.relative_to(root).as_posix())

setup(
    name="swiftv2",
    version="0.1.0",
    description="Pretraining of 4-D fMRI foundation models (SimMIM on Swin4D) from a laptop to many nodes",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["swiftv2", "swiftv2.*"]),
    package_data={"swiftv2": ["py.typed"], "swiftv2.plan": ["*.yaml"]},
    data_files=sorted(presets.items()),
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.16",
        "zarr>=3.1",
        "numcodecs>=0.16",
        "crc32c>=2.7",
        "numpy>=2.0",
        "scipy>=1.12",
        "nibabel>=5.3",
        "nilearn>=0.11",
        "optuna>=4.0",
        "pandas>=2.2",
        "pyarrow>=17",
        "scikit-learn>=1.5",
        "safetensors>=0.4",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "rich>=13.7",
        "matplotlib>=3.8",
        "nvidia-ml-py>=12.535",
        "plotly>=6.0",
        "tensorboard>=2.15",
        "mpi4py>=4.0",
    ],
    extras_require={
        "mpi": ["mpich>=4.2"],
        "migrate": ["h5py>=3.11"],
        "explain": ["captum>=0.8"],
        "neptune": ["neptune>=1.10"],
        "wandb": ["wandb>=0.17"],
        "dashboard": ["optuna-dashboard>=0.18"],
        "benchmarks": ["h5py>=3.11", "tensorstore>=0.1.80", "zarrs>=0.2"],
        "dev": [
            "captum>=0.8",
            "h5py>=3.11",
            "hypothesis>=6.100",
            "mpich>=4.2",
            "mypy>=1.13",
            "neptune>=1.10",
            "nitime>=0.11",
            "optuna-dashboard>=0.18",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "selenium>=4.20",
            "types-PyYAML>=6.0",
            "wandb>=0.17",
        ],
    },
    entry_points={"console_scripts": ["swiftv2=swiftv2.cli:main"]},
)
