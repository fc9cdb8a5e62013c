"""Lists the packages, mapping the folders `kernels/` and `checkpoints/` into `moe_jax`; all else is in pyproject.toml."""

from setuptools import find_packages, setup

MAPPED_FOLDERS = ("kernels", "checkpoints")

setup(
    packages=find_packages(include=["moe_jax", "moe_jax.*"])
    + [f"moe_jax.{package}" for folder in MAPPED_FOLDERS for package in find_packages(include=[folder, f"{folder}.*"])],
    package_dir={f"moe_jax.{folder}": folder for folder in MAPPED_FOLDERS},
)
