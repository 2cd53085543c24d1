"""The packages of this folder, used in place: `pip install --editable .`"""

from setuptools import find_namespace_packages, setup

setup(packages=find_namespace_packages(include=["config*", "core*", "models*", "operator_cxx*", "symbol*", "utils*"]))
