"""Which folders are packages; all else about the distribution stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sparkctl", "sparkctl.*"]), *find_packages("kernels"), "sparkctl.recipes"],
    package_dir={"sparkctl_kernels": "kernels/sparkctl_kernels", "sparkctl.recipes": "recipes"},
)
