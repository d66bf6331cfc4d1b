from setuptools import setup  # pyproject.toml describes the package

setup()
