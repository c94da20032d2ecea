"""What the wheel holds: every package found here, and the folder conf/ of the checkout as pqbench/conf/."""

from pathlib import Path

from setuptools import find_packages, setup

CONF = {
    ".".join(["pqbench", *folder.parts]): folder.as_posix()
    for folder in sorted({path.parent for path in Path("conf").rglob("*.yaml")})
}

setup(packages=[*find_packages(include=["pqbench*", "methods*", "plots*"]), *CONF], package_dir=CONF)
