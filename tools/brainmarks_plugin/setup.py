"""Packaging of the brainmarks plug-in: a module in brainmarks' own namespace, which that package finds by itself."""

from setuptools import find_namespace_packages, setup

setup(
    name="swiftv2-brainmarks",
    version="0.1.0",
    description="Exported swiftv2 weights as a model of brainmarks",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_namespace_packages(where="src"),
    py_modules=["swiftv2_brainmarks"],
    # swiftv2 itself is installed without its dependencies beside brainmarks' own: see docs/interoperability.md.
    install_requires=["brainmarks>=0.1.1"],
)
